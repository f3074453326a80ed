"""Drop ops that change no value: aliases, same-shape views, full slices, same-dtype casts, copies, ``* 1.0``, dropout.

Unfused::

    y = alias(x); y = x.view(x.shape); y = x[:, 0:]; y = x.to(x.dtype); y = x.unsqueeze(1).squeeze(1); y = x * 1.0
    y = copy(old, x)        # what is left of an in-place op that wrote a whole tensor, such as dist.all_reduce(old)

Fused::

    y = x

Some of these ops copy: their result has memory of its own, laid out afresh. Where a caller could tell (the result, or a
view of it, leaves the graph) or a later view could (the strides differ), the op stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Pass, Stage
from moe_fx.passes.graph import (
    RESHAPES,
    arg,
    as_slice,
    aten,
    bind,
    dtype,
    is_op,
    normalize_dim,
    number,
    rank,
    reaches,
    same,
    same_shape,
    shape,
    value,
)


class DropNoopsPass(Pass):
    """No-op views, casts, slices, copies, products and dropouts are removed."""

    name = "drop_noops"
    stage = Stage.NORMALIZE
    level = Level.BITWISE

    def run(self, ctx: MatchContext) -> None:
        for node in list(ctx.graph.nodes):
            if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
                continue
            source = _noop_source(node)
            if source is not None and not _is_visible(node, source):
                node.replace_all_uses_with(source)
        ctx.finish_pass()


def _noop_source(node: fx.Node) -> fx.Node | None:
    for packets, read in _RULES:
        if is_op(node, *packets):
            return read(node)
    return None


def _is_visible(node: fx.Node, source: fx.Node) -> bool:
    """Whether something could tell ``source`` from ``node``, although their values are equal."""
    if _is_alias(node):
        # A graph output that is a graph input's alias keeps its own identity for the caller.
        return source.op == "placeholder" and any(user.op == "output" for user in node.users)
    if not _same_strides(value(node), value(source)):
        return True
    # A copy whose memory the caller gets: sharing it with source would show once either is written to.
    return reaches(node, lambda user: user.op == "output", _is_alias, limit=100)


def _is_alias(node: fx.Node) -> bool:
    """Whether the node's result shares memory with its first argument."""
    if node.target is operator.getitem:
        return _is_alias(node.args[0])
    if is_op(node, aten.dropout):
        return True  # An inert one, that is; its schema does not say so.
    if is_op(node, aten.to, aten.type_as) and not _same_placement(node, node.args[0]):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or bind(node).get("copy"):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are known to be laid out alike (the stride of a single element says nothing)."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same(size, 1) or same(one, other) for size, one, other in strides)


def _alias(node: fx.Node) -> fx.Node | None:
    return node.args[0]


def _same_shape_view(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    if same_shape(shape(node), shape(source)):
        return source
    if not is_op(source, *RESHAPES) or not same_shape(shape(node), shape(source.args[0])):
        return None
    # A reshape that copied has another layout, which views to come may need.
    return source.args[0] if _same_strides(value(node), value(source.args[0])) else None


def _full_slice(node: fx.Node) -> fx.Node | None:
    cut = as_slice(node)
    assert cut is not None
    whole = cut.step == 1 and same(cut.start, 0) and same(cut.stop, shape(cut.source)[cut.dim])
    return cut.source if whole else None


def _same_dtype_cast(node: fx.Node) -> fx.Node | None:
    return node.args[0] if _same_placement(node, node.args[0]) else None


def _same_placement(a: fx.Node, b: fx.Node) -> bool:
    return (value(a).dtype, value(a).device, value(a).layout) == (value(b).dtype, value(b).device, value(b).layout)


def _squeezed_unsqueeze(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    if is_op(source, aten.unsqueeze) and isinstance(arg(node, 1), int):
        n = rank(source)
        if normalize_dim(arg(node, 1), n) == normalize_dim(arg(source, 1), n):
            return source.args[0]
    return None


def _overwritten(node: fx.Node) -> fx.Node | None:
    old, new = node.args[0], node.args[1]
    return new if _same_placement(old, new) and same_shape(shape(old), shape(new)) else None


def _unit_factor(node: fx.Node) -> fx.Node | None:
    left, right = node.args[0], node.args[1]
    for tensor, factor in ((left, right), (right, left)):
        if isinstance(factor, (int, float)) and number(factor) == 1 and isinstance(tensor, fx.Node):
            return tensor if dtype(tensor) == dtype(node) else None
    return None


def _unit_divisor(node: fx.Node) -> fx.Node | None:
    divides = isinstance(node.args[1], (int, float)) and node.args[1] == 1 and not node.kwargs
    return node.args[0] if divides and dtype(node.args[0]) == dtype(node) else None


def _inert_dropout(node: fx.Node) -> fx.Node | None:
    bound = bind(node)
    return bound["input"] if not bound["train"] or bound["p"] == 0 else None


_RULES: tuple[tuple[tuple[object, ...], Callable[[fx.Node], fx.Node | None]], ...] = (
    ((aten.alias, aten.detach, aten.lift_fresh), _alias),
    ((*RESHAPES, aten.expand), _same_shape_view),
    ((aten.slice,), _full_slice),
    ((aten._to_copy, aten.to, aten.type_as), _same_dtype_cast),
    ((aten.squeeze.dim,), _squeezed_unsqueeze),
    ((aten.copy,), _overwritten),
    ((aten.mul,), _unit_factor),
    ((aten.div,), _unit_divisor),
    ((aten.dropout,), _inert_dropout),
)
