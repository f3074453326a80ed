"""Reading rotary embeddings: which spelling a subgraph uses, on what tensor, with which tables.

Forms (c, s are the cos and sin tables; the names are those of ``lowering.ops.rope``)::

    half                  x * c + cat(-x[R/2:], x[:R/2]) * s
    interleaved_full      x * c + stack(-x[1::2], x[::2]).flatten(-2) * s
    half_split            cat(x1 * c - x2 * s, x2 * c + x1 * s)       with x1, x2 = halves
    interleaved_to_half   the same with x1, x2 = x[::2], x[1::2]
    interleaved           stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).flatten(-2)
    partial               cat(rope(x[..., :R]), x[..., R:])
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    VIEWS,
    arg,
    as_half,
    as_slice,
    aten,
    dtype,
    is_last_dim,
    is_op,
    number,
    peel,
    rank,
    same,
    same_shape,
    shape,
    value,
)

_CUTS = (aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind)
_PARTS = (*VIEWS, *CASTS, *_CUTS, aten.transpose, aten.permute, operator.getitem)


@dataclass(frozen=True)
class Rope:
    """One rotated tensor.

    Attributes:
        x: the tensor before rotation, full head width.
        result: the rotated tensor.
        cos, sin: tables as they enter the products (broadcast over heads).
        form: see the module's docstring.
        compute_dtype: dtype the rotation is computed in when x is cast for it.
    """

    x: fx.Node
    result: fx.Node
    cos: fx.Node
    sin: fx.Node
    form: str
    compute_dtype: torch.dtype | None = None


def find_ropes(graph: fx.Graph) -> list[Rope]:
    """All rotary embeddings in the graph, each at its outermost result."""
    ropes = []
    for node in graph.nodes:
        rope = _read_product_sum(node) or _read_pair(node)
        if rope is None:
            continue
        rope = _extend_partial(_extend_cast(rope))
        if same_shape(shape(rope.x), shape(rope.result)):
            ropes.append(rope)
    return ropes


def expression(tree: Any) -> Any:
    """A hashable key that is equal for views written twice, as per-tensor helpers do (``freqs[..., 0]``)."""
    if isinstance(tree, (list, tuple)):
        return tuple(expression(item) for item in tree)
    node = peel(tree, *ALIASES)
    is_size = isinstance(node, fx.Node) and isinstance(value(node), torch.SymInt)
    if is_op(node, *_PARTS) or (is_size and node.op == "call_function"):
        return (node.target, expression(node.args), tuple((k, expression(v)) for k, v in sorted(node.kwargs.items())))
    return node


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """``(a, c, b, s)`` of ``a * c + b * s`` in every argument order."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    if not (is_op(left, aten.mul) and is_op(right, aten.mul)) or number(node.kwargs.get("alpha", 1)) != 1:
        return
    for first, second in ((left, right), (right, left)):
        for a, c in (first.args, first.args[::-1]):
            for b, s in (second.args, second.args[::-1]):
                if all(isinstance(n, fx.Node) for n in (a, b, c, s)):
                    yield a, c, b, s


def _read_product_sum(node: fx.Node) -> Rope | None:
    if not is_op(node, aten.add) or not isinstance(node.args[1], fx.Node):
        return None
    for x, cos, rotated, sin in _products(node):
        turned = _read_rotated(rotated)
        if turned is not None and expression(turned[0]) == expression(x) and _is_table(cos, sin, x):
            return Rope(peel(x, *ALIASES), node, cos, sin, turned[1])
    return None


def _read_rotated(node: fx.Node) -> tuple[fx.Node, str] | None:
    """``(x, form)`` of ``rotate_half(x)`` or ``rotate_every_two(x)``."""
    node = peel(node, *ALIASES)
    if is_op(node, aten.cat) and len(node.args[0]) == 2 and is_last_dim(arg(node, 1), node):
        parts, form, order = node.args[0], "half", ("second", "first")
    elif is_op(node, *RESHAPES) and is_op(node.args[0], aten.stack) and is_last_dim(arg(node.args[0], 1), node.args[0]):
        parts, form, order = node.args[0].args[0], "interleaved_full", ("odd", "even")
    else:
        return None
    negated, plain = peel(parts[0], *ALIASES), peel(parts[1], *ALIASES)
    if not is_op(negated, aten.neg):
        return None
    second, first = as_half(negated.args[0]), as_half(plain)
    if second is None or first is None or expression(second[0]) != expression(first[0]):
        return None
    return (second[0], form) if (second[1], first[1]) == order else None


