"""``experts_int8`` and ``experts_int4``: weights quantised per channel (W8A16, W8A8) or per group (W4A16, W4A8)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from moe_fx.lowering.ops.activation import activate, split_gate_up
from moe_fx.lowering.ops.experts import like_x, run_experts
from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

# The nibble that stands for zero when there are no zero points (compressed-tensors' symmetric form).
_INT4_MIDDLE = 8
_INT8_MAX = 127

_ATTRIBUTES = "str act='silu', str layout='gate_up', float alpha=1.702, float? limit=None, ScalarType? out_dtype=None"

Linear = Callable[[torch.Tensor, int], torch.Tensor]


def experts_int8(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    dynamic_activations: bool = False,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``experts`` with symmetric int8 weights, one scale per output channel.

    Args:
        x, weights, ids, b13, b2, act, layout (merged layouts and ``none``), alpha, limit, out_dtype: see ``experts``.
        w13: [E, 2I, H] int8; w13_scale: [E, 2I] floating: the weight is ``w13 * w13_scale[..., None]``.
        w2: [E, H, I] int8; w2_scale: [E, H].
        dynamic_activations: False is W8A16: weights are widened, products taken in ``x.dtype``. True is W8A8: each row
            entering a projection is quantised to int8 with its own scale ``max|row| / 127``, products are accumulated
            in integers and scaled once (vLLM's ``use_int8_w8a8`` per-channel form, torch_npu's ``npu_dynamic_quant``).

    Returns:
        y [T, H].
    """

    def linear(weight: torch.Tensor, scale: torch.Tensor) -> Linear:
        def apply(rows: torch.Tensor, e: int) -> torch.Tensor:
            if not dynamic_activations:
                return rows @ (weight[e].to(torch.float32) * scale[e].unsqueeze(-1)).to(rows.dtype).t()
            row_scale = rows.abs().amax(dim=-1, keepdim=True).to(torch.float32).clamp(min=1e-12) / _INT8_MAX
            quantised = (rows / row_scale).round().clamp(-_INT8_MAX, _INT8_MAX)
            # Double holds every int32 sum exactly.
            product = quantised.double() @ weight[e].double().t()
            return (product * row_scale * scale[e].to(torch.float32)).to(rows.dtype)

        return apply

    project = _projections(linear(w13, w13_scale), linear(w2, w2_scale), b13, b2, act, layout, alpha, limit)
    return run_experts(x, weights, ids, w13.shape[0], project, out_dtype=out_dtype)


