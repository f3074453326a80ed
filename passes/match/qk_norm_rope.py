"""Query/key RMSNorm followed by rope -> ``moe_fx.qk_norm_rope``.

Unfused (Qwen3; others normalise the full width before the view, or rotate a part of the head)::

    q = rms_norm(q_proj(x).view(B, S, Nq, D), q_weight).transpose(1, 2)
    k = rms_norm(k_proj(x).view(B, S, Nk, D), k_weight).transpose(1, 2)
    q = q * cos + rotate_half(q) * sin
    k = k * cos + rotate_half(k) * sin

Fused::

    q, k = moe_fx.qk_norm_rope(q_proj(x).view(...), k_proj(x).view(...), q_weight, k_weight, cos, sin, eps, ...)

Works on ``moe_fx.rms_norm`` nodes, so every spelling of the norm is covered. A norm that follows the rope, or has none
beside it, stays a norm.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    RESHAPES,
    arg,
    as_slice,
    aten,
    is_op,
    peel,
    rank,
    same,
    same_shape,
    shape,
)
from moe_fx.passes.match.rope_forms import Rope, find_ropes


@dataclass(frozen=True)
class _Branch:
    """A query or key branch: projection -> norm -> rope."""

    rope: Rope
    norm: fx.Node
    x: fx.Node  # [B, S, N, D] when token_major, or [B, N, S, D]
    kind: str  # "head" or "full"
    transposed: bool  # the rope acts on [B, N, S, D]
    token_major: bool  # x is [B, S, N, D]
    bias: fx.Node | None
    root: fx.Node  # activation that the projection reads

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a pair of branches must share."""
        return (
            peel(self.rope.cos),
            peel(self.rope.sin),
            self.rope.form,
            self.rope.compute_dtype,
            self.kind,
            self.transposed,
            self.norm.args[2],
            tuple(sorted(self.norm.kwargs.items(), key=str)),
            self.root,
        )


class QkNormRopePass(Pass):
    """Per-head or full-width q/k RMSNorm + rope (full, partial, interleaved) to ``moe_fx.qk_norm_rope``."""

    name = "qk_norm_rope"
    level = Level.BITWISE
    requires = ("rms_norm",)

    def run(self, ctx: MatchContext) -> None:
        branches: dict[tuple[Any, ...], list[_Branch]] = defaultdict(list)
        for rope in find_ropes(ctx.graph):
            try:
                branch = _read_branch(rope)
            except Miss as miss:
                ctx.missed("qk_norm_rope", rope.result, miss)
                continue
            if branch is not None:
                branches[branch.signature].append(branch)
        for group in branches.values():
            if len(group) != 2:
                alone = "no matching key or query branch shares its projection input, cos and sin"
                for branch in group:
                    ctx.missed("qk_norm_rope", branch.rope.result, Miss(alone, branch.norm))
                continue
            _rewrite(ctx, group[0], group[1])
        ctx.finish_pass()


def _is_norm(node: Any) -> bool:
    return is_op(node, torch.ops.moe_fx.rms_norm)


def _read_branch(rope: Rope) -> _Branch | None:
    """The branch that ends in ``rope``; None when its tensor is not freshly normalised (no candidate)."""
    node, transposed = peel(rope.x, *ALIASES), False
    if is_op(node, aten.transpose) and {d % 4 for d in node.args[1:3]} == {1, 2}:
        node, transposed = peel(node.args[0], *ALIASES), True
    kind, flat = "head", node
    if is_op(node, *RESHAPES):
        flat, kind = peel(node.args[0], *ALIASES), "full"
    bias = None
    if is_op(flat, aten.add) and _is_norm(flat.args[0]) and isinstance(flat.args[1], fx.Node):
        bias, flat = flat.args[1], flat.args[0]
    if not _is_norm(flat):
        return None
    if kind == "full" and same_shape(shape(flat)[-1:], shape(node)[-1:]):
        kind = "head"  # The reshape only splits leading dimensions.
        require(rank(flat) == 4, "the norm is per head over a tensor that is not [B, S, N, D]", flat)
    head_axis = 1 if same(shape(rope.cos)[1], 1) and not same(shape(rope.cos)[2], 1) else None
    head_axis = _head_axis(rope, head_axis, transposed)
    for inner in (flat, node, rope.x):
        require(
            all(_leads_to(user, rope) for user in inner.users),
            "the normalised tensor has a consumer besides the rope",
            inner,
        )
    require(bias is None or rank(bias) == 1, "the norm's bias is not over the head", flat)
    if transposed:
        require(head_axis == 1, "cos and sin do not broadcast over the head dimension", rope.result)
    token_major = transposed or head_axis == 2
    require(kind == "head" or token_major, "the full-width norm's heads do not follow tokens", flat)
    return _Branch(rope, flat, flat.args[0], kind, transposed or head_axis == 1, token_major, bias, _root(flat))


