"""``scaled_dot_product_attention`` with its repeated key/value heads -> ``moe_fx.attention``. Off by default.

Unfused (transformers' ``sdpa`` attention; ``repeat_kv``, ``repeat_interleave`` or ``enable_gqa`` for fewer k/v heads)::

    k = k[:, :, None].expand(B, Hkv, H // Hkv, T, D).reshape(B, H, T, D)
    v = v[:, :, None].expand(B, Hkv, H // Hkv, T, D).reshape(B, H, T, D)
    y = scaled_dot_product_attention(q, k, v, mask, scale=0.125)

Fused::

    y = moe_fx.attention(q, k, v, mask, scale=0.125)        # k and v with Hkv heads

Attention that is written out (matmul, softmax, matmul) is a reported miss: with sinks, as in gpt-oss, the op does not
compute it; without them, the model has an ``sdpa`` form that does match.
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
    VIEWS,
    aten,
    bind,
    is_last_dim,
    is_op,
    normalize_dim,
    peel,
    rank,
    reaches,
    same,
    same_shape,
    shape,
    sources,
)

_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
# What stands between the scores and their softmax: scaling, masks, soft caps, sinks.
_ON_SCORES = (aten.mul, aten.div, aten.add, aten.sub, aten.where, aten.masked_fill, aten.tanh, aten.cat)
_ON_PROBABILITIES = (*VIEWS, *CASTS, aten.dropout, aten.slice, aten.where, aten.masked_fill)


@dataclass(frozen=True)
class _Attention:
    """One call, with k and v as the op takes them."""

    k: fx.Node
    v: fx.Node
    attributes: dict[str, Any]
    form: str


class AttentionPass(Pass):
    """scaled_dot_product_attention, with repeat_kv or enable_gqa in front, to ``moe_fx.attention``."""

    name = "attention"
    level = Level.BITWISE
    enabled_by_default = False

    def run(self, ctx: MatchContext) -> None:
        for node in list(ctx.graph.nodes):
            try:
                if is_op(node, aten.scaled_dot_product_attention):
                    _rewrite(ctx, node, _read(node))
                elif _is_written_out(node):
                    raise Miss(_why_written_out(node))
            except Miss as miss:
                ctx.missed("attention", node, miss)
        ctx.finish_pass()


def _read(node: fx.Node) -> _Attention:
    call = bind(node)
    q, k, v = (call[name] for name in ("query", "key", "value"))
    require(call["dropout_p"] == 0, f"dropout {call['dropout_p']} is applied, which is for training", node)
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        require(rank(x) == 4, f"the {name} are of rank {rank(x)}, not [batch, heads, tokens, width]", x)
    require(all(same(shape(x)[0], shape(q)[0]) for x in (k, v)), "queries, keys and values differ in batch", node)
    require(call["scale"] is None or isinstance(call["scale"], (int, float)), "the scale is not a constant", node)
    require(same(shape(k)[1], shape(v)[1]), "keys and values differ in heads", node)
    attributes = {"is_causal": call["is_causal"], "scale": None if call["scale"] is None else float(call["scale"])}
    kind = "causal" if call["is_causal"] else "full" if call["attn_mask"] is None else "masked"
    if call["enable_gqa"]:
        return _Attention(k, v, {**attributes, "gqa": "native"}, f"sdpa, enable_gqa, {kind}")
    require(same(shape(k)[1], shape(q)[1]), "key/value heads are broadcast over the query heads", node)
    few = [_before_repeat(x) for x in (k, v)]
    if few[0] is not None and few[1] is not None and same(shape(few[0])[1], shape(few[1])[1]):
        return _Attention(few[0], few[1], attributes, f"sdpa, repeat_kv, {kind}")
    return _Attention(k, v, attributes, f"sdpa, {kind}")


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """x [B, Hkv, T, D] when node is [B, H, T, D] with each of x's heads followed by its copies."""
    node = peel(node, *ALIASES)
    if is_op(node, aten.repeat_interleave):
        call = bind(node)
        along_heads = call.get("dim") is not None and normalize_dim(call["dim"], rank(node)) == 1
        return call["self"] if along_heads and isinstance(call.get("repeats"), int) else None
    if not is_op(node, *RESHAPES):
        return None
    # Reshapes keep the order of elements, so the shapes alone tell whether this one merges heads with their copies.
    copies = peel(node.args[0], *ALIASES)
    if not is_op(copies, aten.expand) or rank(copies) != 5:
        return None
    batch, n_kv, n_copies, length, width = shape(copies)
    single = copies.args[0]
    if not same_shape(shape(single), (batch, n_kv, 1, length, width)):
        return None
    x = single.args[0] if is_op(single, aten.unsqueeze, *RESHAPES) else None
    unfolded = x is not None and same_shape(shape(x), (batch, n_kv, length, width))
    return x if unfolded and same_shape(shape(node), (batch, n_kv * n_copies, length, width)) else None


def _rewrite(ctx: MatchContext, node: fx.Node, found: _Attention) -> None:
    call = bind(node)
    mask = () if call["attn_mask"] is None else (call["attn_mask"],)
    fused = ctx.emit_op("attention", (call["query"], found.k, found.v, *mask), found.attributes, like=node)
    ctx.replace(node, fused)
    ctx.matched("attention", node, fused, form=found.form, replaced=[node])


def _is_written_out(node: fx.Node) -> bool:
    """Whether node is the softmax between a product of queries and keys and one with values."""
    if not is_op(node, aten.softmax, aten._softmax) or rank(node) < 3 or not is_last_dim(bind(node)["dim"], node):
        return False
    weighs = reaches(node, lambda n: is_op(n, *_PRODUCTS), lambda n: is_op(n, *_ON_PROBABILITIES), limit=12)
    return weighs and any(is_op(n, *_PRODUCTS) for n in _on_scores(node))


def _on_scores(softmax: fx.Node) -> list[fx.Node]:
    return list(sources(softmax, lambda n: not is_op(n, *_ON_SCORES, *VIEWS, *CASTS), limit=24))


def _why_written_out(node: fx.Node) -> str:
    if any(is_op(n, aten.cat) and is_last_dim(bind(n)["dim"], n) for n in _on_scores(node)):
        return "the softmax runs over an appended column (attention sinks), which moe_fx.attention does not compute"
    return "attention is written out as matmul, softmax, matmul; load the model with attn_implementation='sdpa'"
