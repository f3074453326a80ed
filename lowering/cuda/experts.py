"""Launches fused experts on dense weights: the canonical ``experts`` on CUDA tensors.

Few pairs go through ``experts_pairs`` (two launches), more through ``experts_grouped`` (sorting, products, the sum).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moe_fx.lowering.cuda import configs, expert_plan
from moe_fx.lowering.cuda.device import dependent_launch, on_its_device
from moe_fx.lowering.cuda.expert_plan import fit, grid, row_stride
from moe_fx.lowering.cuda.operands import DTYPE_NAMES
from moe_fx.lowering.ops import experts as canonical
from moe_fx.lowering.triton.experts_grouped import down_tiles_kernel, gate_up_tiles_kernel
from moe_fx.lowering.triton.experts_pairs import down_pairs_kernel, down_rows_kernel, gate_up_pairs_kernel

# What a warp loads at once: 16 bytes a lane.
_WARP_BYTES = 512
_MOST_WARPS = 8
# Registers of a thread for rows of the down projection, of the 128 that it has where two programs of eight warps share
# a multiprocessor. A load of 16 bytes takes four.
_ROW_REGISTERS = 96
# Programs of fewer rows were slower than those that read blocks (by 5 to 12 % on an H200, k = 8).
_FEWEST_ROWS = 4
# Kernel -> parameter -> values that a tuner may try; combinations that do not fit a GPU fail to compile there.
TUNABLE: dict[str, dict[str, tuple[int, ...]]] = {
    # Up to how many pairs (tokens * k) the kernels for few tokens run.
    "experts": {"PAIRS": (0, 8, 16, 32, 64, 128)},
    "experts_gate_up_pairs": {
        "BLOCK_N": (1, 2, 4, 8, 16, 32),
        "BLOCK_K": (64, 128, 256, 512, 1024),
        "PROGRAMS": (0, 8, 12, 16),
        "num_warps": (1, 2, 4, 8),
    },
    "experts_down_rows_pairs": {"ROWS": (1, 2, 4, 8), "AHEAD": (1, 2, 3, 4, 6)},
    "experts_down_pairs": {
        "BLOCK_S": (1, 2, 4, 8),
        "BLOCK_N": (1, 2, 4, 8, 16),
        "BLOCK_K": (64, 128, 256, 512),
        "num_warps": (1, 2, 4, 8),
    },
    "experts_tiles": {"BLOCK_M": (16, 32, 64, 128)},
    "experts_gate_up_tiles": {
        "BLOCK_N": (32, 64, 128),
        "BLOCK_K": (32, 64, 128, 256),
        "GROUP": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "experts_down_tiles": {
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128, 256),
        "GROUP": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    **expert_plan.TUNABLE,
}


@dataclass(frozen=True)
class _Projections:
    """Where a kernel finds gate and up: channel i of either is row ``at + i * step`` of a weight [E, rows, H]."""

    gate: torch.Tensor
    up: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    gate_at: int
    up_at: int
    step: int
    gated: bool


@on_its_device
def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    transposed: bool = False,
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The canonical ``experts`` (see there) on operands of any strides; weights are read where they lie.

    Returns:
        y [T, H], dense.
    """
    n_tokens, hidden = x.shape
    y = x.new_empty((n_tokens, hidden), dtype=out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    if transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        w3 = w3 if w3 is None else w3.transpose(1, 2)
    n_experts, _, inter = w2.shape
    top_k = ids.shape[1]
    n_pairs = n_tokens * top_k
    x, weights, ids = expert_plan.dense_rows(x), weights.contiguous(), ids.contiguous()
    b2 = b2 if b2 is None else b2.contiguous()
    on_input = weight_on == "input"
    of = _projections(layout, w13, w3, b13, b3, inter)
    bias = of.up_bias if of.gate_bias is None else of.gate_bias
    # Weights whose rows lie along the channels are read in other blocks.
    across = of.gate.stride(1) == 1 and of.gate.stride(2) != 1
    variant = f"{DTYPE_NAMES[x.dtype]}{'-transposed' if across else ''}-H{hidden}-I{inter}-E{n_experts}-k{top_k}"

    def tuned(kernel: str, defaults: dict[str, int]) -> dict[str, int]:
        return configs.lookup(kernel, variant, n_tokens, defaults, x.device)

    gate_up = {
        "alpha": alpha,
        "limit": 0.0 if limit is None else limit,
        "H": hidden,
        "INTER": inter,
        "TOP_K": top_k,
        **_strides("W", of.gate),
        **_strides("UP", of.up),
        "B_E": 0 if bias is None else bias.stride(0),
        "GATE_AT": of.gate_at,
        "UP_AT": of.up_at,
        "STEP": of.step,
        "GATED": of.gated,
        "ACT": act,
        "HAS_LIMIT": limit is not None,
        "WEIGHT_ON_INPUT": on_input,
    }
    down = {"H": hidden, "INTER": inter, **_strides("W", w2)}
    h = x.new_empty((n_pairs, inter))
    if n_pairs <= tuned("experts", {"PAIRS": 32})["PAIRS"]:
        dependent = dependent_launch(x.device)
        launch = tuned("experts_gate_up_pairs", _gate_up_pairs_defaults(x.dtype, across))
        launch |= {"BLOCK_N": fit(launch["BLOCK_N"], inter), "BLOCK_K": fit(launch["BLOCK_K"], hidden)}
        programs = launch.pop("PROGRAMS")
        gate_up_pairs_kernel[grid(n_pairs * triton.cdiv(inter, launch["BLOCK_N"]), x, programs)](
            x, weights, ids, of.gate, of.up, of.gate_bias, of.up_bias, h, n_pairs, row_stride(x),
            E=n_experts, MERGED=of.gated and of.step == 2 and across, **gate_up, **launch, **dependent,
        )  # fmt: skip
        common = {"E": n_experts, "TOP_K": top_k, "WEIGHT_ON_INPUT": on_input, **dependent}
        slots = triton.next_power_of_2(top_k)
        if most_rows := _whole_rows(w2, slots):
            launch = tuned("experts_down_rows_pairs", {"ROWS": most_rows, "AHEAD": most_rows * 3 // 4})
            launch["ROWS"] = min(launch["ROWS"], most_rows)
            launch["AHEAD"] = min(launch["AHEAD"], launch["ROWS"])
            down_rows_kernel[grid(n_tokens * triton.cdiv(hidden, launch["ROWS"]), x)](
                h, weights, ids, w2, b2, y, n_tokens,
                H=hidden, INTER=inter, W_E=w2.stride(0), W_N=w2.stride(1),
                BLOCK_S=slots, BLOCK_K=_WARP_BYTES // x.itemsize, num_warps=min(slots, _MOST_WARPS), **common, **launch,
            )  # fmt: skip
            return y
        launch = tuned(
            "experts_down_pairs", _down_pairs_defaults(x.dtype, w2.stride(1) == 1 and w2.stride(2) != 1, fit(8, top_k))
        )
        launch |= {"BLOCK_S": fit(launch["BLOCK_S"], top_k), "BLOCK_K": fit(launch["BLOCK_K"], inter)}
        down_pairs_kernel[grid(n_tokens * triton.cdiv(hidden, launch["BLOCK_N"]), x)](
            h, weights, ids, w2, b2, y, n_tokens, ASCEND=False, **common, **down, **launch
        )
        return y

    rows = n_pairs / n_experts
    block_m = tuned("experts_tiles", {"BLOCK_M": _tile_rows(x.dtype, rows)})["BLOCK_M"]
    tiles = expert_plan.sort_pairs(ids, n_experts, block_m)
    launch = tuned("experts_gate_up_tiles", _tiles_defaults(x.dtype, block_m, 64 if block_m > 32 else 32))
    launch |= {"BLOCK_N": fit(launch["BLOCK_N"], inter, 16), "BLOCK_K": fit(launch["BLOCK_K"], hidden, 16)}
    gate_up_tiles_kernel[grid(tiles.max_tiles * triton.cdiv(inter, launch["BLOCK_N"]), x)](
        x, weights, tiles.order, tiles.tiles, of.gate, of.up, of.gate_bias, of.up_bias, h,
        tiles.max_tiles, row_stride(x),
        MERGED=of.gated and layout != "split" and (of.step == 2 or not across),
        BLOCK_M=block_m, ASCEND=False, **gate_up, **launch,
    )  # fmt: skip
    results = x.new_empty((n_pairs, hidden))
    launch = tuned("experts_down_tiles", _tiles_defaults(x.dtype, block_m, 128 if block_m > 32 else 64))
    launch |= {"BLOCK_N": fit(launch["BLOCK_N"], hidden, 16), "BLOCK_K": fit(launch["BLOCK_K"], inter, 16)}
    down_tiles_kernel[grid(tiles.max_tiles * triton.cdiv(hidden, launch["BLOCK_N"]), x)](
        h, tiles.order, tiles.tiles, w2, b2, results, tiles.max_tiles,
        BLOCK_M=block_m, ASCEND=False, **down, **launch,
    )  # fmt: skip
    expert_plan.combine(results, weights, ids, y, n_experts, on_input)
    return y


def experts_refusal(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    transposed: bool = False,
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernels do not take the case, in words, or None."""
    if layout not in canonical.LAYOUTS:
        return f"layout = {layout!r} is not one of {', '.join(canonical.LAYOUTS)}"
    if weight_on not in canonical.WEIGHT_ON:
        return f"weight_on = {weight_on!r} is not one of {', '.join(canonical.WEIGHT_ON)}"
    operands = {"w13": w13, "w2": w2, "b13": b13, "b2": b2, "w3": w3, "b3": b3}
    for name, tensor in operands.items():
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, but x is {x.dtype}"
    if (layout == "split") != (w3 is not None):
        return "layout = 'split' and w3 belong together"
    reason = expert_plan.refusal(x, weights, ids, w13.shape[0], layout != "none", act, limit, out_dtype)
    return reason or expert_plan.too_wide(w13=w13, w2=w2, w3=w3)


def _projections(
    layout: str,
    w13: torch.Tensor,
    w3: torch.Tensor | None,
    b13: torch.Tensor | None,
    b3: torch.Tensor | None,
    inter: int,
) -> _Projections:
    bias = b13 if b13 is None else b13.contiguous()
    if layout == "split":
        assert w3 is not None
        return _Projections(w13, w3, bias, b3 if b3 is None else b3.contiguous(), 0, 0, 1, True)
    gate_at, up_at, step = {
        "gate_up": (0, inter, 1),
        "up_gate": (inter, 0, 1),
        "interleaved": (0, 1, 2),
        "none": (0, 0, 1),
    }[layout]
    return _Projections(w13, w13, bias, bias, gate_at, up_at, step, layout != "none")


def _strides(name: str, matrix: torch.Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("ENK", matrix.stride(), strict=True)}


def _gate_up_pairs_defaults(dtype: torch.dtype, across: bool) -> dict[str, int]:
    if across:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "PROGRAMS": 0, "num_warps": 4}
    return {"BLOCK_N": 1, "BLOCK_K": 4 * _WARP_BYTES // dtype.itemsize, "PROGRAMS": 0, "num_warps": 2}


def _whole_rows(w2: torch.Tensor, slots: int) -> int:
    """How many rows of this length a program of ``down_rows_kernel`` holds, a power of two; 0 where too few."""
    if w2.stride(2) != 1:
        return 0
    loads = triton.cdiv(w2.shape[2] * w2.itemsize, _WARP_BYTES) * triton.cdiv(slots, _MOST_WARPS)
    rows = min(8, _ROW_REGISTERS // (4 * loads))
    return 1 << (rows.bit_length() - 1) if rows >= _FEWEST_ROWS else 0


def _down_pairs_defaults(dtype: torch.dtype, across: bool, slots: int) -> dict[str, int]:
    if across:
        return {"BLOCK_S": 4, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 8}
    return {"BLOCK_S": slots, "BLOCK_N": 1, "BLOCK_K": 512 // dtype.itemsize, "num_warps": max(1, slots // 2)}


def _tile_rows(dtype: torch.dtype, rows: float) -> int:
    """Rows of a tile for an average of so many rows an expert."""
    if dtype == torch.float32:
        return 16 if rows <= 16 else 32
    return 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 96 else 128


def _tiles_defaults(dtype: torch.dtype, block_m: int, block_n: int) -> dict[str, int]:
    if dtype == torch.float32:
        # Without tensor cores: small blocks, or the sums do not fit the registers.
        return {"BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 4, "num_warps": 4, "num_stages": 2}
    if block_m <= 32:
        return {"BLOCK_N": block_n, "BLOCK_K": 128, "GROUP": 1, "num_warps": 4, "num_stages": 4}
    if block_m == 64:
        return {"BLOCK_N": block_n, "BLOCK_K": 64, "GROUP": 4, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_N": block_n, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}
