"""``route`` on ``npu_moe_gating_top_k_softmax(_v2)`` where one of them computes it, else on ``npu_moe_gating_top_k``.

What the operators compute, from torch_npu's documentation and the kernels' published source:

* ``npu_moe_gating_top_k_softmax``: softmax, top-k. No bias, no groups, no renormalisation.
* ``npu_moe_gating_top_k_softmax_v2(renorm=1)``: top-k, then a softmax over the selected.
* ``npu_moe_gating_top_k``: scores (``norm_type`` 0 softmax, 1 sigmoid); plus bias for the selection; groups ranked
  by their largest choice (``group_select_mode`` 0) or the sum of their two largest (1), of which ``k_group`` of
  ``group_count`` stay, the others as if at minus infinity; top-k; the unbiased scores of the selected. Sigmoid scores
  are then divided by their sum plus ``eps``, always; softmax scores never. Everything times ``routed_scaling_factor``.

All compute in fp32 and return x's dtype, so logits are given in fp32 where the model scores in fp32. A renormalisation
that the operator does not do is done behind it, in fp32 as the model writes it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ascend import gating
from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, Refused, require
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.inline import inline

# Limits of npu_moe_gating_top_k.
_MAX_EXPERTS = 2048
_MIN_GROUP = 3
_GROUP_ALIGNMENT = 32
_MAX_TOP_K = 1024


def choose(node: fx.Node, settings: Settings) -> Choice:
    """The operator for a ``route`` node: torch_npu's, else the project's own, which takes what they do not.

    Raises:
        Refused: none computes it.
    """
    try:
        return _choose_torch_npus(node)
    except Refused:
        # GE has no operator for it.
        if settings.ge or not gating.takes(bound(node)):
            raise
    return _choice("moe_fx_ascend gating_topk (Ascend C)", own_gating, bound(node))


def _choose_torch_npus(node: fx.Node) -> Choice:
    a = bound(node)
    n_experts, dtype = value(a["logits"]).shape[-1], a["score_dtype"]
    floating = (torch.float32, torch.float16, torch.bfloat16)
    require(isinstance(n_experts, int), "the number of experts is symbolic")
    require(a["score"] in ("softmax", "sigmoid"), f"no gating operator scores with {a['score']}")
    require(dtype in floating and value(a["logits"]).dtype in floating, f"scores in {dtype}")
    require(a["top_k"] <= _MAX_TOP_K, f"k = {a['top_k']} is more than {_MAX_TOP_K}")
    if a["order"] == "after":
        require(a["score"] == "softmax", f"no gating operator selects first and scores with {a['score']} then")
        require(a["bias"] is None and a["n_group"] == 1, "no gating operator selects biased or grouped logits")
        return _choice("torch_npu npu_moe_gating_top_k_softmax_v2", topk_then_softmax, a)
    # The operators rank scores as they are in fp32; a model that rounds them first may rank otherwise.
    require(dtype == torch.float32, f"the model ranks scores rounded to {dtype}; the operators rank them in fp32")
    if a["score"] == "softmax" and a["bias"] is None and a["n_group"] == 1:
        return _choice("torch_npu npu_moe_gating_top_k_softmax", softmax_then_topk, a)
    _check_gating(a, n_experts)
    return _choice("torch_npu npu_moe_gating_top_k", gating_topk, a)


def _check_gating(a: dict[str, Any], n_experts: int) -> None:
    in_group = n_experts // a["n_group"]
    require(n_experts <= _MAX_EXPERTS, f"{n_experts} experts are more than {_MAX_EXPERTS}")
    require(
        a["weight_source"] == "scores" or a["bias"] is None,
        "weights are the biased scores; npu_moe_gating_top_k returns unbiased ones",
    )
    require(
        a["bias"] is None or value(a["bias"]).dtype in (torch.float32, torch.float16, torch.bfloat16),
        "the bias is not floating",
    )
    if a["n_group"] == 1:
        return
    require(in_group >= _MIN_GROUP, f"groups of {in_group} experts; npu_moe_gating_top_k takes {_MIN_GROUP} and more")
    aligned = -(-in_group // _GROUP_ALIGNMENT) * _GROUP_ALIGNMENT * a["n_group"]
    require(aligned <= _MAX_EXPERTS, f"{a['n_group']} groups of {in_group} experts are too many")
    require(a["top_k"] <= in_group * a["topk_group"], f"k = {a['top_k']} is more than the kept groups hold")
    # Scores are positive, so experts outside the kept groups lose to those inside at 0 as at minus infinity. A bias can
    # make choices negative: then 0 wins.
    require(
        a["group_fill"] == "-inf" or a["bias"] is None,
        "experts outside the kept groups take part with 0, which beats a negative biased score",
    )


def _choice(kernel: str, form: Any, a: dict[str, Any]) -> Choice:
    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        static = {key: given for key, given in a.items() if key not in ("logits", "bias")}
        inline(gm, node, functools.partial(_on_matrix, form, static), [a["logits"], a["bias"]])

    return Choice(kernel, rewrite)


def _on_matrix(
    form: Any, a: dict[str, Any], logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operators take [T, E]; the canonical op [..., E]."""
    leading = logits.shape[:-1]
    matrix = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    weights, ids = form(matrix.to(a["score_dtype"]), bias, a)
    weights = weights.to(a["out_dtype"] or a["score_dtype"])
    if logits.dim() == 2:
        return weights, ids
    return weights.reshape(*leading, a["top_k"]), ids.reshape(*leading, a["top_k"])


