"""zentorch, AMD's extension of PyTorch: its fused MoE op, called as vLLM calls it."""

from __future__ import annotations

import torch
import zentorch  # noqa: F401  (registers the ops)
from layer import Routed, Shape, Weights
from serving import Form, Layer, serve, stored_bytes


def _layer(
    shape: Shape,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
) -> Layer:
    def call(operands: Routed) -> torch.Tensor:
        out = torch.empty_like(operands.x)
        torch.ops.zentorch.zentorch_fused_moe(
            out, operands.x, w13, w2, None, None, operands.weights, operands.ids, False, "silu", w13_scale, w2_scale
        )
        return out

    held = [tensor for tensor in (w13, w2, w13_scale, w2_scale) if tensor is not None]
    return Layer(call, stored_bytes(shape, *held))


def _bf16(weights: Weights, shape: Shape, threads: int) -> Layer:
    return _layer(shape, weights.w13, weights.w2)


def _int8(weights: Weights, shape: Shape, threads: int) -> Layer:
    return _layer(shape, weights.w13, weights.w2, weights.w13_scale, weights.w2_scale)


def _int4(weights: Weights, shape: Shape, threads: int) -> Layer:
    assert weights.w13_scale is not None and weights.w2_scale is not None
    # Signed nibbles, eight a word; scales with the groups outside.
    w13, w2 = ((weight ^ 0x88).view(torch.int32) for weight in (weights.w13, weights.w2))
    w13_scale, w2_scale = (scale.transpose(1, 2).contiguous() for scale in (weights.w13_scale, weights.w2_scale))
    return _layer(shape, w13, w2, w13_scale, w2_scale)


if __name__ == "__main__":
    serve(
        {
            "bf16": Form("zentorch::zentorch_fused_moe", _bf16),
            "w8a8": Form("zentorch::zentorch_fused_moe, int8 weights", _int8),
            "w4a8": Form("zentorch::zentorch_fused_moe, int4 weights", _int4),
        }
    )
