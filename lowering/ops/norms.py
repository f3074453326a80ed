"""``rms_norm`` and ``add_rms_norm``, with the cast points and weight forms that model families write."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

CASTS = ("before", "after")
_ATTRIBUTES = "float eps, *, str cast='before', float offset=0.0, ScalarType? out_dtype=None"


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: str = "before",
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in fp32 (Zhang and Sennrich, 2019).

    Args:
        x: [..., D] (bf16, fp16 or fp32).
        weight: [D] or None.
        eps: added to the mean square.
        cast: ``before``: the normalised value is rounded to ``x.dtype``, then multiplied by the weight (Llama, Qwen,
            DeepSeek); ``after``: multiplied in fp32, then rounded (gpt-oss, AFMoE, ``torch.nn.RMSNorm``).
        offset: added to the weight in fp32 (1.0 for Qwen3-Next and Gemma); only with ``cast="after"``.
        out_dtype: with ``cast="after"``, dtype of the result; default ``x.dtype``.

    Returns:
        [..., D]. torch_npu's ``npu_rms_norm`` and vLLM's ``rms_norm`` compute the same.
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "before":
        h = h.to(x.dtype)
        return h if weight is None else weight * h
    if weight is not None:
        h = h * (weight.to(torch.float32) + offset if offset else weight)
    return h.to(out_dtype or x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: str = "before",
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` and the sum itself (torch_npu ``npu_add_rms_norm``, vLLM ``fused_add_rms_norm``).

    Args:
        x, residual: [..., D] of one shape and dtype; see ``rms_norm`` for the rest.

    Returns:
        normalised [..., D] and ``x + residual`` [..., D] in x's dtype.
    """
    total = x + residual
    return rms_norm(total, weight, eps, cast=cast, offset=offset, out_dtype=out_dtype), total


def _norm_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    cases: dict[str, dict[str, object]] = {
        "cast_before": {},
        "cast_after": dict(cast="after"),
        "offset": dict(cast="after", offset=1.0),
        "no_weight": {},
    }
    for name, kwargs in cases.items():
        for shape in ((1, 64), (2, 5, 128), (3, 4, 2, 16)):
            x = torch.randn(*shape, generator=rng).to(dtype)
            weight = None if name == "no_weight" else torch.randn(shape[-1], generator=rng).to(dtype)
            yield Sample(f"{name}-{'x'.join(map(str, shape))}", (x, weight, 1e-6), kwargs)


def _add_norm_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    for sample in _norm_samples(dtype, rng):
        x, *rest = sample.args
        yield Sample(sample.name, (x, torch.randn(x.shape, generator=rng).to(dtype), *rest), sample.kwargs)


_TOLERANCE = uniform_tolerance(
    fp32=Tolerance(1e-6, 1e-5, 1e-6), half=Tolerance(2e-3, 2e-3, 1e-3), bf16=Tolerance(1.6e-2, 1.6e-2, 8e-3)
)

RMS_NORM = CanonicalOp(
    name="rms_norm",
    schema=f"(Tensor x, Tensor? weight, {_ATTRIBUTES}) -> Tensor",
    reference=rms_norm,
    tolerance=_TOLERANCE,
    samples=_norm_samples,
).register()

ADD_RMS_NORM = CanonicalOp(
    name="add_rms_norm",
    schema=f"(Tensor x, Tensor residual, Tensor? weight, {_ATTRIBUTES}) -> (Tensor normed, Tensor total)",
    reference=add_rms_norm,
    tolerance=_TOLERANCE,
    samples=_add_norm_samples,
).register()
