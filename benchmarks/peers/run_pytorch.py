"""PyTorch's own kernels: grouped bf16 products under Inductor, and its int8 and int4 products per expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layer import Routed, Shape, Weights, nibbles
from serving import Form, Layer, serve, stored_bytes

Linear = Callable[[torch.Tensor], torch.Tensor]


def _grouped(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    tokens, top_k = ids.shape
    expert, order = torch.sort(ids.reshape(-1), stable=True)
    offsets = torch.searchsorted(expert, torch.arange(1, w13.shape[0] + 1, dtype=expert.dtype), out_int32=True)
    gate, up = torch._grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    rows = rows * weights.reshape(-1, 1)[order]
    out = torch.empty_like(rows).index_copy_(0, order, rows)
    return out.view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


_compiled = torch.compile(_grouped, dynamic=False)


def _bf16(weights: Weights, shape: Shape, threads: int) -> Layer:
    def call(operands: Routed) -> torch.Tensor:
        return _compiled(operands.x, operands.weights, operands.ids, weights.w13, weights.w2)

    return Layer(call, stored_bytes(shape, weights.w13, weights.w2))


def _per_expert(
    linear: Callable[[torch.Tensor, torch.Tensor], tuple[Linear, float]],
) -> Callable[[Weights, Shape, int], Layer]:
    """A layer of one product per expert and projection: ``linear`` takes an expert's weight and scale and returns the
    product and the bytes that it reads."""

    def prepare(weights: Weights, shape: Shape, threads: int) -> Layer:
        assert weights.w13_scale is not None and weights.w2_scale is not None
        up = [linear(weight, scale) for weight, scale in zip(weights.w13, weights.w13_scale, strict=True)]
        down = [linear(weight, scale) for weight, scale in zip(weights.w2, weights.w2_scale, strict=True)]

        def call(operands: Routed) -> torch.Tensor:
            tokens, top_k = operands.ids.shape
            expert, order = torch.sort(operands.ids.reshape(-1), stable=True)
            rows = operands.x[order // top_k]
            hit, counts = torch.unique_consecutive(expert, return_counts=True)
            parts = []
            for index, part in zip(hit.tolist(), rows.split(counts.tolist()), strict=True):
                gate, value = up[index][0](part).chunk(2, dim=-1)
                parts.append(down[index][0](torch.nn.functional.silu(gate) * value))
            out = torch.cat(parts) * operands.weights.reshape(-1, 1)[order]
            summed = torch.empty_like(out).index_copy_(0, order, out)
            return summed.view(tokens, top_k, -1).sum(dim=1).to(operands.x.dtype)

        return Layer(call, sum(size for _, size in (*up, *down)) / shape.experts)

    return prepare


def _onednn_int8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Linear, float]:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)

    def apply(x: torch.Tensor) -> torch.Tensor:
        row_scale = x.abs().amax(dim=-1, keepdim=True).float() / 127
        values = (x / row_scale).round().to(torch.int8)
        product = torch.ops.onednn.qlinear_pointwise.tensor(
            values, one, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (product * row_scale).to(x.dtype)

    return apply, weight.nbytes + scale.nbytes


def _int8_weights(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Linear, float]:
    scale = scale.to(torch.bfloat16)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale)

    return apply, weight.nbytes + scale.nbytes


def _int4_weights(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Linear, float]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles(weight).to(torch.int32), 1)
    # [K/g, N, 2]: scale, and what is added to (nibble - 8) * scale.
    scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous()
    group = 2 * weight.shape[1] // scale.shape[1]

    def apply(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)

    return apply, packed.nbytes + scales.nbytes


if __name__ == "__main__":
    serve(
        {
            "bf16": Form("_grouped_mm under Inductor", _bf16),
            "w8a8": Form("onednn::qlinear_pointwise per expert", _per_expert(_onednn_int8)),
            "w8a16": Form("_weight_int8pack_mm per expert", _per_expert(_int8_weights)),
            "w4a16": Form("_weight_int4pack_mm_for_cpu per expert", _per_expert(_int4_weights)),
        }
    )