def _head_axis(rope: Rope, guess: int | None, transposed: bool) -> int:
    if guess is not None:
        return guess
    if same(shape(rope.cos)[1], 1) and same(shape(rope.cos)[2], 1):
        return 1 if transposed else 2  # One token: both axes broadcast.
    return 1 if same(shape(rope.cos)[1], 1) else 2


def _leads_to(user: fx.Node, rope: Rope) -> bool:
    """Whether a consumer is part of the rotation (within the few ops one takes)."""
    frontier = [user]
    for _ in range(8):
        if rope.result in frontier or not frontier:
            break
        frontier = [u for n in frontier for u in (n.users if n is not rope.result else ())]
        if rope.result in frontier:
            return True
    return rope.result in frontier


def _root(norm: fx.Node) -> fx.Node:
    """The activation behind the branch's projection: queries and keys of one layer share it."""
    node = norm.args[0]
    for _ in range(10):
        node = peel(node)
        if is_op(node, aten.linear, aten.mm, aten.matmul, aten.addmm):
            return node.args[1] if is_op(node, aten.addmm) else node.args[0]
        cut = as_slice(node)
        if cut is not None:
            node = cut.source
        elif is_op(node, aten.transpose, aten.add, aten.select):
            node = node.args[0]
        elif isinstance(node, fx.Node) and node.op == "call_function" and not node.all_input_nodes:
            return node
        else:
            return node
    return node


def _rewrite(ctx: MatchContext, first: _Branch, second: _Branch) -> None:
    q, k = _order(first, second)
    head_axis = 1 if q.transposed else 2
    cos, sin = (_drop_head_dim(ctx, table, head_axis, q.rope.result) for table in (q.rope.cos, q.rope.sin))
    args = (_heads(ctx, q), _heads(ctx, k), q.norm.args[1], k.norm.args[1], cos, sin, q.norm.args[2])
    attributes = {
        **q.norm.kwargs,
        "norm": q.kind,
        "rope": q.rope.form,
        "rope_dtype": q.rope.compute_dtype,
        "layout": "bnsd" if q.transposed else "bsnd",
        "q_bias": q.bias,
        "k_bias": k.bias,
    }
    attributes.pop("out_dtype", None)
    node = ctx.emit_op("qk_norm_rope", args, {n: v for n, v in attributes.items() if v is not None}, like=q.norm)
    for index, branch in enumerate((q, k)):
        ctx.replace(branch.rope.result, ctx.output_of(node, index))
    merged = {branch.norm.name for branch in (q, k)}
    ctx.sites[:] = [s for s in ctx.sites if not (s.kind == "norm" and s.node in merged)]
    width = "partial " if not same(shape(q.rope.x)[-1], _rotary_dim(q.rope)) else ""
    form = f"{q.kind} norm, {width}{q.rope.form} rope"
    ctx.matched("qk_norm_rope", q.norm, node, form=form, replaced=[q.rope.result, k.rope.result])


def _rotary_dim(rope: Rope) -> Any:
    table = shape(rope.cos)[-1]
    return table if rope.form in ("half", "interleaved_full") else 2 * table


def _order(first: _Branch, second: _Branch) -> tuple[_Branch, _Branch]:
    """Queries have at least as many heads; among equals, the one projected first."""
    axis = 1 if first.transposed else 2
    heads = [shape(b.rope.result)[axis] for b in (first, second)]
    if all(isinstance(h, int) for h in heads) and heads[0] < heads[1]:
        return second, first
    return (first, second) if heads[0] != heads[1] or first.norm < second.norm else (second, first)


def _heads(ctx: MatchContext, branch: _Branch) -> fx.Node:
    """The norm's input as [B, S, N, D]."""
    x = branch.x
    if branch.kind == "full":
        view = shape(branch.rope.x)
        heads = view[1] if branch.transposed else view[2]
        return ctx.emit(aten.unflatten.int, (x, -1, [heads, view[3]]), like=branch.norm)
    if not branch.token_major:
        return ctx.emit(aten.transpose.int, (x, 1, 2), like=branch.norm)
    return x


def _drop_head_dim(ctx: MatchContext, table: fx.Node, head_axis: int, like: fx.Node) -> fx.Node:
    source = peel(table, *ALIASES)
    if is_op(source, aten.unsqueeze) and arg(source, 1) % rank(source) == head_axis:
        return source.args[0]
    return ctx.emit(aten.squeeze.dim, (table, head_axis), like=like)
