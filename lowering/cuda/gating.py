"""Launches the gating kernel: the canonical ``route`` on CUDA tensors."""

from __future__ import annotations

import functools
import math

import torch
import triton

from moe_fx.lowering.cuda import configs, device
from moe_fx.lowering.cuda.device import on_its_device
from moe_fx.lowering.cuda.operands import DTYPE_NAMES, near
from moe_fx.lowering.ops import route as canonical
from moe_fx.lowering.triton.gating import gating_kernel

MAX_EXPERTS = 512
MAX_TOP_K = 32
# Scores that are never negative: a fill of zero is below each of them, as -inf is.
_NOT_NEGATIVE = ("softmax", "sigmoid", "softplus", "sqrtsoftplus")


@on_its_device
def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    order: str = "before",
    score_dtype: torch.dtype = torch.float32,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    group_fill: str = "-inf",
    weight_source: str = "scores",
    renormalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    sorted: bool = True,
    num_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical ``route`` (see there), with equal choices given to the lowest id.

    Args:
        logits: [..., E] of any strides.
        num_valid: int32 or int64 scalar on the device, or None: how many tokens are no padding. Later ones get weight
            0 and id -1. The host never reads it.

    Returns:
        weights [..., top_k] and ids [..., top_k] int32, dense, each token's in falling order of choice.
    """
    n_experts = logits.shape[-1]
    after, biased = order == "after", bias is not None
    from_values = weight_source == "choice" or (not biased and n_group == 1)
    choice_dtype = torch.promote_types(score_dtype, bias.dtype) if bias is not None else score_dtype
    weight_dtype = choice_dtype if from_values else score_dtype
    weights = logits.new_empty((*logits.shape[:-1], top_k), dtype=out_dtype or weight_dtype)
    ids = logits.new_empty((*logits.shape[:-1], top_k), dtype=torch.int32)
    if weights.numel() == 0:
        return weights, ids

    scored = not after and _selects_on_scores(score, biased, n_group, group_score, group_fill, weight_source)
    narrow = logits.dtype == torch.bfloat16 and score_dtype != torch.float16 and from_values and not (scored or biased)
    rows = logits.reshape(-1, n_experts)
    n_tokens = rows.shape[0]
    block_g, block_s = _blocks(n_experts, n_group)
    if renormalize == "eps" and not eps:
        renormalize = "sum"
    launch = configs.lookup("gating", f"E{block_g * block_s}", n_tokens, _defaults(n_tokens), logits.device)
    rows = near(rows, launch["BLOCK_T"])
    n_blocks = triton.cdiv(n_tokens, launch["BLOCK_T"])
    gating_kernel[(min(n_blocks, device.programs(logits) * launch["WAVES"]),)](
        rows,
        bias if bias is None else bias.contiguous(),
        num_valid,
        weights,
        ids,
        n_tokens,
        rows.stride(0),
        rows.stride(1),
        _rounded(eps, weight_dtype) if renormalize == "clamp" else float(eps),
        float(scale),
        E=n_experts,
        TOP_K=top_k,
        N_GROUP=n_group,
        TOPK_GROUP=topk_group,
        BY_TOP2=group_score == "top2sum",
        FILL=0.0 if group_fill == "zero" and (scored or after) else -math.inf,
        SCORE=score,
        SCORED=scored,
        AFTER=after,
        SOURCE="value" if from_values else "base",
        RENORMALIZE=renormalize,
        SCORE_DTYPE=DTYPE_NAMES[score_dtype],
        CHOICE_DTYPE=DTYPE_NAMES[choice_dtype],
        WEIGHT_DTYPE=DTYPE_NAMES[weight_dtype],
        BLOCK_T=launch["BLOCK_T"],
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=triton.next_power_of_2(top_k),
        NARROW=narrow,
        ASCEND=False,
        num_warps=launch["num_warps"],
    )
    return weights, ids


def route_refusal(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    order: str = "before",
    score_dtype: torch.dtype = torch.float32,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    group_fill: str = "-inf",
    weight_source: str = "scores",
    renormalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    sorted: bool = True,
    num_valid: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these operands (fake ones will do), or None."""
    n_experts = logits.shape[-1]
    if not isinstance(n_experts, int):
        return "the number of experts is not a constant of the graph"
    operands = [logits] if bias is None else [logits, bias]
    for dtype in (*(each.dtype for each in operands), score_dtype, out_dtype or score_dtype):
        if dtype not in DTYPE_NAMES:
            return f"{dtype} is none of fp32, bf16 and fp16"
    if n_experts > MAX_EXPERTS:
        return f"E = {n_experts} is more than {MAX_EXPERTS}"
    if top_k > MAX_TOP_K:
        return f"k = {top_k} is more than {MAX_TOP_K}"
    if not 1 <= top_k <= n_experts:
        return f"k = {top_k} is not between 1 and E = {n_experts}"
    if bias is not None and tuple(bias.shape) != (n_experts,):
        return f"the bias is of shape {tuple(bias.shape)}, not [{n_experts}]"
    for name, given, known in (
        ("score", score, tuple(canonical.SCORES)),
        ("order", order, canonical.ORDERS),
        ("group_score", group_score, canonical.GROUP_SCORES),
        ("group_fill", group_fill, canonical.GROUP_FILLS),
        ("weight_source", weight_source, canonical.WEIGHT_SOURCES),
        ("renormalize", renormalize, canonical.RENORMALIZE),
    ):
        if given not in known:
            return f"{name} = {given!r} is none of {', '.join(known)}"
    return _groups_refusal(n_experts, n_group, topk_group, group_score)


def _groups_refusal(n_experts: int, n_group: int, topk_group: int, group_score: str) -> str | None:
    if n_group < 1 or n_experts % n_group:
        return f"{n_experts} experts do not divide into {n_group} groups"
    if not 1 <= topk_group <= n_group:
        return f"topk_group = {topk_group} is not between 1 and n_group = {n_group}"
    if group_score == "top2sum" and n_group > 1 and n_experts == n_group:
        return "a group of one expert has no two best"
    return None


def _selects_on_scores(
    score: str, biased: bool, n_group: int, group_score: str, group_fill: str, weight_source: str
) -> bool:
    """Whether scores must be compared; else logits serve, which every score function leaves in order.

    Logits are better where they serve: exact, and only the chosen ones need a score.
    """
    if biased or n_group == 1:
        return biased
    fill_is_lowest = group_fill == "-inf" or score in _NOT_NEGATIVE
    return group_score == "top2sum" or weight_source == "choice" or not fill_is_lowest


def _blocks(n_experts: int, n_group: int) -> tuple[int, int]:
    """Places for groups, and for the experts of one."""
    return triton.next_power_of_2(n_group), triton.next_power_of_2(n_experts // n_group)


def _defaults(n_tokens: int) -> dict[str, int]:
    """A warp to a token: a warp reduces 32-bit integers in one instruction."""
    if n_tokens <= 64:
        return {"BLOCK_T": 1, "WAVES": 2, "num_warps": 1}
    return {"BLOCK_T": 4, "WAVES": 8, "num_warps": 4}


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """As torch rounds the bound of ``clamp`` to the dtype of what it clamps."""
    return float(torch.tensor(value, dtype=dtype))
