"""Experts over 3-D weights: dispatch, gate/up, activation, down, weighted combine -> ``moe_fx.experts``.

Unfused, one of (transformers 5.x ``grouped_mm`` and ``batched_mm``, gpt-fast, torchtitan)::

    sorted, perm = sort(ids.view(-1))
    h   = _grouped_mm(x[perm // k], w13.transpose(-2, -1), cumsum(histc(sorted)))
    h   = silu(h[:, :I]) * h[:, I:]
    out = _grouped_mm(h, w2.transpose(-2, -1), offsets) * weights.view(-1)[perm].unsqueeze(-1)
    y   = out[inverse(perm)].view(T, k, H).sum(1)

    h   = bmm(w13[ids.view(-1)], x.repeat_interleave(k, 0).unsqueeze(-1)).squeeze(-1)
    ...
    y   = (bmm(w2[ids.view(-1)], act(h)) * weights.view(-1, 1)).view(T, k, H).sum(1)

    y   = einsum("tao,tio,ta->ti", ...)

Fused::

    y = moe_fx.experts(x, weights, ids, w13, w2, b13, b2, act=..., layout=...)

Matmuls are read by ``expert_matmul``, rows and weights by ``pairs``, activations by ``activation``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    UNIT_DIMS,
    arg,
    aten,
    describe,
    dtype,
    is_op,
    number,
    only_user,
    peel,
    rank,
    same,
    same_shape,
    shape,
    sources,
)
from moe_fx.passes.match.activation import Activation, read_activation
from moe_fx.passes.match.expert_matmul import ExpertMatmul, is_expert_matmul, read_expert_matmul
from moe_fx.passes.match.pairs import TOKEN_MAJOR, Order, PairSpace, Rows


class ExpertsPass(Pass):
    """Experts over 3-D weights (grouped_mm, batched_mm, gathered einsum forms) to ``moe_fx.experts``."""

    name = "experts"
    level = Level.TOLERANCE

    def run(self, ctx: MatchContext) -> None:
        space = PairSpace(_expert_counts(ctx.graph))
        read: dict[fx.Node, ExpertMatmul] = {}
        failed: dict[fx.Node, Miss] = {}
        for node in list(ctx.graph.nodes):
            if is_expert_matmul(node):
                try:
                    read[node] = read_expert_matmul(node, space)
                except Miss as failure:
                    failed[node] = failure
        feeders = {node: _feeders(node, read, failed) for node in (*read, *failed)}
        fed = {up for ups in feeders.values() for up in ups}
        for down in (*read, *failed):
            if feeders[down]:
                self._try_site(ctx, space, down, feeders[down], read, failed)
            elif down not in fed:
                miss = failed.get(down) or Miss("no second expert matmul (down projection) follows this one", down)
                ctx.missed("experts", down, miss)
        ctx.finish_pass()

    def _try_site(
        self,
        ctx: MatchContext,
        space: PairSpace,
        down: fx.Node,
        ups: list[fx.Node],
        read: dict[fx.Node, ExpertMatmul],
        failed: dict[fx.Node, Miss],
    ) -> None:
        try:
            for node in (*ups, down):
                if node in failed:
                    raise failed[node]
            require(len(ups) <= 2, f"{len(ups)} expert matmuls feed one down projection", down)
            site = _read_site(space, read[down], [read[up] for up in ups])
            _require_private(site)
            if not ctx.allows(self.level):
                raise Miss("level='bitwise' excludes this rewrite (its level is tolerance)", down)
        except Miss as miss:
            ctx.missed("experts", down, miss)
            return
        _rewrite(ctx, site)


@dataclass(frozen=True)
class _Experts:
    """What was read of one MoE block's experts."""

    ups: tuple[ExpertMatmul, ...]
    down: ExpertMatmul
    activation: Activation
    rows: Rows
    ids: fx.Node
    weights: fx.Node
    weights_cast: torch.dtype | None
    weight_on: str
    result: fx.Node


def _expert_counts(graph: fx.Graph) -> set[int]:
    """First sizes of the graph's 3-D inputs: every number of experts that a weight in it can have."""
    sizes = [shape(n)[0] for n in graph.find_nodes(op="placeholder") if rank(n) == 3]
    return {size for size in sizes if isinstance(size, int)}


def _feeders(node: fx.Node, read: dict[fx.Node, ExpertMatmul], failed: dict[fx.Node, Miss]) -> list[fx.Node]:
    """Expert matmuls whose products reach ``node``'s rows through elementwise ops."""

    def stop(n: fx.Node) -> bool:
        return n in read or n in failed or n.op != "call_function" or is_op(n, aten.linear, aten.sum, aten.index_add)

    rows = read[node].rows if node in read else node.args[0]
    if not isinstance(rows, fx.Node):
        return []
    found = [n for n in (rows, *sources(rows, stop)) if n in read or n in failed]
    return sorted(set(found))


