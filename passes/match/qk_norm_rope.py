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

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    VIEWS,
    arg,
    as_slice,
    aten,
    is_collective,
    is_op,
    peel,
    rank,
    same,
    same_shape,
    shape,
)
from moe_fx.passes.match.rope_forms import Rope, expression, find_ropes


@dataclass(frozen=True)
class _Branch:
    """A query or key branch: projection -> norm -> rope."""

    rope: Rope
    norm: fx.Node
    kind: str  # "head" or "full"
    heads_first: bool  # the rope acts on [B, N, S, D], not [B, S, N, D]
    transposed: bool  # between norm and rope
    reshape: fx.Node | None  # between norm and rope, before the transpose
    bias: fx.Node | None
    root: fx.Node  # activation that the projection reads

    @property
    def one_head(self) -> bool:
        """Whether head and full width are the same."""
        return same(shape(self.rope.x)[1 if self.heads_first else 2], 1)

    @property
    def signature(self) -> dict[str, Any]:
        """What a pair of branches must share, by name."""
        return {
            "projection input": self.root,
            "cos": expression(peel(self.rope.cos)),
            "sin": expression(peel(self.rope.sin)),
            "rope form": self.rope.form,
            "rotation dtype": self.rope.compute_dtype,
            "layout": self.heads_first,
            "eps": self.norm.args[2],
            "norm form": tuple(sorted(self.norm.kwargs.items(), key=str)),
        }


class QkNormRopePass(Pass):
    """Per-head or full-width q/k RMSNorm + rope (full, partial, interleaved) to ``moe_fx.qk_norm_rope``."""

    name = "qk_norm_rope"
    level = Level.BITWISE
    requires = ("rms_norm",)

    def run(self, ctx: MatchContext) -> None:
        groups: dict[tuple[Any, ...], list[_Branch]] = defaultdict(list)
        for rope in find_ropes(ctx.graph):
            try:
                branch = _read_branch(rope)
            except Miss as miss:
                ctx.missed("qk_norm_rope", rope.result, miss)
                continue
            if branch is not None:
                groups[tuple(branch.signature.values())].append(branch)
        single = [branch for group in groups.values() if len(group) != 2 for branch in group]
        for group in groups.values():
            try:
                require(len(group) == 2, _why_single(group[0], single), group[0].norm)
                _rewrite(ctx, group[0], group[1])
            except Miss as miss:
                for branch in group:
                    ctx.missed("qk_norm_rope", branch.rope.result, miss)
        ctx.finish_pass()


def _why_single(branch: _Branch, others: list[_Branch]) -> str:
    """What keeps a branch from the one beside it."""
    beside = [other for other in others if other.root is branch.root and other is not branch]
    for other in beside:
        for name, ours in branch.signature.items():
            if other.signature[name] != ours:
                return f"queries and keys differ in {name}"
    if beside:
        return f"{1 + len(beside)} branches are normalised and rotated alike, not one for queries and one for keys"
    return "no other branch of its projection's input is normalised and rotated"


def _is_norm(node: Any) -> bool:
    return is_op(node, torch.ops.moe_fx.rms_norm)


def _read_branch(rope: Rope) -> _Branch | None:
    """The branch that ends in ``rope``; None when its tensor is not freshly normalised (no candidate)."""
    node = peel(rope.x, *ALIASES)
    transposed = _swaps_heads(node)
    if transposed:
        node = peel(node.args[0], *ALIASES)
    reshape = node if is_op(node, *RESHAPES) else None
    inner = node if reshape is None else peel(reshape.args[0], *ALIASES)
    norm, bias = inner, None
    if is_op(inner, aten.add) and _is_norm(inner.args[0]) and isinstance(inner.args[1], fx.Node):
        norm, bias = inner.args
    if not _is_norm(norm):
        return None
    require(_ends_in(norm, rope), "the normalised tensor has a consumer besides the rope", norm)
    require("out_dtype" not in norm.kwargs, "the norm's result is not rounded to its input's dtype", norm)
    if bias is not None:
        require(rank(bias) == 1, "the norm's bias is not over the normalised dimension", inner)
    heads_first = _has_heads_first(rope, norm, transposed)
    require(heads_first or not transposed, "cos and sin do not broadcast over the head dimension", rope.result)
    n_heads, head_dim = shape(node)[-2:]
    width = shape(norm)[-1]
    kind = "head" if same(width, head_dim) else "full"
    if kind == "full":
        whole_heads = same(n_heads * head_dim, width) and transposed == heads_first
        require(whole_heads, "the view behind the norm is not of whole heads per token", node)
    return _Branch(rope, norm, kind, heads_first, transposed, reshape, bias, _root(norm))


def _swaps_heads(node: Any) -> bool:
    """Whether node is [B, S, N, D] as [B, N, S, D], or the other way round."""
    if is_op(node, aten.transpose) and rank(node) == 4:
        return {d % 4 for d in node.args[1:3]} == {1, 2}
    return is_op(node, aten.permute) and [d % rank(node) for d in node.args[1]] == [0, 2, 1, 3]


