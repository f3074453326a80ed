"""Expert and MLP activations, as data: one table that references, matchers and kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Plain activations of the gate (or, in ungated experts, of the only projection).
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
# Gated forms that are more than act(gate) * up.
GATED_ONLY = ("swiglu_oai", "silu_then_clamp")
ACTIVATIONS = (*UNARY, *GATED_ONLY)


def activate(
    gate: torch.Tensor, up: torch.Tensor | None, act: str, alpha: float = 1.702, limit: float | None = None
) -> torch.Tensor:
    """Apply an expert's activation; all tensors are [..., I] of one dtype.

    * ``up is None`` (ungated): ``act(gate)``.
    * ``act`` in ``UNARY``: ``act(gate) * up``; with ``limit``, gate is first clamped from above and up to +-limit
      (DeepSeek-V4, GLM-5).
    * ``swiglu_oai``: clamp as above, then ``gate * sigmoid(alpha * gate) * (up + 1)`` (gpt-oss, MiniMax-M3).
    * ``silu_then_clamp``: ``clamp(silu(gate), max=limit) * clamp(up, -limit, limit)`` (Step-3.5).
    """
    if up is None:
        return UNARY[act](gate)
    if act == "silu_then_clamp":
        return F.silu(gate).clamp(max=limit) * up.clamp(-_given(limit), limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if act == "swiglu_oai":
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return UNARY[act](gate) * up


def split_gate_up(h: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split a merged projection [..., 2I] into (gate, up) by its layout; see ``experts`` for the layouts."""
    if layout == "none":
        return h, None
    if layout == "interleaved":
        return h[..., ::2], h[..., 1::2]
    first, second = h.chunk(2, dim=-1)
    return (first, second) if layout == "gate_up" else (second, first)


def _given(limit: float | None) -> float:
    if limit is None:
        raise ValueError("act='silu_then_clamp' needs a limit; pass limit=<float>")
    return limit
