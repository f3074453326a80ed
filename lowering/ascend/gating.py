"""``moe_fx_ascend::gating_topk``: routing on the NPU's vector cores, exact where torch_npu's operators are not.

It ranks equal choices by the lower id and NaN above everything, as the reference does.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fx.lowering.ascend import kernel_library
from moe_fx.lowering.ascend.arguments import value
from moe_fx.lowering.ops.route import route


def _fake(
    logits: torch.Tensor, bias: torch.Tensor | None = None, *, top_k: int, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    size = (logits.shape[0], top_k)
    return logits.new_empty(size, dtype=torch.float32), logits.new_empty(size, dtype=torch.int32)


@kernel_library.define(
    "(Tensor logits, Tensor? bias=None, *, int top_k, str score='softmax', str order='before', int n_group=1,"
    " int topk_group=1, str group_score='max', str renormalize='none', float eps=0.0, float scale=1.0)"
    " -> (Tensor weights, Tensor ids)",
    fake=_fake,
)
def gating_topk(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    order: str = "before",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``route`` with scores in fp32, weights that are unbiased scores, and other groups at minus infinity.

    Args:
        logits: [T, E] fp32, fp16 or bf16; bias: [E] fp32.
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``; all else as ``route``'s.

    Returns:
        weights [T, top_k] fp32 and ids [T, top_k] int32, the best first.

    Where the kernel library is not loaded, the reference runs.
    """
    return route(
        logits, bias, top_k=top_k, score=score, order=order, n_group=n_group, topk_group=topk_group,
        group_score=group_score, renormalize=renormalize, eps=eps, scale=scale,
    )  # fmt: skip


def takes(a: dict[str, Any]) -> bool:
    """Whether the kernel is there and computes a ``route`` call with these arguments."""
    logits, bias = value(a["logits"]), value(a["bias"])
    plain = bias is None and a["n_group"] == 1
    return (
        a["score"] in ("softmax", "sigmoid", "sqrtsoftplus")
        and a["score_dtype"] == torch.float32
        and all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in (logits, bias) if t is not None)
        and isinstance(logits.shape[-1], int)
        and (a["weight_source"] == "scores" or plain)
        # The three scores are positive: experts of other groups lose at 0 as at minus infinity, but for a bias.
        and (a["n_group"] == 1 or a["group_fill"] == "-inf" or (bias is None and a["order"] == "before"))
        and kernel_library.loaded() is not None
        and not torch.ops.moe_fx_ascend.gating_topk_refusal(
            logits.shape[-1], a["top_k"], a["n_group"], a["topk_group"], a["group_score"] == "top2sum"
        )
    )
