"""Launches fused experts on int4 weights (W4A16): the canonical ``experts_int4`` on CUDA tensors.

Few pairs take four launches (planes of x, gate and up, planes of h, down), more take tiles (planes of x, sorting, two
products, the sum).
"""

from __future__ import annotations

import math

import torch
import triton

from moe_fx.lowering.cuda import configs, expert_plan
from moe_fx.lowering.cuda.device import INTERPRETED, dependent_launch, on_its_device
from moe_fx.lowering.cuda.expert_plan import fit, grid, row_stride
from moe_fx.lowering.cuda.operands import DTYPE_NAMES
from moe_fx.lowering.triton.experts_int4_grouped import down_tiles_int4_kernel, gate_up_tiles_int4_kernel
from moe_fx.lowering.triton.experts_int4_pairs import down_pairs_int4_kernel, gate_up_pairs_int4_kernel
from moe_fx.lowering.triton.planes import fixed_point_planes_kernel, split_planes_kernel

# Words of eight weights that a lane loads, 16 bytes; a group has at least as many.
_QUAD = 4
# Inputs of a tile that are scaled together: a power of two that divides a group; half of it fills a tensor core's step.
_LARGEST_CHUNK = 128
_LEAST_CHUNK = 32
# Channels of gate and up among the rows of w13: first of gate, first of up (in units of I), distance.
_LAYOUTS = {"gate_up": (0, 1, 1), "up_gate": (1, 0, 1), "interleaved": (0, 0, 2), "none": (0, 0, 1)}
# Elements of a plane that a program moves at a time.
_PLANES_BLOCK = 128
# Kernel -> parameter -> values that a tuner may try; combinations that do not fit a GPU fail to compile there.
TUNABLE: dict[str, dict[str, tuple[int, ...]]] = {
    # Up to how many pairs (tokens * k) the kernels for few tokens run.
    "experts_int4": {"PAIRS": (0, 8, 16, 32, 64, 128, 256, 512)},
    "experts_int4_planes_pairs": {"BLOCK_R": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4)},
    "experts_int4_gate_up_pairs": {"BLOCK_N": (1, 2, 4, 8), "BLOCK_W": (64, 128, 256, 512), "num_warps": (1, 2, 4, 8)},
    "experts_int4_down_pairs": {"BLOCK_N": (1, 2, 4, 8), "BLOCK_W": (128, 256, 512, 1024), "num_warps": (1, 2, 4, 8)},
    "experts_int4_tiles": {"BLOCK_M": (16, 32, 64, 128)},
    "experts_int4_gate_up_tiles": {
        "BLOCK_N": (32, 64, 128),
        "GROUP": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "experts_int4_down_tiles": {
        "BLOCK_N": (32, 64, 128),
        "GROUP": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    **expert_plan.TUNABLE,
}


@on_its_device
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
    """The canonical ``experts_int4`` (see there), W4A16, on weights where they lie.

    Returns:
        y [T, H], dense.
    """
    n_tokens, hidden = x.shape
    y = x.new_empty((n_tokens, hidden), dtype=out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    n_experts, _, half = w2.shape
    inter, top_k = 2 * half, ids.shape[1]
    n_pairs = n_tokens * top_k
    weights, ids = weights.contiguous(), ids.contiguous()
    b13 = b13 if b13 is None else b13.contiguous()
    b2 = b2 if b2 is None else b2.contiguous()
    group13, group2 = hidden // w13_scale.shape[2], inter // w2_scale.shape[2]
    variant = f"{DTYPE_NAMES[x.dtype]}-g{group13}-H{hidden}-I{inter}-E{n_experts}-k{top_k}"

    def tuned(kernel: str, defaults: dict[str, int]) -> dict[str, int]:
        return configs.lookup(kernel, variant, n_tokens, defaults, x.device)

    few = n_pairs <= tuned("experts_int4", {"PAIRS": 256})["PAIRS"]
    gate_at, up_at, step = _LAYOUTS[layout]
    gate_up = {
        "alpha": alpha,
        "limit": 0.0 if limit is None else limit,
        "H": hidden,
        "INTER": inter,
        "TOP_K": top_k,
        **_strides(w13, w13_scale, w13_zero),
        "B_E": 0 if b13 is None else b13.stride(0),
        "GATE_AT": gate_at * inter,
        "UP_AT": 1 if step == 2 else up_at * inter,
        "STEP": step,
        "GATED": layout != "none",
        "ACT": act,
        "HAS_LIMIT": limit is not None,
    }
    down = {"H": hidden, "INTER": inter, **_strides(w2, w2_scale, w2_zero)}
    h = x.new_empty((n_pairs, inter))
    if few:
        dependent = dependent_launch(x.device)
        runs = tuned("experts_int4_planes_pairs", {"BLOCK_R": 8, "num_warps": 1})
        planes, scales = word_planes(x, runs, dependent, first=True)
        gate_up |= {**_word_strides(w13), "GROUP": group13, "QUAD": _QUAD, "ASM": not INTERPRETED}
        launch = tuned("experts_int4_gate_up_pairs", {"BLOCK_N": 4, "BLOCK_W": 32 * _QUAD, "num_warps": 1})
        launch |= {"BLOCK_W": fit(launch["BLOCK_W"], hidden // 8, _QUAD)}
        gate_up_pairs_int4_kernel[grid(n_pairs * triton.cdiv(inter, launch["BLOCK_N"]), x)](
            planes, scales, ids, w13.view(torch.int32), w13_scale, w13_zero, b13, h, n_pairs,
            E=n_experts, **gate_up, **launch, **dependent,
        )  # fmt: skip
        planes, scales = word_planes(h, runs, dependent, first=False)
        down |= {**_word_strides(w2), "GROUP": group2, "QUAD": _QUAD, "ASM": not INTERPRETED}
        launch = tuned("experts_int4_down_pairs", {"BLOCK_N": 8, "BLOCK_W": 64 * _QUAD, "num_warps": 2})
        launch |= {"BLOCK_W": fit(launch["BLOCK_W"], top_k * inter // 8, _QUAD)}
        down_pairs_int4_kernel[grid(n_tokens * triton.cdiv(hidden, launch["BLOCK_N"]), x)](
            planes, scales, weights, ids, w2.view(torch.int32), w2_scale, w2_zero, b2, y, n_tokens,
            E=n_experts, TOP_K=top_k, MODEL=DTYPE_NAMES[x.dtype], ASCEND=False, **down, **launch, **dependent,
        )  # fmt: skip
        return y

    # Without tensor cores, a larger chunk of a tile would not fit the registers.
    largest = _LEAST_CHUNK if x.dtype == torch.float32 else _LARGEST_CHUNK
    for of, group in ((gate_up, group13), (down, group2)):
        chunk = math.gcd(group, largest)
        of |= {"CHUNK": chunk, "SHARE": group // chunk}
    planes = split_planes(x, 2, {"PDL": False})
    block_m = tuned("experts_int4_tiles", {"BLOCK_M": _tile_rows(x.dtype, n_pairs / n_experts)})["BLOCK_M"]
    tiles = expert_plan.sort_pairs(ids, n_experts, block_m)
    launch = tuned("experts_int4_gate_up_tiles", _tiles_defaults(x.dtype, block_m))
    launch |= {"BLOCK_N": fit(launch["BLOCK_N"], inter, 16)}
    gate_up_tiles_int4_kernel[grid(tiles.max_tiles * triton.cdiv(inter, launch["BLOCK_N"]), x)](
        planes, tiles.order, tiles.tiles, w13, w13_scale, w13_zero, b13, h, tiles.max_tiles,
        BLOCK_M=block_m, **gate_up, **launch,
    )  # fmt: skip
    results = x.new_empty((n_pairs, hidden))
    launch = tuned("experts_int4_down_tiles", _tiles_defaults(x.dtype, block_m))
    launch |= {"BLOCK_N": fit(launch["BLOCK_N"], hidden, 16)}
    down_tiles_int4_kernel[grid(tiles.max_tiles * triton.cdiv(hidden, launch["BLOCK_N"]), x)](
        h, tiles.order, tiles.tiles, w2, w2_scale, w2_zero, b2, results, tiles.max_tiles,
        BLOCK_M=block_m, **down, **launch,
    )  # fmt: skip
    expert_plan.combine(results, weights, ids, y, n_experts, on_input=False)
    return y


def experts_int4_refusal(
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
) -> str | None:
    """Why the kernels do not take the case, in words, or None."""
    if dynamic_activations:
        return "int4 weights with int8 activations (dynamic_activations=True) have no kernel; W4A16 has"
    if layout not in _LAYOUTS:
        return f"layout = {layout!r} is not one of {', '.join(_LAYOUTS)}"
    for name, packed, scale, zero in (("w13", w13, w13_scale, w13_zero), ("w2", w2, w2_scale, w2_zero)):
        if packed.dtype != torch.uint8 or (zero is not None and zero.dtype != torch.uint8):
            return f"{name} and its zero points must be uint8"
        if scale.dtype not in DTYPE_NAMES:
            return f"{name}_scale is {scale.dtype}, not bf16, fp16 or fp32"
        if packed.stride(2) != 1 or packed.stride(1) % 4 or packed.stride(0) % 4 or packed.storage_offset() % 4:
            return f"rows of {name} are not whole words of 32 bits, side by side"
        inputs, groups = 2 * packed.shape[2], scale.shape[2]
        if groups == 0 or inputs % groups or (inputs // groups) % _LEAST_CHUNK:
            return f"{name} has {groups} scales for {inputs} inputs; groups must be multiples of {_LEAST_CHUNK}"
    for name, bias in (("b13", b13), ("b2", b2)):
        if bias is not None and bias.dtype not in DTYPE_NAMES:
            return f"{name} is {bias.dtype}, not bf16, fp16 or fp32"
    hidden, inter = x.shape[1], 2 * w2.shape[2]
    rows = inter if layout == "none" else 2 * inter
    for name, tensor, shape in (
        ("w13", w13, (w13.shape[0], rows, hidden // 2)),
        ("w2", w2, (w13.shape[0], hidden, inter // 2)),
        ("w13_scale", w13_scale, (w13.shape[0], rows, w13_scale.shape[2])),
        ("w2_scale", w2_scale, (w13.shape[0], hidden, w2_scale.shape[2])),
        ("w13_zero", w13_zero, tuple(w13_scale.shape)),
        ("w2_zero", w2_zero, tuple(w2_scale.shape)),
        ("b13", b13, (w13.shape[0], rows)),
        ("b2", b2, (w13.shape[0], hidden)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)}, not {list(shape)}"
    reason = expert_plan.refusal(x, weights, ids, w13.shape[0], layout != "none", act, limit, out_dtype)
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale, "w13_zero": w13_zero, "w2_zero": w2_zero}
    return reason or expert_plan.too_wide(w13=w13, w2=w2, **scales)


def word_planes(
    x: torch.Tensor, launch: dict[str, int], dependent: dict[str, bool], *, first: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [n, K] in planes that meet words of eight weights, and their scales.

    Args:
        launch: BLOCK_R, runs of 32 elements at a time, and num_warps.
        first: of a chain of dependent launches; see ``fixed_point_planes_kernel``. fp32 rows stay what they are.
    """
    if x.dtype == torch.float32:
        return split_planes(x, 8, dependent), None
    x = expert_plan.dense_rows(x)
    n_rows, width = x.shape
    planes = torch.empty((n_rows, 4, width // 8), dtype=torch.int32, device=x.device)
    scales = torch.empty((n_rows, 2, width // 32), dtype=torch.float32, device=x.device)
    launch = {**launch, "BLOCK_R": fit(launch["BLOCK_R"], width // 32)}
    fixed_point_planes_kernel[grid(n_rows * triton.cdiv(width // 32, launch["BLOCK_R"]), x)](
        x, planes, scales, n_rows, row_stride(x), K=width, WAIT_FIRST=first, **launch, **dependent
    )
    return planes, scales


def split_planes(x: torch.Tensor, planes: int, dependent: dict[str, bool]) -> torch.Tensor:
    """Rows [n, K] as [n, planes, K / planes]; see ``split_planes_kernel``."""
    x = expert_plan.dense_rows(x)
    n_rows, width = x.shape
    result = x.new_empty((n_rows, planes, width // planes))
    block = fit(_PLANES_BLOCK, width // planes)
    split_planes_kernel[grid(n_rows * triton.cdiv(width // planes, block), x)](
        x, result, n_rows, row_stride(x), K=width, PLANES=planes, BLOCK=block, num_warps=4, **dependent
    )
    return result


def _word_strides(packed: torch.Tensor) -> dict[str, int]:
    """Strides of ``packed.view(torch.int32)``."""
    return {"W_E": packed.stride(0) // 4, "W_N": packed.stride(1) // 4}


def _strides(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> dict[str, int]:
    zero_strides = (0, 0, 0) if zero is None else zero.stride()
    return {
        "W_E": packed.stride(0),
        "W_N": packed.stride(1),
        **{f"S_{axis}": stride for axis, stride in zip("ENK", scale.stride(), strict=True)},
        **{f"Z_{axis}": stride for axis, stride in zip("ENK", zero_strides, strict=True)},
    }


def _tile_rows(dtype: torch.dtype, rows: float) -> int:
    """Rows of a tile for an average of so many rows an expert."""
    if dtype == torch.float32:
        return 16
    return 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 96 else 128


def _tiles_defaults(dtype: torch.dtype, block_m: int) -> dict[str, int]:
    if dtype == torch.float32:
        # Without tensor cores: small blocks, or the sums do not fit the registers.
        return {"BLOCK_N": 32, "GROUP": 4, "num_warps": 4, "num_stages": 2}
    if block_m <= 32:
        return {"BLOCK_N": 64, "GROUP": 1, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_N": 128, "GROUP": 4 if block_m == 64 else 8, "num_warps": 8, "num_stages": 3}
