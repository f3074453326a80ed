"""Reading routing weights that a model spread over all experts, back to (weights [T, k], ids [T, k]).

Spellings of the dense [T, E] table::

    zeros.scatter(1, ids, w)                              # also sigmoid(full(-inf).scatter(1, ids, logits))
    (one_hot(ids, E) * w.unsqueeze(-1)).sum(1)

and of one expert's column of it::

    table[:, e]                                           # any of the above
    (w * (ids == e)).sum(-1), where(ids == e, w, 0).sum(-1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import MatchContext
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    UNIT_DIMS,
    arg,
    as_slice,
    aten,
    bind,
    dtype,
    is_last_dim,
    is_op,
    number,
    peel,
    rank,
    same,
    same_shape,
    shape,
)

# A routing as read: weights [T, k], ids [T, k], and an op to apply to the weights first (or None).
Routing = tuple[fx.Node, fx.Node, Any]


def read_dense_table(node: Any) -> Routing | None:
    """``node`` [T, E] as routing weights spread over all experts, zero elsewhere."""
    node = peel(node, *CASTS, *ALIASES)
    if is_op(node, aten.sigmoid):
        inner = _read_scatter(node.args[0], float("-inf"))
        return None if inner is None else (*inner[:2], aten.sigmoid.default)
    if is_op(node, aten.scatter, aten.scatter_add):
        return _read_scatter(node, 0.0)
    if is_op(node, aten.sum) and rank(node) == 2:
        return _read_one_hot_sum(node)
    return None


def read_expert_column(node: Any) -> tuple[Routing, int] | None:
    """``node`` ([T] or [T, 1]) as the routing weights of one expert: ``(routing, expert)``."""
    node = peel(node, *CASTS, *ALIASES, *UNIT_DIMS, *RESHAPES)
    if is_op(node, aten.select) and rank(node.args[0]) == 2:
        table, dim, expert = (arg(node, i) for i in range(3))
        if is_op(table, aten.t, aten.transpose):
            table, dim = table.args[0], 1 - dim % 2
        routing = read_dense_table(table) if dim % 2 == 1 else None
        return None if routing is None or not isinstance(expert, int) else (routing, expert)
    cut = as_slice(node)
    if cut is not None and rank(cut.source) == 2 and cut.dim == 1 and same(cut.stop - cut.start, 1):
        routing = read_dense_table(cut.source)
        return None if routing is None or not isinstance(cut.start, int) else (routing, cut.start)
    if is_op(node, aten.sum) and is_last_dim(arg(node, 1), node.args[0]):
        masked = node.args[0]
        if is_op(masked, aten.mul) and isinstance(masked.args[1], fx.Node):
            for weights, mask in (masked.args, reversed(masked.args)):
                picked = read_id_test(mask)
                if picked is not None and same_shape(shape(weights), shape(picked[0])):
                    return (weights, picked[0], None), picked[1]
        if is_op(masked, aten.where) and number(arg(masked, 2)) == 0:
            picked = read_id_test(masked.args[0])
            if picked is not None:
                return (masked.args[1], picked[0], None), picked[1]
        if is_op(masked, aten.masked_fill) and number(masked.args[2]) == 0:
            picked = read_id_test(masked.args[1], negated=True)
            if picked is not None:
                return (masked.args[0], picked[0], None), picked[1]
    return None


def read_id_test(node: Any, negated: bool = False) -> tuple[fx.Node, int] | None:
    """``ids == e`` (``ids != e`` when negated) as ``(ids, e)``."""
    node = peel(node, *CASTS, *ALIASES)
    if is_op(node, aten.bitwise_not, aten.logical_not):
        return read_id_test(node.args[0], not negated)
    if is_op(node, aten.ne if negated else aten.eq):
        expert = number(arg(node, 1))
        ids = peel(node.args[0], *ALIASES)
        if expert is not None and rank(ids) == 2 and not dtype(ids).is_floating_point:
            return ids, int(expert)
    return None


def apply_late_score(ctx: MatchContext, routing: Routing, like: fx.Node) -> fx.Node:
    """The routing weights with the op that the model applied after spreading them."""
    weights, _, score = routing
    return weights if score is None else ctx.emit(score, (weights,), like=like)


def _read_scatter(node: Any, fill: float) -> Routing | None:
    node = peel(node, *CASTS, *ALIASES)
    if not is_op(node, aten.scatter.src, aten.scatter_add.default) or rank(node) != 2:
        return None
    if is_op(node, aten.scatter_add) and fill != 0:
        return None
    # A repeated id is overwritten by scatter, but added up by the op: only a selection has none.
    if is_op(node, aten.scatter) and not _is_selection(arg(node, 2)):
        return None
    bound = bind(node)
    into, weights = peel(bound["self"], *CASTS, *ALIASES), bound.get("src")
    zeros = fill == 0 and is_op(into, aten.zeros, aten.zeros_like, aten.new_zeros)
    filled = is_op(into, aten.full, aten.full_like) and number(arg(into, 1)) == fill
    if not (zeros or filled or number(into) == fill) or not isinstance(weights, fx.Node):
        return None
    if not is_last_dim(bound["dim"], node) or not same_shape(shape(weights), shape(bound["index"])):
        return None
    return weights, bound["index"], None


def _is_selection(ids: Any) -> bool:
    """Whether ids are the distinct picks of a top-k (or of the canonical route)."""
    ids = peel(ids, *CASTS, *ALIASES)
    return is_op(ids, operator.getitem) and is_op(ids.args[0], aten.topk, torch.ops.moe_fx.route)


def _read_one_hot_sum(node: fx.Node) -> Routing | None:
    product = node.args[0]
    if not is_op(product, aten.mul) or rank(product) != 3 or [d % 3 for d in _dims(node)] != [1]:
        return None
    for hot, weights in (product.args, reversed(product.args)):
        hot = peel(hot, *CASTS, *ALIASES)
        weights = peel(weights, *CASTS, *ALIASES)
        if is_op(hot, aten.one_hot) and is_op(weights, aten.unsqueeze) and is_last_dim(arg(weights, 1), weights):
            return weights.args[0], hot.args[0], None
    return None


def _dims(node: fx.Node) -> list[int]:
    dim = arg(node, 1)
    return list(dim) if isinstance(dim, (list, tuple)) else [dim]