def _has_heads_first(rope: Rope, norm: fx.Node, transposed: bool) -> bool:
    """Whether the rope acts on [B, N, S, D]: the tables say so, except for one token, where both axes broadcast."""
    on_first, on_second = (same(shape(rope.cos)[axis], 1) for axis in (1, 2))
    return on_first and (not on_second or transposed or _swaps_heads(norm.args[0]))


def _ends_in(norm: fx.Node, rope: Rope) -> bool:
    """Whether all that is computed from the norm ends in the rotated tensor, within the few ops a rotation takes."""
    seen, queue = {norm}, [norm]
    while queue:
        for user in queue.pop().users:
            if user.op == "output" or len(seen) > 32:
                return False
            if user is not rope.result and user not in seen:
                seen.add(user)
                queue.append(user)
    return True


def _root(norm: fx.Node) -> fx.Node:
    """The activation behind the branch's projection: queries and keys of one layer share it."""
    node = norm.args[0]
    for _ in range(10):
        node = peel(node, *VIEWS, *CASTS)
        if is_op(node, aten.linear, aten.mm, aten.matmul, aten.addmm):
            return peel(node.args[1] if is_op(node, aten.addmm) else node.args[0])
        cut = as_slice(node)
        if cut is not None:
            node = cut.source
        elif is_op(node, operator.getitem) and is_op(node.args[0], aten.unbind):
            node = node.args[0].args[0]
        elif is_op(node, aten.transpose, aten.permute, aten.add, aten.select) or is_collective(node):
            node = node.args[0]
        elif is_op(node, aten.cat):  # Of the ranks' parts, gathered: full-width norms need all heads.
            node = node.args[0][0]
        else:
            break
    return node


def _rewrite(ctx: MatchContext, first: _Branch, second: _Branch) -> None:
    q, k = _order(first, second)
    token_axis = 2 if q.heads_first else 1
    of_one_batch = all(same(shape(q.rope.x)[axis], shape(k.rope.x)[axis]) for axis in (0, token_axis))
    require(of_one_batch, "queries and keys are of different tokens", k.norm)
    require(same_shape(shape(q.rope.cos), shape(k.rope.cos)), "queries and keys differ in cos", k.norm)
    width = q.kind if k.one_head else k.kind
    require(all(b.kind == width or b.one_head for b in (q, k)), "queries and keys differ in norm width", k.norm)
    head_axis = 1 if q.heads_first else 2
    cos, sin = (_drop_head_dim(ctx, table, head_axis, q.rope.result) for table in (q.rope.cos, q.rope.sin))
    args = (_token_major(ctx, q), _token_major(ctx, k), q.norm.args[1], k.norm.args[1], cos, sin, q.norm.args[2])
    attributes = {
        **q.norm.kwargs,
        "norm": width,
        "rope": q.rope.form,
        "rope_dtype": q.rope.compute_dtype,
        "layout": "bnsd" if q.heads_first else "bsnd",
        "q_bias": q.bias,
        "k_bias": k.bias,
    }
    node = ctx.emit_op("qk_norm_rope", args, {n: v for n, v in attributes.items() if v is not None}, like=q.norm)
    for index, branch in enumerate((q, k)):
        ctx.replace(branch.rope.result, ctx.output_of(node, index))
    merged = {branch.norm.name for branch in (q, k)}
    ctx.sites[:] = [s for s in ctx.sites if not (s.kind == "norm" and s.node in merged)]
    extent = "partial " if not same(shape(q.rope.x)[-1], _rotary_dim(q.rope)) else ""
    form = f"{width} norm, {extent}{q.rope.form} rope"
    ctx.matched("qk_norm_rope", q.norm, node, form=form, replaced=[q.rope.result, k.rope.result])


def _rotary_dim(rope: Rope) -> Any:
    table = shape(rope.cos)[-1]
    return table if rope.form in ("half", "interleaved_full") else 2 * table


def _order(first: _Branch, second: _Branch) -> tuple[_Branch, _Branch]:
    """Queries have at least as many heads; among equals, the one projected first."""
    axis = 1 if first.heads_first else 2
    heads = [shape(b.rope.result)[axis] for b in (first, second)]
    if all(isinstance(h, int) for h in heads) and heads[0] < heads[1]:
        return second, first
    return (first, second) if heads[0] != heads[1] or first.norm < second.norm else (second, first)


def _token_major(ctx: MatchContext, branch: _Branch) -> fx.Node:
    """The norm's input as [B, S, N, D]."""
    x = branch.norm.args[0]
    if branch.reshape is not None:
        # A view may not exist of what the norm read: parts of a merged projection are strided.
        view = is_op(branch.reshape, aten.view, aten._unsafe_view)
        target = aten.reshape.default if view else branch.reshape.target
        x = ctx.emit(target, (x, *branch.reshape.args[1:]), branch.reshape.kwargs, like=branch.norm)
    if branch.transposed == branch.heads_first:
        return x
    return x.args[0] if _swaps_heads(x) else ctx.emit(aten.transpose.int, (x, 1, 2), like=branch.norm)


def _drop_head_dim(ctx: MatchContext, table: fx.Node, head_axis: int, like: fx.Node) -> fx.Node:
    source = peel(table, *ALIASES)
    if is_op(source, aten.unsqueeze) and arg(source, 1) % rank(source) == head_axis:
        return source.args[0]
    return ctx.emit(aten.squeeze.dim, (table, head_axis), like=like)
