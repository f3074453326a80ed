"""Launches the norm kernel: the canonical ``rms_norm`` and ``add_rms_norm`` on CUDA tensors."""

from __future__ import annotations

import torch
import triton

from moe_fx.lowering.cuda import configs, device
from moe_fx.lowering.cuda.device import on_its_device
from moe_fx.lowering.cuda.operands import DTYPE_NAMES, known_equal, near
from moe_fx.lowering.ops import norms as canonical
from moe_fx.lowering.triton.norms import rms_norm_kernel

# Columns that a program holds in registers; longer rows are read in blocks of so many.
_MAX_BLOCK = 8192


@on_its_device
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: str = "before",
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The canonical ``rms_norm`` (see there): x [..., D] of any strides, weight [D] or None; the result is dense."""
    out = torch.empty(x.shape, dtype=_out_dtype(x, weight, cast, out_dtype), device=x.device)
    _launch(x, None, weight, eps, cast, offset, out, None)
    return out


@on_its_device
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
    """The canonical ``add_rms_norm`` (see there): x, residual [..., D] of any strides; both results are dense."""
    out = torch.empty(x.shape, dtype=_out_dtype(x, weight, cast, out_dtype), device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, cast, offset, out, total)
    return out, total


def rms_norm_refusal(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: str = "before",
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernel does not take these operands (fake ones will do), or None."""
    width = x.shape[-1] if x.dim() else None
    if not isinstance(width, int):
        return "the width of the rows is not a constant of the graph"
    given = [x.dtype, out_dtype or x.dtype, x.dtype if weight is None else weight.dtype]
    for dtype in given:
        if dtype not in DTYPE_NAMES:
            return f"{dtype} is none of fp32, bf16 and fp16"
    if weight is not None and tuple(weight.shape) != (width,):
        return f"the weight is of shape {tuple(weight.shape)}, not [{width}]"
    return None if cast in canonical.CASTS else f"cast = {cast!r} is none of {', '.join(canonical.CASTS)}"


def add_rms_norm_refusal(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: str = "before",
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernel does not take these operands (fake ones will do), or None."""
    if residual.dtype != x.dtype:
        return f"the residual is {residual.dtype}, x is {x.dtype}"
    # Sizes may be symbols, which a comparison must not bind.
    same = x.dim() == residual.dim() and all(map(known_equal, x.shape, residual.shape))
    if not same:
        return f"the residual is of shape {tuple(residual.shape)}, x of {tuple(x.shape)}"
    return rms_norm_refusal(x, weight, eps, cast=cast, offset=offset, out_dtype=out_dtype)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    cast: str,
    offset: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    if out.numel() == 0:
        return
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    residual_rows = None if residual is None else residual.reshape(-1, width)
    n_rows = rows.shape[0]
    launch = configs.lookup("norms", f"D{width}", n_rows, _defaults(n_rows, width), x.device)
    rows = near(rows, launch["BLOCK_R"])
    residual_rows = residual_rows if residual_rows is None else near(residual_rows, launch["BLOCK_R"])
    residual_strides = (0, 1) if residual_rows is None else residual_rows.stride()
    rms_norm_kernel[(min(triton.cdiv(n_rows, launch["BLOCK_R"]), device.programs(x) * launch["WAVES"]),)](
        rows,
        residual_rows,
        weight if weight is None else weight.contiguous(),
        out,
        total,
        n_rows,
        *rows.stride(),
        *residual_strides,
        float(eps),
        float(offset) if cast == "after" else 0.0,
        D=width,
        CAST_BEFORE=cast == "before",
        BLOCK_R=launch["BLOCK_R"],
        BLOCK_D=launch["BLOCK_D"],
        num_warps=launch["num_warps"],
    )


def _defaults(n_rows: int, width: int) -> dict[str, int]:
    """Sixteen bytes of bf16 a thread while rows are few; short rows go several to a program when there are many."""
    block_d = min(triton.next_power_of_2(width), _MAX_BLOCK)
    block_r = max(1, 1024 // block_d) if n_rows > 1024 else 1
    warps = triton.next_power_of_2(max(1, block_r * block_d // 256))
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "WAVES": 4, "num_warps": min(16, warps)}


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, cast: str, out_dtype: torch.dtype | None) -> torch.dtype:
    if cast == "after":
        return out_dtype or x.dtype
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