def _read_pair(node: fx.Node) -> Rope | None:
    """``cat`` or ``stack`` of ``(x1 * c - x2 * s, x2 * c + x1 * s)``."""
    if is_op(node, aten.cat) and len(node.args[0]) == 2 and is_last_dim(arg(node, 1), node):
        parts, stacked = node.args[0], False
    elif is_op(node, *RESHAPES) and is_op(node.args[0], aten.stack) and is_last_dim(arg(node.args[0], 1), node.args[0]):
        parts, stacked = node.args[0].args[0], True
    else:
        return None
    parts = list(parts)
    difference, total = parts
    if not (len(parts) == 2 and is_op(difference, aten.sub) and is_op(total, aten.add)):
        return None
    for x1, cos, x2, sin in _products(difference):
        if {*difference.args[0].args} != {x1, cos}:
            continue  # Only x1 * c may stand left of the minus.
        first, second = as_half(x1), as_half(x2)
        if first is None or second is None or expression(first[0]) != expression(second[0]):
            continue
        if not _is_table(cos, sin, x1):
            continue
        for b, c, a, s in _products(total):
            if expression((a, b, c, s)) != expression((x1, x2, cos, sin)):
                continue
            which = (first[1], second[1])
            form = {
                (("first", "second"), False): "half_split",
                (("even", "odd"), False): "interleaved_to_half",
                (("even", "odd"), True): "interleaved",
            }.get((which, stacked))
            if form is not None:
                return Rope(first[0], node, cos, sin, form)
    return None


def _is_table(cos: fx.Node, sin: fx.Node, x: fx.Node) -> bool:
    """Tables that broadcast over x's heads: its rank, one head, its last dimension."""
    if rank(x) != 4 or rank(cos) != 4 or not same_shape(shape(cos), shape(sin)):
        return False
    one_head = same(shape(cos)[1], 1) or same(shape(cos)[2], 1)
    broadcasts = all(same(c, 1) or same(c, n) for c, n in zip(shape(cos)[:3], shape(x)[:3], strict=True))
    return one_head and broadcasts and same(shape(cos)[-1], shape(x)[-1])


def _extend_cast(rope: Rope) -> Rope:
    """Take in ``x.float()`` before and the cast back after."""
    x = rope.x
    if not is_op(x, *CASTS):
        return rope
    narrow = x.args[0]
    result = next(iter(rope.result.users)) if len(rope.result.users) == 1 else None
    if is_op(result, *CASTS) and dtype(result) == dtype(narrow):
        return replace(rope, x=narrow, result=result, compute_dtype=dtype(x))
    return rope


def _extend_partial(rope: Rope) -> Rope:
    """Take in the unrotated rest of the head, and the empty rest that full-width partial code leaves."""
    cat = next((u for u in rope.result.users if is_op(u, aten.cat)), None)
    if cat is None or len(rope.result.users) != 1:
        return rope
    parts: Any = cat.args[0]
    if len(parts) != 2 or parts[0] is not rope.result or not is_last_dim(arg(cat, 1), cat):
        return rope
    rest, rotated = as_slice(peel(parts[1], *ALIASES)), as_slice(rope.x)
    if rest is None or rest.step != 1:
        return rope
    if same(shape(parts[1])[-1], 0):
        return replace(rope, result=cat)
    whole = rest.source
    if rotated is None or expression(rotated.source) != expression(whole) or rotated.step != 1:
        return rope
    adjoins = same(rotated.start, 0) and same(rest.start, rotated.stop) and same(rest.stop, shape(whole)[-1])
    in_last = rest.dim == rotated.dim == rank(whole) - 1
    return replace(rope, x=whole, result=cat) if adjoins and in_last else rope
