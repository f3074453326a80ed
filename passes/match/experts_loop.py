"""Loops over experts that dynamo unrolled into the graph -> ``moe_fx.experts``.

Unfused, one term per expert e (Mixtral-style, sparse or masked)::

    tok, slot = where(ids == e)                     # also through one_hot(ids).permute(2, 1, 0)[e]
    h = silu(linear(x[tok], gate_e)) * linear(x[tok], up_e)
    y = y.index_add(0, tok, linear(h, down_e) * w[tok, slot, None])

    y = y + expert_e(x) * (w * (ids == e)).sum(-1, keepdim=True)

Fused::

    y = moe_fx.experts(x, w, ids, stack(gate_e), stack(down_e), w3=stack(up_e), ...)

Weights that are slices of one 3-D weight are used in place. Separate weights are stacked in the graph at every call:
right, but slow; ``moe_fx.prepare(model)`` packs them once instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    UNIT_DIMS,
    arg,
    aten,
    bind,
    dtype,
    getitems,
    is_op,
    number,
    peel,
    rank,
    same,
    shape,
)
from moe_fx.passes.match.activation import Activation, read_activation
from moe_fx.passes.match.dense_weights import Routing, apply_late_score, read_expert_column, read_id_test
from moe_fx.passes.match.experts import narrow_ids


class ExpertsLoopPass(Pass):
    """Unrolled loops over experts (sparse where/index_add, or masked) to ``moe_fx.experts``."""

    name = "experts_loop"
    level = Level.TOLERANCE

    def run(self, ctx: MatchContext) -> None:
        done: set[fx.Node] = set()
        for node in reversed(list(ctx.graph.nodes)):
            if node in done or not _is_accumulation(node):
                continue
            try:
                loop = _read_loop(node, done)
                if loop is None:
                    continue
                if not ctx.allows(self.level):
                    raise Miss("level='bitwise' excludes this rewrite (its level is tolerance)", node)
                _rewrite(ctx, loop)
            except Miss as miss:
                ctx.missed("experts", node, miss)
        ctx.finish_pass()


@dataclass(frozen=True)
class _Term:
    """What one expert adds."""

    expert: int
    routing: Routing
    x: fx.Node
    activation: Activation
    gate: _Linear
    up: _Linear | None
    down: _Linear
    selection: fx.Node | None  # the where() of a sparse term


@dataclass(frozen=True)
class _Linear:
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class _Loop:
    result: fx.Node
    base: fx.Node | None  # what the experts' sum is added to, when not zeros
    terms: list[_Term]


def _is_accumulation(node: fx.Node) -> bool:
    return is_op(node, aten.add, aten.index_add, aten.index_put) and isinstance(node.args[0], fx.Node)


def _split(node: fx.Node) -> list[tuple[Any, Any, Any]]:
    """``(accumulator, term, token index)`` readings of one accumulation."""
    if is_op(node, aten.add):
        left, right = node.args
        if number(node.kwargs.get("alpha", 1)) != 1 or not isinstance(right, fx.Node):
            return []
        return [(left, right, None), (right, left, None)]
    if is_op(node, aten.index_add):
        bound = bind(node)
        plain = bound["dim"] == 0 and number(bound["alpha"]) == 1
        return [(bound["self"], bound["source"], bound["index"])] if plain else []
    into, indices, values = node.args[:3]
    index = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if arg(node, 3):
        return [(into, values, index)]
    if is_op(values, aten.add):  # y[tok] += term
        for old, term in (values.args, reversed(values.args)):
            if is_op(old, aten.index) and old.args[0] is into and list(old.args[1]) == [index]:
                return [(into, term, index)]
    return []


def _read_loop(result: fx.Node, done: set[fx.Node]) -> _Loop | None:
    """The whole chain that ends in ``result``; None when its last link is no expert's term."""
    terms: list[_Term] = []
    links: list[fx.Node] = []
    node: Any = result
    failure: Miss | None = None
    while _is_accumulation(node):
        link = None
        for accumulator, term, index in _split(node):
            try:
                read = _read_term(term, index)
            except Miss as miss:
                failure = miss
                continue
            if read is not None:
                link = (accumulator, read)
                break
        if link is None:
            break
        if node is not result and len(node.users) != _uses_in_chain(links[-1], node):
            failure = Miss("a partial sum over experts has another consumer", node)
            break
        links.append(node)
        node = link[0]
        terms.append(link[1])
    if len(terms) < 2:
        return None
    done.update(links)
    first = _read_term_or_none(node)
    base = None
    if first is not None:
        terms.append(first)
    elif not _is_zeros(node):
        if failure is not None and failure.node is not None:
            raise failure
        base = node
    terms.sort(key=lambda t: t.expert)
    _require_complete(terms, result)
    return _Loop(result, base, terms)