def softmax_then_topk(logits: torch.Tensor, bias: None, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax routers without bias and groups (Qwen3-MoE, Mixtral, OLMoE)."""
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k_softmax.default(logits, None, a["top_k"])
    return _finish(weights, a), ids


def topk_then_softmax(logits: torch.Tensor, bias: None, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Routers that score the selected alone (gpt-oss, Granite)."""
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k_softmax_v2.default(
        logits, k=a["top_k"], finished=None, renorm=1, output_softmax=False
    )
    return _finish(weights, a), ids


def gating_topk(
    logits: torch.Tensor, bias: torch.Tensor | None, a: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid, biased and group-limited routers (DeepSeek-V2 and V3, GLM4-MoE, MiniMax-M2, AFMoE, ERNIE)."""
    sigmoid = a["score"] == "sigmoid"
    in_operator = a["renormalize"] == ("eps" if sigmoid else "none")
    weights, ids, scores = torch.ops.npu.npu_moe_gating_top_k.default(
        logits,
        a["top_k"],
        bias=None if bias is None else bias.to(logits.dtype),
        k_group=a["topk_group"],
        group_count=a["n_group"],
        group_select_mode=1 if a["group_score"] == "top2sum" else 0,
        renorm=0,
        norm_type=1 if sigmoid else 0,
        # Sigmoid weights come renormalised; where the model does otherwise, the plain scores are needed.
        out_flag=sigmoid and not in_operator,
        routed_scaling_factor=a["scale"] if in_operator else 1.0,
        eps=a["eps"],
    )
    if in_operator:
        return weights, ids
    if sigmoid:
        weights = scores.gather(-1, ids.to(torch.int64))
    return _finish(weights, a), ids


def own_gating(logits: torch.Tensor, bias: torch.Tensor | None, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Routers that torch_npu has no operator for (DeepSeek-V4)."""
    options = ("top_k", "score", "order", "n_group", "topk_group", "group_score", "renormalize", "eps", "scale")
    correction = None if bias is None else bias.to(torch.float32)
    weights, ids = torch.ops.moe_fx_ascend.gating_topk.default(logits, correction, **{key: a[key] for key in options})
    return weights, ids


def _finish(weights: torch.Tensor, a: dict[str, Any]) -> torch.Tensor:
    """Renormalisation and scale as ``route`` defines them."""
    if a["renormalize"] == "eps":
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + a["eps"] if a["eps"] else total)
    elif a["renormalize"] == "clamp":
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=a["eps"])
    return weights if a["scale"] == 1.0 else weights * a["scale"]
