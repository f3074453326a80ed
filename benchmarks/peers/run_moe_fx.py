"""moe-fx's own engine (``csrc/cpu``), through the ops that the CPU lowering uses; served like a peer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layer import Routed, Shape, Weights
from serving import Form, Layer, serve, stored_bytes

import moe_fx.lowering.cpu.engine  # noqa: F401  (registers the ops)
from moe_fx.lowering.cpu.packing import PackedSpec, Packer, segments


def _dense(weights: Weights, shape: Shape, threads: int) -> Layer:
    def call(operands: Routed) -> torch.Tensor:
        return torch.ops.moe_fx_cpu.experts(operands.x, operands.weights, operands.ids, weights.w13, weights.w2)

    return Layer(call, stored_bytes(shape, weights.w13, weights.w2))


def _packed(dynamic_activations: bool) -> Callable[[Weights, Shape, int], Layer]:
    def prepare(weights: Weights, shape: Shape, threads: int) -> Layer:
        packed = _pack(weights, shape)

        def call(operands: Routed) -> torch.Tensor:
            return torch.ops.moe_fx_cpu.experts_packed(
                operands.x, operands.weights, operands.ids, packed, dynamic_activations=dynamic_activations
            )

        return Layer(call, stored_bytes(shape, packed))

    return prepare


def _pack(weights: Weights, shape: Shape) -> torch.Tensor:
    assert weights.w13_scale is not None and weights.w2_scale is not None
    is_int4 = weights.w13.dtype == torch.uint8
    packer = Packer(
        PackedSpec(
            format="int4" if is_int4 else "int8",
            experts=shape.experts,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            gated=True,
            group=shape.group if is_int4 else 0,
            segments=segments(),
        )
    )
    for expert in range(shape.experts):
        gate, up = weights.w13[expert].chunk(2)
        gate_scale, up_scale = weights.w13_scale[expert].chunk(2)
        rows = {
            "gate": (gate, gate_scale),
            "up": (up, up_scale),
            "down": (weights.w2[expert], weights.w2_scale[expert]),
        }
        for projection, (weight, scale) in rows.items():
            if is_int4:
                packer.int4(expert, projection, weight, scale, None)
            else:
                packer.int8(expert, projection, weight, scale)
    return packer.packed


if __name__ == "__main__":
    serve(
        {
            "bf16": Form("moe_fx_cpu::experts", _dense),
            "w8a8": Form("moe_fx_cpu::experts_packed int8, dynamic activations", _packed(True)),
            "w8a16": Form("moe_fx_cpu::experts_packed int8", _packed(False)),
            "w4a8": Form("moe_fx_cpu::experts_packed int4, dynamic activations", _packed(True)),
            "w4a16": Form("moe_fx_cpu::experts_packed int4", _packed(False)),
        }
    )