def _read_site(space: PairSpace, down: ExpertMatmul, ups: list[ExpertMatmul]) -> _Experts:
    activation = read_activation(_skip_fills(down.rows, space))
    gate, up = _assign(activation, ups, space)
    rows, weights_in = _read_rows(gate, space)
    order = rows.order
    if up is not None:
        require(_read_rows(up, space) == (rows, weights_in), "gate and up multiply different rows", up.node)
        require(up.transposed == gate.transposed, "gate and up weights are stored in different layouts", up.node)
    for matmul in (*ups, down):
        require(matmul.ids is gate.ids, "gate/up and down are steered by different expert ids", matmul.node)
    require(down.transposed == gate.transposed, "gate/up and down weights are stored in different layouts", down.node)
    require(order.ids in (None, gate.ids), "rows are sorted by other ids than the grouped matmul's", gate.node)
    result, weights_out = _read_combine(space, down, order, shape(gate.ids)[1])
    clamped = any(matmul.clamped for matmul in (*ups, down))
    zeroed = clamped and any(_fills_sentinels(n, space) for n in sources(result, lambda n: n is gate.node))
    require(not clamped or zeroed, "ids are clamped into range, but what they select is not zeroed", down.node)
    require(
        (weights_in is None) != (weights_out is None),
        "no routing weights are applied" if weights_in is None else "routing weights are applied twice",
        result,
    )
    applied = weights_in or weights_out
    assert applied is not None
    weights, cast = applied
    require(same_shape(shape(weights), shape(gate.ids)), "routing weights and expert ids differ in shape", result)
    require(same(shape(rows.x)[0], shape(gate.ids)[0]), "rows and expert ids count different tokens", gate.node)
    ordered = (gate,) if up is None else (gate, up)
    where = "output" if weights_in is None else "input"
    return _Experts(ordered, down, activation, rows, gate.ids, weights, cast, where, result)


def _assign(
    activation: Activation, ups: list[ExpertMatmul], space: PairSpace
) -> tuple[ExpertMatmul, ExpertMatmul | None]:
    """Which matmul made the gate and which the up factor."""

    def source(node: fx.Node) -> Any:
        inner = None
        while inner is not node:
            inner, node = node, peel(_skip_fills(node, space), *CASTS, *ALIASES, *UNIT_DIMS)
        return node

    by_out = {source(up.out): up for up in ups}

    def maker(node: fx.Node) -> ExpertMatmul:
        made = source(node)
        if made not in by_out:
            raise Miss("the activation's input is not an expert matmul's result", made)
        return by_out[made]

    gate = maker(activation.gate)
    up = None if activation.up is None else maker(activation.up)
    require(len(ups) == (1 if up is None else 2), "not all products feed the activation", gate.node)
    return gate, up


def _skip_fills(node: Any, space: PairSpace) -> Any:
    """Through zero fills of sentinel rows: the op skips them by their ids."""
    while is_op(node, *ALIASES) or _fills_sentinels(node, space):
        node = node.args[0]
    return node


def _fills_sentinels(node: Any, space: PairSpace) -> bool:
    mask = space.out_of_range(node.args[1]) if is_op(node, aten.masked_fill) else None
    return mask is not None and space.fills_sentinels(node, mask.order)


def _read_rows(matmul: ExpertMatmul, space: PairSpace) -> tuple[Rows, tuple[fx.Node, torch.dtype | None] | None]:
    """``(rows, routing weights on the input)`` of a gate or up matmul."""
    node, weights = _skip_fills(matmul.rows, space), None
    if is_op(node, aten.mul):
        for rows, factor in (node.args, reversed(node.args)):
            weights = _read_weights(factor, space)
            if weights is not None:
                node = _skip_fills(rows, space)
                break
    top_k = shape(matmul.ids)[1]
    if rank(matmul.out) == 3 or matmul.form == "einsum":
        x = _broadcast_over_slots(node)
        return Rows(x, TOKEN_MAJOR, top_k), weights and weights[:2]
    found = space.rows(node)
    if found is None:
        raise Miss("the expert matmul's rows are not tokens repeated per selected expert", node)
    require(same(found.top_k, top_k), "tokens are repeated other than k times", node)
    if matmul.form == "grouped_mm":
        require(found.order.perm is not None, "the grouped matmul's rows are not sorted by expert", node)
    if weights is None:
        return found, None
    root, cast, order = weights
    require(order in (None, found.order), "weights and rows are in different orders", node)
    return found, (root, cast)


