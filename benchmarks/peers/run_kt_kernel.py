"""kt-kernel, the CPU experts of KTransformers: its MoE classes, driven as its own wrappers drive them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from kt_kernel import kt_kernel_ext
from layer import Routed, Shape, Weights
from serving import Form, Layer, serve

# The largest call that the classes reserve memory for.
_MAX_TOKENS = 4096
# RAWINT4 takes groups of 32 only: others give wrong results.
_INT4_GROUP = 32


@functools.cache
def _pool(threads: int) -> Any:
    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return kt_kernel_ext.CPUInfer(config)


def _layer(
    kind: Callable[[Any], Any],
    shape: Shape,
    threads: int,
    configure: Callable[[Any], list[torch.Tensor]],
    expert_bytes: float,
) -> Layer:
    """``configure`` points a config at the source weights and returns them, so that they live until they are read."""
    pool = _pool(threads)
    on_gpu = torch.zeros(shape.experts, dtype=torch.bool)
    config = kt_kernel_ext.moe.MOEConfig(
        shape.experts, shape.top_k, shape.hidden, shape.intermediate, on_gpu.data_ptr()
    )
    config.layer_idx, config.pool, config.max_len = 0, pool.backend_, _MAX_TOKENS
    sources = configure(config)
    moe = kind(config)
    order = torch.arange(shape.experts, dtype=torch.int64)
    pool.submit(moe.load_weights_task(order.data_ptr()))
    pool.sync()
    sources.clear()

    def call(operands: Routed) -> torch.Tensor:
        out = torch.empty_like(operands.x)
        tokens = torch.tensor([operands.x.shape[0]], dtype=torch.int32)
        ids = operands.ids.to(torch.int64)
        task = moe.forward_task(
            tokens.data_ptr(), shape.top_k, ids.data_ptr(), operands.weights.data_ptr(), operands.x.data_ptr(),
            out.data_ptr(), False,
        )  # fmt: skip
        pool.submit(task)
        pool.sync()
        # What a config points to must outlive the layer.
        assert on_gpu.numel() == shape.experts
        return out

    return Layer(call, expert_bytes)


def _pointers(weight: torch.Tensor) -> list[list[int]]:
    return [[expert.data_ptr() for expert in weight]]


def _bf16(weights: Weights, shape: Shape, threads: int) -> Layer:
    def configure(config: Any) -> list[torch.Tensor]:
        gate, up = (half.contiguous() for half in weights.w13.chunk(2, dim=1))
        config.gate_projs, config.up_projs, config.down_projs = map(_pointers, (gate, up, weights.w2))
        return [gate, up]

    return _layer(kt_kernel_ext.moe.AMXBF16_MOE, shape, threads, configure, shape.expert_bytes("bf16"))


def _int8(weights: Weights, shape: Shape, threads: int) -> Layer:
    def configure(config: Any) -> list[torch.Tensor]:
        # The class quantises bf16 weights itself.
        gate, up, down = (
            torch.empty(shape.experts, *size, dtype=torch.bfloat16)
            for size in ((shape.intermediate, shape.hidden),) * 2 + ((shape.hidden, shape.intermediate),)
        )
        for expert in range(shape.experts):
            w13, down[expert] = weights.expert(expert)
            gate[expert], up[expert] = w13.chunk(2)
        config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        config.save = config.load = False
        return [gate, up, down]

    return _layer(kt_kernel_ext.moe.AMXInt8_MOE, shape, threads, configure, shape.expert_bytes("w8a8"))


def _int4(weights: Weights, shape: Shape, threads: int) -> Layer:
    assert weights.w13_scale is not None and weights.w2_scale is not None
    w13_scale, w2_scale = weights.w13_scale, weights.w2_scale
    repeats = shape.group // _INT4_GROUP

    def configure(config: Any) -> list[torch.Tensor]:
        gate, up = (half.contiguous() for half in weights.w13.chunk(2, dim=1))
        scales = [
            scale.repeat_interleave(repeats, dim=-1).contiguous() for scale in (*w13_scale.chunk(2, dim=1), w2_scale)
        ]
        config.gate_projs, config.up_projs, config.down_projs = map(_pointers, (gate, up, weights.w2))
        config.gate_scales, config.up_scales, config.down_scales = map(_pointers, scales)
        config.quant_config.bits, config.quant_config.group_size = 4, _INT4_GROUP
        config.quant_config.zero_point = False
        return [gate, up, *scales]

    extra_scales = sum(rows * inputs for rows, inputs in shape.projections()) * 2 * (1 / _INT4_GROUP - 1 / shape.group)
    return _layer(
        kt_kernel_ext.moe.AMXInt4_KGroup_MOE, shape, threads, configure, shape.expert_bytes("w4a8") + extra_scales
    )


if __name__ == "__main__":
    serve(
        {
            "bf16": Form("AMXBF16_MOE", _bf16),
            "w8a8": Form("AMXInt8_MOE", _int8),
            "w4a8": Form("AMXInt4_KGroup_MOE (RAWINT4), groups of 32", _int4),
        }
    )
