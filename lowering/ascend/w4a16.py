"""``moe_fx_ascend::experts_w4a16`` and ``gemv_w4a16``: int4 weights at decode, on the NPU's vector cores.

This file has what graphs need of them: schemas, fake kernels, where the first applies, and what runs without the
kernel library. The GE converter is in ``ge_converters``.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fx.lowering.ascend import kernel_library
from moe_fx.lowering.ascend.antiquant import widened
from moe_fx.lowering.ascend.arguments import value
from moe_fx.lowering.ops.experts import like_x

# Beyond this many tokens the cube units of the grouped product are faster.
MAX_TOKENS = 8


@kernel_library.define(
    "(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor? w13_offset,"
    " Tensor w2, Tensor w2_scale, Tensor? w2_offset) -> Tensor",
    fake=like_x,
)
def experts_w4a16(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_offset: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_offset: torch.Tensor | None,
) -> torch.Tensor:
    """``experts`` with silu and int4 weights for at most ``MAX_TOKENS`` tokens.

    Args:
        x: [T, H] bf16 or fp16.
        weights: [T, k] fp32 or x's dtype.
        ids: [T, k] int32; a pair whose id is outside [0, E), such as -1, takes no part.
        w13: [E, H, 2I / 8] int32, eight signed int4 each, low first, gate columns before up's; w2: [E, I, H / 8].
        w13_scale, w13_offset: [E, G, 2I] in x's dtype for G groups along H; the weight is ``(int4 + offset) * scale``.
        w2_scale, w2_offset: [E, G, H]. Both offsets are given, or none, for weights without zero points.

    Returns:
        y [T, H] in x's dtype.

    This is what runs where the kernel library is not loaded: the grouped product on the same operands.
    """
    first, second = (
        torch.zeros_like(scale) if offset is None else offset
        for scale, offset in ((w13_scale, w13_offset), (w2_scale, w2_offset))
    )
    return widened(
        x, weights, ids, w13, w13_scale, first, w2, w2_scale, second, None, None, layout="gate_up", act="silu",
        alpha=0.0, limit=None, combine="finalize_routing", ids_in_range=False, out_dtype=None,
    )  # fmt: skip


def _gemv_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], scale.shape[1]))


@kernel_library.define("(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None) -> Tensor", fake=_gemv_fake)
def gemv_w4a16(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """A dense projection (qkv, o) with int4 weights, for at most ``MAX_TOKENS`` tokens.

    Args:
        x: [T, K] bf16 or fp16.
        weight: [K, N / 8] int32, packed as ``experts_w4a16``'s.
        scale, offset: [G, N] in x's dtype for G groups along K; no offset for weights without zero points.

    Returns:
        y [T, N] in x's dtype.

    Where the kernel library is not loaded, the weight is widened in whole.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    # Up to the sign bit and back: the arithmetic shift spreads a nibble's sign.
    signed = ((weight.unsqueeze(-1) << (28 - shifts)) >> 28).flatten(1)
    grouped = signed.to(x.dtype).unflatten(0, (scale.shape[0], -1))
    if offset is not None:
        grouped = grouped + offset.unsqueeze(1)
    return x @ (grouped * scale.unsqueeze(1)).flatten(0, 1)


def call(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *packed: torch.Tensor | None, out_dtype: Any
) -> Any:
    """``experts_w4a16`` as ``experts_int4`` is spelled with it."""
    if weights.dtype not in (torch.float32, x.dtype):
        weights = weights.to(torch.float32)
    y = torch.ops.moe_fx_ascend.experts_w4a16.default(x, weights, ids.to(torch.int32), *packed)
    return y.to(out_dtype or x.dtype)


def takes(a: dict[str, Any]) -> bool:
    """Whether the kernel computes an ``experts_int4`` call with these arguments, shapes apart."""
    plain = a["act"] == "silu" and a["limit"] is None and a["layout"] != "none"
    return plain and a["b13"] is None and a["b2"] is None


def is_in_ge() -> bool:
    """Whether the loaded kernel library brings GE an operator for ``experts_w4a16``."""
    return bool(torch.ops.moe_fx_ascend.experts_w4a16_in_ge())


def refusal(a: dict[str, Any]) -> str:
    """What the loaded kernel library has against the shapes of an ``experts_int4`` call; empty for nothing."""
    hidden, experts, top_k = value(a["x"]).shape[1], value(a["w13"]).shape[0], value(a["ids"]).shape[1]
    inner = value(a["w13"]).shape[1] // 2
    groups, inner_groups = value(a["w13_scale"]).shape[2], value(a["w2_scale"]).shape[2]
    reason: str = torch.ops.moe_fx_ascend.experts_w4a16_refusal(
        MAX_TOKENS, hidden, inner, experts, top_k, groups, inner_groups
    )
    return reason