def _broadcast_over_slots(node: fx.Node) -> fx.Node:
    """x [T, H] of ``x``, ``x[:, None]`` or its expansion to [T, k, H]."""
    x = peel(node, aten.expand, *ALIASES)
    if is_op(x, aten.unsqueeze) and rank(x) == 3:
        require(arg(x, 1) % 3 == 1, "rows are broadcast over another dimension than the slots", x)
        x = x.args[0]
    require(rank(x) == 2, "gathered experts multiply rows that are not [T, H]", node)
    return x


def _read_weights(node: Any, space: PairSpace) -> tuple[fx.Node, torch.dtype | None, Order | None] | None:
    """Routing weights per row as ``(root [T, k], cast, order)``; order None for a [T, k, 1] grid."""
    if not isinstance(node, fx.Node) or rank(node) < 1 or not dtype(node).is_floating_point:
        return None
    if rank(node) == 3 and same(shape(node)[2], 1):
        cast = None
        while is_op(node, *CASTS, *UNIT_DIMS, *ALIASES, *RESHAPES) and rank(node) != 2:
            if is_op(node, *CASTS):
                cast = cast or dtype(node)
            node = node.args[0]
        return (node, cast, None) if rank(node) == 2 else None
    pairs = space.pairs(node)
    if pairs is None:
        return None
    return pairs.root, pairs.cast, pairs.order


def _read_combine(
    space: PairSpace, down: ExpertMatmul, order: Order, top_k: Any
) -> tuple[fx.Node, tuple[fx.Node, torch.dtype | None] | None]:
    """Follow the down product to the sum over slots: ``(result [T, H], routing weights on the output)``."""
    node, weights = down.out, None
    for _ in range(16):
        user = only_user(node)
        if user is None:
            raise Miss(f"the product has {len(node.users)} consumers before the sum over experts", node)
        if is_op(user, *ALIASES, *UNIT_DIMS) or space.fills_sentinels(user, order):
            node = user
        elif is_op(user, *CASTS):
            wide = dtype(user) in (dtype(down.out), torch.float32, torch.float64)
            require(wide, f"the experts' results are cast to {dtype(user)} before they are summed", user)
            node = user
        elif is_op(user, aten.mul) and weights is None:
            factor = user.args[1] if user.args[0] is node else user.args[0]
            found = _read_weights(factor, space)
            if found is None:
                raise Miss("the product is multiplied by something other than the routing weights", user)
            root, cast, weight_order = found
            require(weight_order in (None, order), "routing weights are in another order than the rows", user)
            weights, node = (root, cast), user
        elif is_op(user, aten.index, aten.index_select) and user.args[0] is node:
            index = user.args[1][0] if is_op(user, aten.index) else arg(user, 2)
            permutation = space.permutation(index)
            undoes = permutation is not None and permutation.inverse and permutation.order == order
            require(undoes, "rows are not put back by the inverse of the sort", user)
            node, order = user, TOKEN_MAJOR
        elif is_op(user, *RESHAPES) and rank(user) in (2, 3):
            node = user
        elif is_op(user, aten.sum):
            return _after_sum(user, node, order, top_k), weights
        elif _undoes_by_writing(space, user, node, order):
            node, order = user, TOKEN_MAJOR
        elif is_op(user, aten.index_add, aten.scatter_add, aten.index_put):
            return _read_scatter(space, user, node, order, top_k), weights
        elif is_op(user, aten.einsum, aten.bmm, aten.matmul):
            return _read_contraction(user, node, order, weights)
        else:
            raise Miss(f"{describe(user)} stands between the down projection and the sum over experts", user)
    raise Miss("no sum over the selected experts was found", node)


def _undoes_by_writing(space: PairSpace, user: fx.Node, rows: fx.Node, order: Order) -> bool:
    """``out[perm] = rows``: the sort undone by a scattered write of every row."""
    if not is_op(user, aten.index_put) or arg(user, 3) or user.args[2] is not rows or len(user.args[1]) != 1:
        return False
    permutation = space.permutation(user.args[1][0])
    return permutation is not None and not permutation.inverse and permutation.order == order


def _after_sum(user: fx.Node, summed: fx.Node, order: Order, top_k: Any) -> fx.Node:
    grid = rank(summed) == 3 and same(shape(summed)[1], top_k)
    require(grid and order == TOKEN_MAJOR, "the sum is not over the k slots of each token", user)
    dim = arg(user, 1)
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    require([d % 3 for d in dims] == [1], "the sum is not over the slot dimension", user)
    keepdim = arg(user, 2)
    require(not keepdim, "the sum keeps the slot dimension", user)
    return _absorb_cast(user)