def _uses_in_chain(link: fx.Node, partial: fx.Node) -> int:
    """How many of a partial sum's consumers belong to the next link (``y[tok] += term`` reads it twice)."""
    return sum(user is link or link.args[2:3] == (user,) or _feeds(user, link) for user in partial.users)


def _feeds(user: fx.Node, link: fx.Node) -> bool:
    return is_op(link, aten.index_put) and is_op(user, aten.index) and user in getattr(link.args[2], "args", ())


def _is_zeros(node: Any) -> bool:
    return is_op(node, aten.zeros, aten.zeros_like, aten.new_zeros) or number(node) == 0


def _read_term_or_none(node: Any) -> _Term | None:
    try:
        return _read_term(node, None)
    except Miss:
        return None


def _read_term(node: Any, index: Any) -> _Term | None:
    """One expert's weighted result; None when node is nothing of the kind."""
    node = peel(node, *CASTS, *ALIASES)
    if not is_op(node, aten.mul):
        return None
    for out, weight in (node.args, reversed(node.args)):
        out = peel(out, *CASTS, *ALIASES)
        routed = _read_weight(weight)
        down = _read_linear(out)
        if routed is None or down is None:
            continue
        routing, expert, tokens, selection = routed
        require(index is tokens, "a term is added to other tokens than its weight belongs to", node)
        activation = read_activation(down.x)
        gate = _read_linear(activation.gate)
        up = None if activation.up is None else _read_linear(activation.up)
        require(gate is not None, "an expert's activation is not applied to a projection", activation.gate)
        assert gate is not None
        require(activation.up is None or up is not None, "an expert's up factor is not a projection", activation.up)
        require(up is None or up.x is gate.x, "gate and up of an expert read different rows", gate.node)
        return _Term(expert, routing, _read_rows(gate.x, tokens), activation, gate, up, down, selection)
    return None


def _read_linear(node: Any) -> _Linear | None:
    node = peel(node, *ALIASES)
    if is_op(node, aten.linear):
        bound = bind(node)
        return _Linear(node, peel(bound["input"], *ALIASES), bound["weight"], bound["bias"])
    if is_op(node, aten.mm, aten.matmul) and is_op(node.args[1], aten.t, aten.transpose) and rank(node.args[1]) == 2:
        return _Linear(node, peel(node.args[0], *ALIASES), node.args[1].args[0], None)
    return None


def _read_weight(node: Any) -> tuple[Routing, int, fx.Node | None, fx.Node | None] | None:
    """``(routing, expert, tokens, where)`` of a term's weight; tokens None when every token takes part."""
    column = read_expert_column(node)
    if column is not None:
        return (*column, None, None)
    node = peel(node, *CASTS, *ALIASES, *UNIT_DIMS, *RESHAPES)
    if not is_op(node, aten.index) or len(node.args[1]) != 2:
        return None
    weights = peel(node.args[0], *CASTS, *ALIASES, *UNIT_DIMS)
    tokens, slots = node.args[1]
    for index, other, token_result in ((tokens, slots, 0), (tokens, slots, 1)):
        picked = _read_selection(index, other, token_result)
        if picked is not None and rank(weights) == 2:
            ids, expert, where = picked
            return (weights, ids, None), expert, index, where
    return None


def _read_selection(tokens: Any, slots: Any, token_result: int) -> tuple[fx.Node, int, fx.Node] | None:
    """``(ids, expert, where)`` when tokens and slots are the two results of ``where(ids == e)`` or its transpose."""
    where = getattr(tokens, "args", (None,))[0]
    if not is_op(where, aten.where, aten.nonzero_numpy):
        return None
    unpacked = getitems(where)
    if unpacked.get(token_result) is not tokens or unpacked.get(1 - token_result) is not slots:
        return None
    mask = peel(where.args[0], *CASTS, *ALIASES)
    if token_result == 0:
        test = read_id_test(mask)
        return None if test is None else (*test, where)
    if is_op(mask, aten.t, aten.transpose):
        test = read_id_test(mask.args[0])
        return None if test is None else (*test, where)
    if is_op(mask, aten.select) and arg(mask, 1) == 0:  # one_hot(ids).permute(2, 1, 0)[e]
        permuted, expert = mask.args[0], arg(mask, 2)
        if is_op(permuted, aten.permute) and list(permuted.args[1]) == [2, 1, 0]:
            hot = peel(permuted.args[0], *CASTS)
            if is_op(hot, aten.one_hot):
                return peel(hot.args[0], *CASTS, *ALIASES), int(expert), where
    return None