def experts_int4(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    dynamic_activations: bool = False,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``experts`` with int4 weights and one scale (and zero point) per group along the input dimension.

    Args:
        x, weights, ids, b13, b2, act, layout (merged layouts and ``none``), alpha, limit, out_dtype: see ``experts``.
        w13: [E, 2I, H/2] uint8, two unsigned nibbles a byte, the lower input index in the low nibble.
        w13_scale: [E, 2I, H/g] floating; the group size g (32, 64, 128) follows from the shapes.
        w13_zero: [E, 2I, H/g] uint8 zero points (AWQ); None means 8, the symmetric form. The weight is
            ``(nibble - zero) * scale``.
        w2, w2_scale, w2_zero: the same for [E, H, I].
        dynamic_activations: False is W4A16: weights are widened to fp32, rounded to ``x.dtype``, and products taken
            there. True is W4A8: each group of g inputs of a row is quantised to int8 with its own scale
            ``max|group| / 127``, products ``a * nibble`` are accumulated in integers within a group, and
            ``(sum(a * nibble) - zero * sum(a)) * weight scale * row scale`` is summed over groups in fp32 (llama.cpp's
            and vLLM-CPU's form of int4 on int8 dot products).

    Returns:
        y [T, H].
    """

    def linear(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Linear:
        def apply(rows: torch.Tensor, e: int) -> torch.Tensor:
            of_expert = (packed[e], scale[e], None if zero is None else zero[e])
            if dynamic_activations:
                return _linear_w4a8(rows, *of_expert)
            return rows @ dequantize_int4(*of_expert).to(rows.dtype).t()

        return apply

    gate_up, down = linear(w13, w13_scale, w13_zero), linear(w2, w2_scale, w2_zero)
    project = _projections(gate_up, down, b13, b2, act, layout, alpha, limit)
    return run_experts(x, weights, ids, w13.shape[0], project, out_dtype=out_dtype)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """One expert's weight [N, K] fp32 from nibbles [N, K/2], scales and zero points [N, K/g]; see ``experts_int4``."""
    grouped = _nibble_groups(packed, scale.shape[-1]).to(torch.float32)
    middle = _INT4_MIDDLE if zero is None else zero.unsqueeze(-1).to(torch.float32)
    return ((grouped - middle) * scale.unsqueeze(-1).to(torch.float32)).flatten(-2)


def _nibble_groups(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, K/2] bytes as [N, groups, K/groups] nibbles."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).unflatten(-1, (groups, -1))


def _linear_w4a8(
    rows: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """``rows`` [n, K] by one expert's int4 weight [N, K/2], the activations in int8 per group."""
    groups = rows.unflatten(-1, (scale.shape[-1], -1))
    row_scale = groups.abs().amax(dim=-1, keepdim=True).to(torch.float32).clamp(min=1e-12) / _INT8_MAX
    quantised = (groups / row_scale).round().clamp(-_INT8_MAX, _INT8_MAX)
    # Double holds every int32 sum exactly.
    nibbles = _nibble_groups(packed, scale.shape[-1]).double()
    product = torch.einsum("tgi,ngi->tng", quantised.double(), nibbles)
    middle = _INT4_MIDDLE if zero is None else zero.double()
    product = product - middle * quantised.double().sum(dim=-1).unsqueeze(1)
    scaled = product.to(torch.float32) * scale.to(torch.float32) * row_scale.squeeze(-1).unsqueeze(1)
    return scaled.sum(dim=-1).to(rows.dtype)


def _projections(
    gate_up: Linear,
    down: Linear,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    act: str,
    layout: str,
    alpha: float,
    limit: float | None,
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """One expert's gate/up, activation and down as ``run_experts`` calls them."""

    def project(e: int, rows: torch.Tensor) -> torch.Tensor:
        h = gate_up(rows, e)
        gate, up = split_gate_up(h if b13 is None else h + b13[e], layout)
        out = down(activate(gate, up, act, alpha, limit), e)
        return out if b2 is None else out + b2[e]

    return project


_HIDDEN, _INTER, _EXPERTS, _TOP_K = 64, 32, 6, 2


def _routed(tokens: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    ids = torch.stack([torch.randperm(_EXPERTS, generator=rng)[:_TOP_K] for _ in range(tokens)])
    x = torch.randn(tokens, _HIDDEN, generator=rng).to(dtype)
    return x, torch.rand(tokens, _TOP_K, generator=rng), ids.to(torch.int32)


def _int8_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randint(-127, 128, (_EXPERTS, rows, columns), generator=rng).to(torch.int8)
        return values, (0.5 + torch.rand(_EXPERTS, rows, generator=rng)) / (127 * columns**0.5)

    for dynamic in (False, True):
        for tokens in (1, 9):
            args = (*_routed(tokens, dtype, rng), *weight(2 * _INTER, _HIDDEN), *weight(_HIDDEN, _INTER))
            yield Sample(f"{'W8A8' if dynamic else 'W8A16'}-T{tokens}", args, dict(dynamic_activations=dynamic))


def _int4_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    def weight(rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed = torch.randint(0, 256, (_EXPERTS, rows, columns // 2), generator=rng).to(torch.uint8)
        scale = (0.5 + torch.rand(_EXPERTS, rows, columns // group, generator=rng)) / (8 * columns**0.5)
        zero = torch.randint(0, 16, (_EXPERTS, rows, columns // group), generator=rng).to(torch.uint8)
        return packed, scale, zero

    for dynamic, zeros in itertools.product((False, True), (False, True)):
        for tokens in (1, 9):
            w13, w13_scale, w13_zero = weight(2 * _INTER, _HIDDEN, 32)
            w2, w2_scale, w2_zero = weight(_HIDDEN, _INTER, 32)
            points = (w13_zero, w2_zero) if zeros else (None, None)
            args = (*_routed(tokens, dtype, rng), w13, w13_scale, w2, w2_scale, *points)
            name = f"{'W4A8' if dynamic else 'W4A16'}-{'zeros' if zeros else 'symmetric'}-T{tokens}"
            yield Sample(name, args, dict(dynamic_activations=dynamic))


# As for ``experts``; a value that lies between two int8 steps may fall to either side in W8A8 and W4A8.
_TOLERANCE = uniform_tolerance(
    fp32=Tolerance(2e-2, 1e-2, 1e-2), half=Tolerance(2e-2, 1e-2, 1e-2), bf16=Tolerance(1e-1, 5e-2, 2e-2)
)

EXPERTS_INT8 = CanonicalOp(
    name="experts_int8",
    schema=(
        "(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale,"
        f" Tensor? b13=None, Tensor? b2=None, *, bool dynamic_activations=False, {_ATTRIBUTES}) -> Tensor"
    ),
    reference=experts_int8,
    tolerance=_TOLERANCE,
    samples=_int8_samples,
    fake=like_x,
).register()

EXPERTS_INT4 = CanonicalOp(
    name="experts_int4",
    schema=(
        "(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale,"
        " Tensor? w13_zero=None, Tensor? w2_zero=None, Tensor? b13=None, Tensor? b2=None,"
        f" *, bool dynamic_activations=False, {_ATTRIBUTES}) -> Tensor"
    ),
    reference=experts_int4,
    tolerance=_TOLERANCE,
    samples=_int4_samples,
    fake=like_x,
).register()
