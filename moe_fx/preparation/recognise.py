"""Reading an MoE block: which projections are gate, up and down, and what its experts' loop computes of what.

Nothing is matched by name, and neither is the loop's own bookkeeping (masks, sorts, splits): in a recorded execution,
the experts' part is everything between the tokens, the routing weights and the expert ids on one side, and the summed
result on the other. It must depend on nothing else; that it computes ``moe_fx.experts`` is then verified on values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_fx.passes.core import MatchContext, Miss, require
from moe_fx.passes.graph import ALIASES, CASTS, UNIT_DIMS, arg, aten, bind, dtype, is_op, peel, shape, sources
from moe_fx.passes.match.activation import read_activation
from moe_fx.passes.match.router import RouterPass
from moe_fx.passes.normalize.noops import DropNoopsPass
from moe_fx.preparation.trace import Trace
from moe_fx.preparation.weights import ExpertStore, Slot

_FILLS = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_empty)
_PICKS = (aten.index, aten.index_select, aten.gather, aten.masked_select)
_ACCUMULATIONS = (aten.index_add, aten.index_put, aten.scatter_add, aten.add)


@dataclass(frozen=True)
class ExpertForm:
    """What every expert of a block computes.

    Attributes:
        gate, up, down: the projections' weights; ``up`` is None where gate and up are one projection, or there is none.
        gate_bias, up_bias, down_bias: their biases.
        transposed: weights are stored [in, out].
        attributes: ``act``, ``layout`` and what else ``experts`` needs of the activation.
    """

    gate: Slot
    up: Slot | None
    down: Slot
    gate_bias: Slot | None
    up_bias: Slot | None
    down_bias: Slot | None
    transposed: bool
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Roles:
    """The nodes of one trace between which the experts stand.

    Attributes:
        x: tokens, [..., H].
        weights, ids: routing weights and expert ids, [..., k].
        result: the experts' weighted sum, of x's size.
        base: what the sum was added onto (the shared experts' result, say), if not zeros.
        top_k: k.
        weight_on: ``output`` or ``input``.
        calls: the expert calls' down projections, for what was hit.
        experts_hit: which experts ran.
    """

    x: fx.Node
    weights: fx.Node
    ids: fx.Node
    result: fx.Node
    base: fx.Node | None
    top_k: int
    weight_on: str
    experts_hit: frozenset[int]


@dataclass(frozen=True)
class _Matmul:
    node: fx.Node
    out: fx.Node
    rows: fx.Node
    expert: int
    weight: Slot
    bias: Slot | None
    transposed: bool


def read_trace(trace: Trace, store: ExpertStore) -> tuple[ExpertForm, Roles]:
    """Read one execution of a block; :class:`Miss` names the first predicate that failed."""
    matmuls = {m.node: m for m in _matmuls(trace.graph, store)}
    require(bool(matmuls), f"no product with a single expert's weight of {store.path or 'the block'} was executed")
    calls = list(_calls(matmuls))
    forms = [_read_form(down, ups) for down, ups in calls]
    for form, (down, _) in zip(forms, calls, strict=True):
        require(form == forms[0], f"expert {down.expert} computes something else than expert {calls[0][0].expert}")
    roles = _read_roles(trace, list(matmuls), calls)
    return forms[0], roles


def as_argument(output: Any) -> Any:
    """A module's output as an fx argument."""
    if isinstance(output, (tuple, list)):
        return tuple(as_argument(item) for item in output)
    if isinstance(output, Mapping):
        return {key: as_argument(item) for key, item in output.items()}
    return output


def read_router(roles: Roles) -> tuple[Mapping[str, Any], str]:
    """``route``'s attributes as the router pass reads them, and why it could not if it could not."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    wanted = _ancestors([roles.weights, roles.ids])
    for node in roles.ids.graph.nodes:  # Inputs first: passes expect all placeholders at the start.
        if node in wanted and node.op != "call_function":
            copied[node] = graph.placeholder(node.name)
    for node in roles.ids.graph.nodes:
        if node in wanted and node.op == "call_function":
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    for node, copy in copied.items():
        copy.meta = dict(node.meta)
    graph.output((copied[roles.weights], copied[roles.ids]))
    ctx = MatchContext(fx.GraphModule(nn.Module(), graph))
    with torch.inference_mode():
        for item in (DropNoopsPass(), RouterPass()):
            ctx.current = item
            item.run(ctx)
    sites = [site for site in ctx.sites if site.kind == "router"]
    matched = [site for site in sites if site.matched]
    if matched:
        return matched[-1].attributes, ""
    return {}, sites[-1].reason if sites else "its top-k is no router's"


# --- Expert calls ---


def _matmuls(graph: fx.Graph, store: ExpertStore) -> Iterator[_Matmul]:
    for node in graph.nodes:
        if is_op(node, aten.linear):
            rows, weight, bias = (arg(node, i) for i in range(3))
            stored_in_out = False
        elif is_op(node, aten.mm, aten.matmul):
            (rows, weight), bias, stored_in_out = node.args, None, True
        elif is_op(node, aten.addmm):
            (bias, rows, weight), stored_in_out = node.args[:3], True
        else:
            continue
        found = store.weight_of(weight)
        if found is None:
            continue
        slot, expert, swapped = found
        out, bias_slot = node, None
        if bias is None:
            out, bias = _added_bias(node, store)
        if bias is not None:
            bias_found = store.bias_of(bias)
            require(bias_found is not None and bias_found[1] == expert, "an expert adds another expert's bias", node)
            bias_slot = bias_found[0]
        yield _Matmul(node, out, rows, expert, slot, bias_slot, stored_in_out != swapped)


def _added_bias(node: fx.Node, store: ExpertStore) -> tuple[fx.Node, Any]:
    """``(sum, bias)`` when the product's one consumer adds a bias to it."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if is_op(user, aten.add) and isinstance(user.args[1], fx.Node):
        other = user.args[1] if user.args[0] is node else user.args[0]
        if store.bias_of(other) is not None and not user.kwargs:
            return user, other
    return node, None


def _calls(matmuls: Mapping[fx.Node, _Matmul]) -> Iterator[tuple[_Matmul, list[_Matmul]]]:
    """``(down, [gate] or [gate and up in graph order])`` of every time an expert ran."""
    fed: set[fx.Node] = set()
    downs = []
    for matmul in matmuls.values():
        rows = matmul.rows
        reached = [rows] if rows in matmuls else sources(rows, lambda n: n in matmuls, limit=64)
        ups = sorted({n for n in reached if n in matmuls})
        fed.update(ups)
        if ups:
            downs.append((matmul, [matmuls[up] for up in ups]))
    for down, ups_read in downs:
        require(down.node not in fed, "an expert has more than two layers of projections", down.node)
        require(len(ups_read) <= 2, f"{len(ups_read)} projections feed one down projection", down.node)
        same_expert = all(up.expert == down.expert for up in ups_read)
        require(same_expert, "a down projection follows another expert's gate or up", down.node)
        yield down, ups_read
    used = fed | {down.node for down, _ in downs}
    lonely = next((node for node in matmuls if node not in used), None)
    require(lonely is None, "an expert's projection is followed by no second one", lonely)


def _read_form(down: _Matmul, ups: Sequence[_Matmul]) -> ExpertForm:
    activation = read_activation(down.rows)
    by_out = {_plain(up.out): up for up in ups}
    gate = by_out.get(_plain(activation.gate))
    up = None if activation.up is None else by_out.get(_plain(activation.up))
    good = gate is not None and (activation.up is None or up is not None) and len(ups) == (1 if up is None else 2)
    require(good, "the activation's inputs are not the expert's gate and up projections", down.node)
    assert gate is not None
    products = [gate, down] if up is None else [gate, up, down]
    if up is not None:
        require(_alike(gate.rows, up.rows), "gate and up multiply different rows", up.node)
        require((gate.bias is None) == (up.bias is None), "only one of gate and up has a bias", up.node)
    require(
        len({m.transposed for m in products}) == 1, "an expert's weights are stored in different layouts", down.node
    )
    modular = not gate.weight.stacked
    require(not (modular and gate.transposed), "an expert multiplies by a Linear's weight untransposed", gate.node)
    return ExpertForm(
        gate=gate.weight,
        up=None if up is None else up.weight,
        down=down.weight,
        gate_bias=gate.bias,
        up_bias=None if up is None else up.bias,
        down_bias=down.bias,
        transposed=gate.transposed,
        attributes=activation.attributes(),
    )


# --- What the experts stand between ---


def _read_roles(trace: Trace, matmuls: Sequence[fx.Node], calls: Sequence[tuple[_Matmul, list[_Matmul]]]) -> Roles:
    tainted, live = _descendants(matmuls), _descendants([trace.input])
    gate_rows = [ups[0].rows for _, ups in calls]
    x = _read_tokens(gate_rows, tainted, live, trace)
    hit = frozenset(down.expert for down, _ in calls)
    failure: Miss | None = None
    for result in _cuts(trace, tainted, last_matmul=max(matmuls)):
        if shape(result).numel() != shape(x).numel():
            continue
        base = _read_base(result, tainted, live)
        for ids, weights, top_k in _selections(result, x, tainted, live):
            frontier = {x, weights, ids} if base is None else {x, weights, ids, base}
            other = _other_source(result, frontier, live)
            if other is None:
                on_input = any(weights in _made_of(rows, stop=x) for rows in gate_rows)
                weight_on = "input" if on_input else "output"
                return Roles(x, weights, ids, result, base, top_k, weight_on, hit)
        reason = "the experts' results depend on more than tokens, routing weights and expert ids"
        failure = failure or Miss(reason, result)
    topks = [n for n in trace.graph.nodes if is_op(n, aten.topk) and n not in tainted]
    require(bool(topks), "no top-k selects the experts")
    raise failure or Miss("the experts' results do not come together in one tensor of the tokens' size")


def _cuts(trace: Trace, tainted: set[fx.Node], last_matmul: fx.Node) -> Iterator[fx.Node]:
    """The nodes after all expert products through which everything made of them passes, in order."""
    outputs: list[fx.Node] = []
    fx.map_arg(as_argument(trace.output), outputs.append)
    order = list(trace.graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    last_use = {node: max((position[u] for u in node.users), default=-1) for node in order}
    last_use.update(dict.fromkeys(outputs, len(order)))
    still_used: set[fx.Node] = set()
    for i, node in enumerate(order):
        still_used = {n for n in still_used if last_use[n] > i}
        if node in tainted and last_use[node] > i:
            still_used.add(node)
            if position[last_matmul] < i and still_used == {node} and _is_float(node):
                yield node


def _selections(
    result: fx.Node, x: fx.Node, tainted: set[fx.Node], live: set[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """``(ids, weights, k)`` by shape and descent among what ``result`` is made of, the latest first."""
    behind = sorted((_ancestors([result]) - tainted) & live, reverse=True)
    before_x = _ancestors([x])
    n_tokens = shape(x).numel() // shape(x)[-1]
    for topk in (n for n in behind if is_op(n, aten.topk)):
        top_k = bind(topk)["k"]
        selected = _descendants([topk])
        grids = [n for n in behind if _is_grid(n, n_tokens, top_k) and n not in before_x]
        for ids in (n for n in grids if n in selected and dtype(n) in (torch.int64, torch.int32)):
            for weights in (n for n in grids if _is_float(n)):
                yield ids, weights, top_k


def _is_grid(node: fx.Node, n_tokens: int, top_k: int) -> bool:
    """Whether the node has an element per token and slot."""
    held = node.meta.get("val")
    is_tensor = isinstance(held, torch.Tensor) and held.dim() >= 1
    return is_tensor and held.shape[-1] == top_k and held.numel() == n_tokens * top_k


def _made_of(rows: fx.Node, stop: fx.Node | None) -> set[fx.Node]:
    """The nodes whose values flow into ``rows``, not beyond ``stop``; what only picks rows out does not count."""
    seen, queue = {rows}, [rows]
    while queue:
        node = queue.pop()
        if node is stop:
            continue
        parents = node.args[:1] if is_op(node, *_PICKS) else node.all_input_nodes
        fresh = [p for p in parents if isinstance(p, fx.Node) and p not in seen]
        seen.update(fresh)
        queue += fresh
    return seen


def _read_tokens(gate_rows: Sequence[fx.Node], tainted: set[fx.Node], live: set[fx.Node], trace: Trace) -> fx.Node:
    hidden, n_elements = shape(gate_rows[0])[-1], shape(trace.input).numel()
    common: set[fx.Node] | None = None
    for rows in gate_rows:
        own = {
            n
            for n in _made_of(rows, stop=None) - tainted
            if n in live and _is_float(n) and shape(n)[-1:] == (hidden,) and shape(n).numel() == n_elements
        }
        common = own if common is None else common & own
    require(bool(common), "the experts' rows are not taken from the block's tokens", gate_rows[0])
    return max(common)


def _read_base(result: fx.Node, tainted: set[fx.Node], live: set[fx.Node]) -> fx.Node | None:
    """What the accumulation into ``result`` started from, unless that was a constant (zeros)."""
    node: Any = result
    while node in tainted and is_op(node, *_ACCUMULATIONS):
        parents = [p for p in node.args[:2] if isinstance(p, fx.Node)]
        accumulator = next((p for p in parents if p in tainted and is_op(p, *_ACCUMULATIONS)), parents[0])
        if accumulator not in tainted and len(parents) == 2 and is_op(node, aten.add) and parents[1] not in tainted:
            return None
        node = accumulator
    is_base = node not in tainted and node in live and shape(node) == shape(result) and dtype(node) == dtype(result)
    return node if is_base and not is_op(peel(node, *ALIASES, *CASTS), *_FILLS) else None


def _other_source(result: fx.Node, frontier: set[fx.Node], live: set[fx.Node]) -> fx.Node | None:
    """How the input reaches ``result`` other than through the frontier, if it does."""
    seen: set[fx.Node] = set()
    queue = [result]
    while queue:
        node = queue.pop()
        if node in seen or node in frontier or node not in live or is_op(node, *_FILLS):
            continue
        if node.op == "placeholder":
            return node
        seen.add(node)
        queue += node.all_input_nodes
    return None


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all they are made of."""
    seen, queue = set(nodes), list(nodes)
    while queue:
        for parent in queue.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return seen


def _descendants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all that is made of them."""
    seen, queue = set(nodes), list(nodes)
    while queue:
        for user in queue.pop().users:
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return seen


def _is_float(node: fx.Node) -> bool:
    held = node.meta.get("val")
    return isinstance(held, torch.Tensor) and held.is_floating_point() and held.dim() >= 1


def _alike(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two values are computed in the same way from the same nodes (``x[rows]`` written twice, say)."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        a, b = _plain(a), _plain(b)
        called_alike = a.op == b.op == "call_function" and a.target == b.target and depth > 0
        return a is b or (called_alike and _alike((a.args, a.kwargs), (b.args, b.kwargs), depth - 1))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_alike(x, y, depth) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _plain(node: Any) -> Any:
    return peel(node, *ALIASES, *UNIT_DIMS, *CASTS)