def _read_rows(node: fx.Node, tokens: fx.Node | None) -> fx.Node:
    """x [T, H] behind an expert's rows."""
    if tokens is None:
        return node
    rows = peel(node, *RESHAPES, *ALIASES)
    require(is_op(rows, aten.index), "an expert's rows are not gathered tokens", node)
    indices = [i for i in rows.args[1] if i is not None]
    require(indices == [tokens], "an expert's rows are other tokens than its weight's", rows)
    require(list(rows.args[1]).index(tokens) == rank(rows.args[0]) - 2, "an expert's rows are not rows of x", rows)
    return peel(rows.args[0], *UNIT_DIMS, *ALIASES)


def _require_complete(terms: list[_Term], result: fx.Node) -> None:
    first = terms[0]
    experts = [term.expert for term in terms]
    require(experts == list(range(len(terms))), f"the loop covers experts {experts}, not 0 to {len(terms) - 1}", result)
    for term in terms[1:]:
        require(term.x is first.x, "experts read different activations", term.gate.node)
        require(term.routing == first.routing, "experts take weights from different routings", term.down.node)
        alike = term.activation.attributes() == first.activation.attributes()
        require(alike, f"expert {term.expert} has another activation than expert 0", term.activation.gate)
        for name in ("gate", "up", "down"):
            mine, theirs = getattr(term, name), getattr(first, name)
            if mine is None:
                continue
            same_form = (mine.bias is None) == (theirs.bias is None)
            shapes = [same(a, b) for a, b in zip(shape(mine.weight), shape(theirs.weight), strict=True)]
            require(same_form and all(shapes), f"expert {term.expert}'s {name} differs in shape or bias", mine.node)


def _rewrite(ctx: MatchContext, loop: _Loop) -> None:
    first, last = loop.terms[0], loop.terms[-1]
    like = loop.result
    weights = apply_late_score(ctx, first.routing, like)
    ids = narrow_ids(ctx, first.routing[1], like)

    def stacked(pick: Any) -> fx.Node | None:
        nodes = [pick(term) for term in loop.terms]
        return None if nodes[0] is None else _stack(ctx, nodes, like)

    args = [
        first.x,
        weights,
        ids,
        stacked(lambda t: t.gate.weight),
        stacked(lambda t: t.down.weight),
        stacked(lambda t: t.gate.bias),
        stacked(lambda t: t.down.bias),
        stacked(lambda t: t.up and t.up.weight),
        stacked(lambda t: t.up and t.up.bias),
    ]
    while args[-1] is None:
        args.pop()
    attributes = first.activation.attributes()
    if dtype(loop.result) != dtype(first.x):
        attributes["out_dtype"] = dtype(loop.result)
    node = ctx.emit_op("experts", args, attributes, like=last.down.node)
    total = node if loop.base is None else ctx.emit(aten.add.Tensor, (loop.base, node), like=like)
    ctx.replace(loop.result, total)
    form = "masked loop" if first.selection is None else "where loop"
    ctx.matched("experts", last.down.node, node, form=form, replaced=[loop.result if loop.base is None else None])
    for term in loop.terms:
        if term.selection is not None:
            _drop_size_asserts(term.selection)


def _stack(ctx: MatchContext, nodes: list[fx.Node], like: fx.Node) -> fx.Node:
    """The 3-D weight that per-expert weights are slices of, or a stack of them."""
    if all(is_op(node, aten.select) and arg(node, 1) == 0 for node in nodes):
        source = nodes[0].args[0]
        whole = [node.args[0] is source and arg(node, 2) == e for e, node in enumerate(nodes)]
        if all(whole) and same(shape(source)[0], len(nodes)):
            return source
    return ctx.emit(aten.stack.default, (list(nodes),), like=like)


def _drop_size_asserts(where: fx.Node) -> None:
    """Erase the bounds checks on a selection's length: nothing else reads it any more."""
    reached, queue = [], [where]
    while queue:
        for user in queue.pop().users:
            if user not in reached:
                reached.append(user)
                queue.append(user)
    checks = {n for n in reached if n.target in (aten._assert_scalar.default, aten.sym_constrain_range.default)}
    leaves = [n for n in reached if not n.users]
    if all(n in checks or _is_dead(n) for n in leaves):
        for node in sorted(checks, reverse=True):
            node.graph.erase_node(node)


def _is_dead(node: fx.Node) -> bool:
    return not node.users and not node.is_impure()
