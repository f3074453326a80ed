"""The MoE layers that are timed: their shapes, random weights in every format, random routing, and a plain reference.

Runners of peers import this in environments of their own, so it needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

FORMATS = {
    "bf16": "bf16",
    "w8a8": "int8 W8A8",
    "w8a16": "int8 W8A16",
    "w4a8": "int4 W4A8",
    "w4a16": "int4 exact",
}
"""What is timed, and how tables call it. W8A16 and "int4 exact" keep activations as they are."""

# Calls go through this many random routings in turn.
ROUTINGS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer with gated experts and silu."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    group: int = 128
    """Inputs that share a scale in int4 weights."""

    def projections(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and inputs of w13 and of w2."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)

    def expert_bytes(self, form: str) -> float:
        """Bytes of one expert: bf16; int8 with a fp32 scale a row; int4 with a 2-byte scale a group."""
        total = 0.0
        for rows, inputs in self.projections():
            if form == "bf16":
                total += rows * inputs * 2
            elif form in ("w8a8", "w8a16"):
                total += rows * (inputs + 4)
            else:
                total += rows * (inputs / 2 + inputs / self.group * 2)
        return total

    def to_json(self) -> dict[str, str | int]:
        """What ``Shape(**fields)`` takes."""
        return asdict(self)


# DeepSeek-V3 has 256 such experts; 32 of them are 2.8 GB in bf16, so that two layers fit beside what is compared.
SHAPES = {
    "qwen3": Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "deepseek": Shape("DeepSeek-like", 7168, 2048, 32, 8),
}


@dataclass
class Routed:
    """The operands of a call that are not weights."""

    x: torch.Tensor  # [T, H] bf16
    weights: torch.Tensor  # [T, k] fp32, each row sums to 1
    ids: torch.Tensor  # [T, k] int32, distinct in a row
    experts_hit: int


def routed(shape: Shape, tokens: int, index: int) -> Routed:
    """Random operands; equal arguments give equal ones in every process."""
    generator = torch.Generator().manual_seed(1000 * tokens + index)
    x = torch.randn(tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    scores = torch.rand(tokens, shape.experts, generator=generator)
    weights, ids = torch.topk(scores, shape.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routed(x, weights, ids.to(torch.int32), ids.unique().numel())


@dataclass
class Weights:
    """One layer in one format, in the forms of ``moe_fx::experts`` and its quantised variants."""

    form: str
    w13: torch.Tensor  # [E, 2I, H]: bf16, int8, or uint8 of half the width (two nibbles a byte, value nibble - 8)
    w2: torch.Tensor  # [E, H, I]: likewise
    w13_scale: torch.Tensor | None = None  # int8: [E, 2I] fp32; int4: [E, 2I, H/g] bf16
    w2_scale: torch.Tensor | None = None  # int8: [E, H] fp32; int4: [E, H, I/g] bf16

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 of one expert, dequantised to fp32."""
        return (
            _dequantised(self.form, self.w13[index], None if self.w13_scale is None else self.w13_scale[index]),
            _dequantised(self.form, self.w2[index], None if self.w2_scale is None else self.w2_scale[index]),
        )


def random_weights(shape: Shape, form: str, seed: int) -> Weights:
    """Random weights of a format, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rows, inputs in shape.projections():
        if form in ("w4a8", "w4a16"):
            values = torch.randint(0, 256, (shape.experts, rows, inputs // 2), generator=generator, dtype=torch.uint8)
            spread = torch.rand(shape.experts, rows, inputs // shape.group, generator=generator)
            parts.append((values, ((0.5 + spread) / (4 * inputs**0.5)).to(torch.bfloat16)))
            continue
        values = torch.randint(-127, 128, (shape.experts, rows, inputs), generator=generator, dtype=torch.int8)
        spread = torch.rand(shape.experts, rows, generator=generator)
        scale = (0.5 + spread) / (64 * inputs**0.5)
        if form == "bf16":
            dense = torch.empty(shape.experts, rows, inputs, dtype=torch.bfloat16)
            for expert in range(shape.experts):
                dense[expert] = values[expert] * scale[expert].unsqueeze(-1)
            parts.append((dense, None))
        else:
            parts.append((values, scale))
    (w13, w13_scale), (w2, w2_scale) = parts
    return Weights(form, w13, w2, w13_scale, w2_scale)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The values of nibbles, uint8 [..., K] in 0..15 from [..., K/2]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _dequantised(form: str, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight.float()
    if form in ("w8a8", "w8a16"):
        return weight.float() * scale.unsqueeze(-1)
    grouped = nibbles(weight).unflatten(-1, (scale.shape[-1], -1)).float() - 8
    return (grouped * scale.float().unsqueeze(-1)).flatten(-2)


def reference(weights: Weights, call: Routed) -> torch.Tensor:
    """What a layer gives, [T, H] fp32, computed in fp32 on the dequantised weights."""
    out = torch.zeros(call.x.shape, dtype=torch.float32)
    for expert in call.ids.unique().tolist():
        w13, w2 = weights.expert(expert)
        token, slot = (call.ids == expert).nonzero(as_tuple=True)
        gate, up = (call.x[token].float() @ w13.t()).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ w2.t()
        out.index_add_(0, token, rows * call.weights[token, slot].unsqueeze(-1))
    return out


def relative_error(weights: Weights, call: Routed, run: Callable[[Routed], torch.Tensor]) -> float:
    """Relative L2 error of a layer's result against ``reference``."""
    expected = reference(weights, call)
    return float((run(call).float() - expected).norm() / expected.norm())
