"""Launches the kernels of the gated activation: the canonical ``swiglu``, and the same with an int8 result."""

from __future__ import annotations

import torch
import triton

from moe_fx.lowering.cuda import configs, device
from moe_fx.lowering.cuda.device import on_its_device
from moe_fx.lowering.cuda.operands import DTYPE_NAMES, known_equal, near
from moe_fx.lowering.ops.activation import ACTIVATIONS, UNARY, split_gate_up
from moe_fx.lowering.triton.swiglu import swiglu_kernel, swiglu_quant_kernel

_LAYOUTS = ("gate_up", "up_gate", "interleaved", "none")


@on_its_device
def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
) -> torch.Tensor:
    """The canonical ``swiglu`` (see there): operands of any strides, the result [..., I] dense, rounded once."""
    gate, up, out = _operands(gate, up, layout, gate.dtype)
    if out.numel() == 0:
        return out
    n_rows, width = gate.shape
    launch = configs.lookup("swiglu", f"I{width}", n_rows, _defaults(n_rows, width), gate.device)
    gate, up = near(gate, launch["BLOCK_R"]), up if up is None else near(up, launch["BLOCK_R"])
    n_blocks = triton.cdiv(n_rows, launch["BLOCK_R"]) * triton.cdiv(width, launch["BLOCK_I"])
    swiglu_kernel[(min(n_blocks, device.programs(gate) * launch["WAVES"]),)](
        gate,
        up,
        out,
        n_rows,
        *gate.stride(),
        *_strides(up),
        float(alpha),
        float(limit or 0.0),
        N=width,
        ACT=act,
        HAS_LIMIT=limit is not None,
        BLOCK_R=launch["BLOCK_R"],
        BLOCK_I=launch["BLOCK_I"],
        num_warps=launch["num_warps"],
    )
    return out


@on_its_device
def swiglu_quant(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``swiglu`` with each row quantised to int8 (torch_npu's ``npu_dynamic_quant`` after ``npu_swiglu``).

    Args:
        gate, up, act, layout, alpha, limit: as for ``swiglu``.

    Returns:
        int8 [..., I] and fp32 scales [...], dense. A row's scale is its largest magnitude, in gate's dtype and at least
        1e-12, divided by 127; its values are divided by that and rounded, half to even.
    """
    gate, up, out = _operands(gate, up, layout, torch.int8)
    scales = out.new_empty(out.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, scales
    n_rows, width = gate.shape
    launch = configs.lookup("swiglu_quant", f"I{width}", n_rows, _quant_defaults(width), gate.device)
    gate, up = near(gate, 1), up if up is None else near(up, 1)
    swiglu_quant_kernel[(min(n_rows, device.programs(gate) * launch["WAVES"]),)](
        gate,
        up,
        out,
        scales,
        n_rows,
        *gate.stride(),
        *_strides(up),
        float(alpha),
        float(limit or 0.0),
        N=width,
        ACT=act,
        HAS_LIMIT=limit is not None,
        BLOCK_I=launch["BLOCK_I"],
        ASCEND=False,
        num_warps=launch["num_warps"],
    )
    return out, scales


def swiglu_refusal(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
) -> str | None:
    """Why the kernels do not take these operands (fake ones will do), or None."""
    width = gate.shape[-1] if gate.dim() else None
    if not isinstance(width, int):
        return "the width of the rows is not a constant of the graph"
    if gate.dtype not in DTYPE_NAMES:
        return f"{gate.dtype} is none of fp32, bf16 and fp16"
    if up is None:
        if layout not in _LAYOUTS:
            return f"layout = {layout!r} is none of {', '.join(_LAYOUTS)}"
        if layout != "none" and width % 2:
            return f"a merged projection of {width} columns does not divide into gate and up"
    elif up.dtype != gate.dtype:
        return f"up is {up.dtype}, gate is {gate.dtype}"
    # Sizes may be symbols, which a comparison must not bind.
    elif up.dim() != gate.dim() or not all(map(known_equal, up.shape, gate.shape)):
        return f"up is of shape {tuple(up.shape)}, gate of {tuple(gate.shape)}"
    known = ACTIVATIONS if up is not None or layout != "none" else tuple(UNARY)
    if act not in known:
        return f"act = {act!r} is none of {', '.join(known)}"
    return "act = 'silu_then_clamp' needs a limit" if act == "silu_then_clamp" and limit is None else None


def _operands(
    gate: torch.Tensor, up: torch.Tensor | None, layout: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gate and up as matrices [rows, I], and the result [..., I] to be written."""
    leading = gate.shape[:-1]
    if up is not None:
        up = _rows(up)
        gate = _rows(gate)
    else:
        gate, up = split_gate_up(_rows(gate), layout)
    return gate, up, torch.empty((*leading, gate.shape[-1]), dtype=out_dtype, device=gate.device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _strides(up: torch.Tensor | None) -> tuple[int, int]:
    return (0, 1) if up is None else (up.stride(0), up.stride(1))


def _defaults(n_rows: int, width: int) -> dict[str, int]:
    """Small blocks, so that few rows spread over the device; larger ones once there are enough of them to fill it."""
    elements = 512 if n_rows <= 64 else 2048
    block_i = min(triton.next_power_of_2(width), elements)
    block_r = elements // block_i if n_rows > 64 else 1
    return {"BLOCK_R": block_r, "BLOCK_I": block_i, "WAVES": 4, "num_warps": 2 if n_rows <= 64 else 4}


def _quant_defaults(width: int) -> dict[str, int]:
    block_i = min(triton.next_power_of_2(width), 8192)
    return {"BLOCK_I": block_i, "WAVES": 4, "num_warps": min(16, max(1, block_i // 256))}
