"""``swiglu``: the gated activation of a dense MLP or shared expert, between its projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fx.lowering.ops.activation import activate, split_gate_up
from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
) -> torch.Tensor:
    """``act(gate) * up`` (Shazeer, 2020).

    Args:
        gate: [..., I], or the merged projection [..., 2I] when ``up`` is None.
        up: [..., I] or None.
        layout: of the merged projection (``gate_up``, ``up_gate``, ``interleaved``).
        act, alpha, limit: see ``activation.activate``.

    Returns:
        [..., I]. torch_npu's ``npu_swiglu`` computes the merged silu form.
    """
    if up is None:
        gate, up = split_gate_up(gate, layout)
    return activate(gate, up, act, alpha, limit)


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    for shape in ((1, 32), (2, 5, 48)):
        gate, up = (torch.randn(*shape, generator=rng).to(dtype) for _ in range(2))
        tag = "x".join(map(str, shape))
        yield Sample(f"separate-{tag}", (gate, up))
        yield Sample(f"merged-{tag}", (torch.cat((gate, up), dim=-1),))
        yield Sample(f"interleaved_oai-{tag}", (gate,), dict(layout="interleaved", act="swiglu_oai", limit=7.0))
        yield Sample(f"gelu_tanh-{tag}", (gate, up), dict(act="gelu_tanh"))


SWIGLU = CanonicalOp(
    name="swiglu",
    schema=(
        "(Tensor gate, Tensor? up=None, *, str act='silu', str layout='gate_up', float alpha=1.702,"
        " float? limit=None) -> Tensor"
    ),
    reference=swiglu,
    tolerance=uniform_tolerance(
        fp32=Tolerance(1e-6, 1e-5, 1e-6), half=Tolerance(2e-3, 2e-3, 1e-3), bf16=Tolerance(1.6e-2, 1.6e-2, 8e-3)
    ),
    samples=_samples,
).register()