def _read_scatter(space: PairSpace, user: fx.Node, rows: fx.Node, order: Order, top_k: Any) -> fx.Node:
    """``zeros.index_add(0, tokens, rows)`` and its scatter_add and accumulating index_put spellings."""
    if is_op(user, aten.index_put):
        into, index, accumulates = user.args[0], user.args[1][0], bool(arg(user, 3))
        source = user.args[2]
    else:
        into, index, source = user.args[0], arg(user, 2), arg(user, 3)
        accumulates = arg(user, 1) == 0
    require(accumulates and source is rows, "rows are not added up over tokens", user)
    tokens = space.tokens(peel(index, aten.expand, aten.repeat, *UNIT_DIMS, *RESHAPES))
    own = tokens is not None and tokens.order == order and same(tokens.top_k, top_k)
    require(own, "rows are added to other tokens than they came from", user)
    require(number(user.kwargs.get("alpha", 1)) == 1, "rows are scaled as they are added up", user)
    if number(into) != 0 and not is_op(into, aten.zeros, aten.zeros_like, aten.new_zeros):
        raise Miss("rows are added onto something other than zeros", user)
    return _absorb_cast(user)


def _read_contraction(
    user: fx.Node, node: fx.Node, order: Order, weights: Any
) -> tuple[fx.Node, tuple[fx.Node, torch.dtype | None] | None]:
    """``einsum("tai,ta->ti", rows, weights)``: weigh and sum in one."""
    require(weights is None and is_op(user, aten.einsum), "an unknown contraction of the experts' results", user)
    operands = list(user.args[1])
    inputs, _, result = str(user.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if operands[0] is not node:
        operands, terms = operands[::-1], terms[::-1]
    good = len(terms) == 2 and len(terms[0]) == 3 and terms[1] == terms[0][:2] and result == terms[0][0] + terms[0][2]
    require(good, f"einsum {user.args[0]!r} is no weighted sum over slots", user)
    require(order == TOKEN_MAJOR and rank(operands[1]) == 2, "slots are summed out of order", user)
    return _absorb_cast(user), (operands[1], None)


def _absorb_cast(node: fx.Node) -> fx.Node:
    user = only_user(node)
    if is_op(user, *CASTS) and dtype(user).is_floating_point:
        return user
    return node


def _require_private(site: _Experts) -> None:
    """No product or later intermediate may be used outside the site: it would have to be computed twice."""
    ancestors = set(sources(site.result, lambda n: n in {up.node for up in site.ups}, limit=400))
    region = {up.node for up in site.ups}
    for node in sorted(ancestors):
        if any(parent in region for parent in node.all_input_nodes):
            region.add(node)
    for node in region:
        for user in node.users:
            if user not in region and user is not site.result:
                raise Miss(f"an intermediate of the experts has another consumer, {describe(user)}", node)


def _rewrite(ctx: MatchContext, site: _Experts) -> None:
    gate, up = site.ups[0], site.ups[1] if len(site.ups) == 2 else None
    anchor = site.down.node
    weights = site.weights
    if site.weights_cast is not None and site.weights_cast != dtype(weights):
        weights = ctx.emit(aten._to_copy.default, (weights,), {"dtype": site.weights_cast}, like=anchor)
    ids = narrow_ids(ctx, site.ids, anchor)
    x = site.rows.x
    if site.rows.cast not in (None, dtype(x)):
        x = ctx.emit(aten._to_copy.default, (x,), {"dtype": site.rows.cast}, like=anchor)
    args = [x, weights, ids, gate.weight, site.down.weight, gate.bias, site.down.bias]
    if up is not None:
        args += [up.weight, up.bias]
    while args[-1] is None:
        args.pop()
    attributes = site.activation.attributes() | {"transposed": gate.transposed, "weight_on": site.weight_on}
    if dtype(site.result) != dtype(x):
        attributes["out_dtype"] = dtype(site.result)
    node = ctx.emit_op("experts", args, attributes, like=anchor)
    ctx.replace(site.result, node)
    ctx.matched("experts", anchor, node, form=site.down.form, replaced=[site.result])


def narrow_ids(ctx: MatchContext, ids: fx.Node, like: fx.Node) -> fx.Node:
    """int32 ids; straight from ``route`` when the ids are its result widened for eager consumers."""
    if is_op(ids, aten._to_copy) and dtype(ids.args[0]) == torch.int32:
        return ids.args[0]
    if dtype(ids) == torch.int32:
        return ids
    return ctx.emit(aten._to_copy.default, (ids,), {"dtype": torch.int32}, like=like)
