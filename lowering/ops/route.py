"""``route``: router logits to expert weights and ids, for softmax, sigmoid and sqrt-softplus routers of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

# Score functions over the expert dimension. "identity" serves routers that select on raw logits.
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda z: torch.softmax(z, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
ORDERS = ("before", "after")
GROUP_SCORES = ("max", "top2sum")
GROUP_FILLS = ("-inf", "zero")
RENORMALIZE = ("none", "eps", "clamp")
WEIGHT_SOURCES = ("scores", "choice")

SCHEMA = (
    "(Tensor logits, Tensor? bias=None, *, int top_k, str score='softmax', str order='before',"
    " ScalarType score_dtype=float, int n_group=1, int topk_group=1, str group_score='max', str group_fill='-inf',"
    " str weight_source='scores', str renormalize='none', float eps=0.0, float scale=1.0,"
    " ScalarType? out_dtype=None, bool sorted=True) -> (Tensor weights, Tensor ids)"
)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select ``top_k`` of E experts per token.

    Args:
        logits: [..., E] floating; the router projection's output, in the dtype the model wrote.
        bias: [E]; correction added to the scores for selection only (DeepSeek-V3 ``e_score_correction_bias``).
        score: key of ``SCORES``, computed in ``score_dtype``.
        order: ``before``: score all experts, then select; ``after``: select on (biased) logits, then score the
            selected ones (gpt-oss, Granite).
        n_group, topk_group, group_score, group_fill: group-limited selection: experts form ``n_group`` equal groups,
            each scored by its largest (``max``, DeepSeek-V2) or by the sum of its two largest choices (``top2sum``,
            DeepSeek-V3); experts outside the best ``topk_group`` groups take the fill value before the selection.
        weight_source: ``scores``: weights are the unbiased scores of the selected experts; ``choice``: the very values
            that were selected on.
        renormalize: ``none``; ``eps``: ``w / (sum(w) + eps)``; ``clamp``: ``w / max(sum(w), eps)``.
        scale: factor on the weights (routed scaling), after renormalisation.
        out_dtype: dtype of the weights, cast last; default the computing dtype.
        sorted: as in ``torch.topk``; the order within a token's k has no meaning when False.

    Returns:
        weights [..., top_k] and ids [..., top_k] int32. Names follow vLLM's ``fused_topk`` and ``grouped_topk`` and
        torch_npu's ``npu_moe_gating_top_k``.
    """
    z = logits.to(score_dtype)
    score_of = SCORES[score]
    scores = score_of(z) if order == "before" else z
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        choice = _limit_to_groups(choice, n_group, topk_group, group_score, group_fill)
    values, ids = torch.topk(choice, top_k, dim=-1, sorted=sorted)
    source_is_values = weight_source == "choice" or (bias is None and n_group == 1)
    weights = values if source_is_values else scores.gather(-1, ids)
    if order == "after":
        weights = score_of(weights)
    if renormalize == "eps":
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + eps if eps else total)
    elif renormalize == "clamp":
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=eps)
    if scale != 1.0:
        weights = weights * scale
    return weights.to(out_dtype or weights.dtype), ids.to(torch.int32)


def _limit_to_groups(
    choice: torch.Tensor, n_group: int, topk_group: int, group_score: str, group_fill: str
) -> torch.Tensor:
    grouped = choice.unflatten(-1, (n_group, -1))
    by_max = group_score == "max"
    group_scores = grouped.max(dim=-1).values if by_max else grouped.topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(group_scores, topk_group, dim=-1, sorted=False)[1]
    keep = torch.zeros_like(group_scores).scatter(-1, best, 1).bool()
    keep = keep.unsqueeze(-1).expand_as(grouped).flatten(-2)
    return choice.masked_fill(~keep, float("-inf") if group_fill == "-inf" else 0.0)


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    cases: dict[str, dict[str, object]] = {
        "qwen3_moe": dict(E=128, top_k=8, renormalize="eps", out_dtype=dtype),
        "mixtral": dict(E=8, top_k=2, renormalize="eps"),
        "gpt_oss": dict(E=32, top_k=4, order="after", score_dtype=dtype),
        "deepseek_v2": dict(E=64, top_k=6, n_group=8, topk_group=3, group_fill="zero", scale=16.0),
        "deepseek_v3": dict(
            E=256, top_k=8, bias=True, score="sigmoid", n_group=8, topk_group=4, group_score="top2sum",
            renormalize="eps", eps=1e-20, scale=2.5, sorted=False,
        ),
        "minimax_m2": dict(E=256, top_k=8, bias=True, score="sigmoid", renormalize="eps", sorted=False),
        "deepseek_v4": dict(E=64, top_k=6, bias=True, score="sqrtsoftplus", renormalize="eps", eps=1e-20, scale=1.5),
        "ernie4_5": dict(E=64, top_k=6, bias=True, renormalize="clamp", eps=1e-12),
    }  # fmt: skip
    for name, case in cases.items():
        n_experts = int(case.pop("E"))  # type: ignore[call-overload]
        bias = torch.randn(n_experts, generator=rng) * 0.1 if case.pop("bias", False) else None
        for tokens in (1, 5, 64):
            logits = torch.randn(tokens, n_experts, generator=rng).to(dtype)
            yield Sample(f"{name}-T{tokens}", (logits, bias), case)


ROUTE = CanonicalOp(
    name="route",
    schema=SCHEMA,
    reference=route,
    tolerance=uniform_tolerance(
        fp32=Tolerance(1e-6, 1e-5, 1e-5), half=Tolerance(1e-3, 2e-3, 1e-3), bf16=Tolerance(4e-3, 1.6e-2, 4e-3)
    ),
    samples=_samples,
).register()
