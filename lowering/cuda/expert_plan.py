"""What launchers of fused experts share: what they take, sorting pairs into tiles, and the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moe_fx.lowering.cuda import configs, device
from moe_fx.lowering.cuda.operands import DTYPE_NAMES, OFFSETS
from moe_fx.lowering.ops.activation import ACTIVATIONS, UNARY
from moe_fx.lowering.triton.expert_tiles import count_pairs_kernel, place_pairs_kernel
from moe_fx.lowering.triton.experts_grouped import combine_kernel

MAX_EXPERTS = 512
MAX_TOP_K = 32
# Pairs that one program per expert counts by itself; beyond, a kernel of one program per block of pairs counts first.
COUNTED_AT_ONCE = 8192
_COMBINE_BLOCK = 1024

# The kernels that every experts op launches, with what a tuner may try.
TUNABLE: dict[str, dict[str, tuple[int, ...]]] = {
    "expert_tiles": {"BLOCK_P": (512, 1024, 2048, 4096), "num_warps": (4, 8)},
}


@dataclass(frozen=True)
class Tiles:
    """Pairs sorted by expert and cut into tiles; see ``place_pairs_kernel``."""

    order: torch.Tensor
    tiles: torch.Tensor
    max_tiles: int


def refusal(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    n_experts: int,
    gated: bool,
    act: str,
    limit: float | None,
    out_dtype: torch.dtype | None,
) -> str | None:
    """Why no kernel takes these operands of an experts op, or None; token counts may be symbolic."""
    for name, dtype in (("x", x.dtype), ("weights", weights.dtype), ("out_dtype", out_dtype or x.dtype)):
        if dtype not in DTYPE_NAMES:
            return f"{name} is {dtype}, not bf16, fp16 or fp32"
    if ids.dtype not in (torch.int32, torch.int64):
        return f"ids are {ids.dtype}, not int32 or int64"
    if not 0 < n_experts <= MAX_EXPERTS:
        return f"{n_experts} experts are more than {MAX_EXPERTS}" if n_experts else "there are no experts"
    if not 0 < ids.shape[1] <= MAX_TOP_K:
        return f"k = {ids.shape[1]} is not between 1 and {MAX_TOP_K}"
    if act not in (ACTIVATIONS if gated else UNARY):
        return f"act = {act!r} has no kernel" + ("" if gated else " without an up projection")
    if act == "silu_then_clamp" and limit is None:
        return "act = 'silu_then_clamp' needs a limit"
    return None


def too_wide(**matrices: torch.Tensor | None) -> str | None:
    """Why weights [E, n, k] lie too far apart for 32-bit offsets within an expert, or None."""
    for name, matrix in matrices.items():
        if matrix is not None:
            span = sum((size - 1) * stride for size, stride in zip(matrix.shape[1:], matrix.stride()[1:], strict=True))
            if span >= OFFSETS:
                return f"one expert of {name} spans {span} elements, more than 32-bit offsets reach"
    return None


def grid(items: int, like: torch.Tensor, programs: int = 0) -> tuple[int]:
    """One program per work item, or at most so many ``programs`` to a multiprocessor where that is not 0.

    In the interpreter a few, so that the loops over items run too.
    """
    if device.INTERPRETED:
        programs = programs or 1
    return (min(items, device.programs(like, programs)) if programs else items,)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [n, K] with unit stride along K, copied only if it has another."""
    return x if x.stride(1) == 1 else x.contiguous()


def row_stride(x: torch.Tensor) -> int:
    """The distance of rows of ``x`` [n, K], or K for a single row, whose stride may be any: one kernel serves both."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def fit(block: int, size: int, least: int = 1) -> int:
    """A block no larger than the power of two that covers ``size``."""
    return max(least, min(block, triton.next_power_of_2(size)))


def sort_pairs(ids: torch.Tensor, n_experts: int, block_m: int) -> Tiles:
    """Sort the pairs of dense ids [T, k] by expert and cut them into tiles, without a host synchronisation."""
    n_pairs, n_tokens = ids.numel(), ids.shape[0]
    hit = min(n_pairs, n_experts)
    max_tiles = hit + (n_pairs - hit) // block_m
    order = torch.empty(n_pairs, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=ids.device)
    defaults = {"BLOCK_P": 1024 if n_pairs <= COUNTED_AT_ONCE else 4096, "num_warps": 4}
    launch = configs.lookup("expert_tiles", f"E{n_experts}", n_tokens, defaults, ids.device)
    block_p = fit(launch["BLOCK_P"], n_pairs, 32)
    shape = {
        "E": n_experts,
        "BLOCK_E": triton.next_power_of_2(n_experts),
        "BLOCK_P": block_p,
        "ASCEND": False,
        "num_warps": launch["num_warps"],
    }
    counts = None
    if n_pairs > COUNTED_AT_ONCE:
        n_blocks = triton.cdiv(n_pairs, block_p)
        counts = torch.empty((n_blocks, shape["BLOCK_E"]), dtype=torch.int32, device=ids.device)
        count_pairs_kernel[grid(n_blocks, ids)](ids, counts, n_pairs, **shape)
    place_pairs_kernel[grid(n_experts, ids)](ids, counts, order, tiles, n_pairs, max_tiles, BLOCK_M=block_m, **shape)
    return Tiles(order, tiles, max_tiles)


def combine(
    results: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, y: torch.Tensor, n_experts: int, on_input: bool
) -> None:
    """y [T, H] = the weighted sum of results [T * k, H] over each token's pairs."""
    n_tokens, hidden = y.shape
    block = fit(_COMBINE_BLOCK, hidden)
    combine_kernel[grid(n_tokens * triton.cdiv(hidden, block), y)](
        results,
        weights,
        ids,
        y,
        n_tokens,
        E=n_experts,
        H=hidden,
        TOP_K=ids.shape[1],
        WEIGHT_ON_INPUT=on_input,
        BLOCK_H=block,
        num_warps=4,
    )
