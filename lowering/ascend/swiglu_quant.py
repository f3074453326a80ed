"""``moe_fx_ascend::swiglu_dynamic_quant``: SwiGLU and the quantisation of its result by token, in one pass over x."""

from __future__ import annotations

import torch

from moe_fx.lowering.ascend import kernel_library

_INT8_MAX = 127


def _fake(x: torch.Tensor, limit: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, columns = x.shape
    return x.new_empty((tokens, columns // 2), dtype=torch.int8), x.new_empty((tokens,), dtype=torch.float32)


@kernel_library.define("(Tensor x, float? limit=None) -> (Tensor y, Tensor scale)", fake=_fake)
def swiglu_dynamic_quant(x: torch.Tensor, limit: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu(gate) * up``, rounded to x's dtype, as int8 with one scale a token: what a W8A8 projection reads.

    Args:
        x: [T, 2I] bf16 or fp16, gate before up.
        limit: gate is clamped to at most this, up to within plus and minus this.

    Returns:
        y [T, I] int8 and scale [T] fp32; ``y * scale`` is the activation.

    Where the kernel library is not loaded, PyTorch computes it.
    """
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    activation = (torch.nn.functional.silu(gate) * up).to(x.dtype).to(torch.float32)
    scale = activation.abs().amax(dim=-1).clamp(min=1e-12) / _INT8_MAX
    return (activation / scale.unsqueeze(-1)).round().to(torch.int8), scale
