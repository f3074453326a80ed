"""``qk_norm_rope`` as ``npu_rms_norm`` and ``npu_rotary_mul`` on queries and keys.

``npu_rotary_mul`` in its half mode computes ``x * cos + rotate_half(x) * sin`` on rank 4 with tables as wide as what is
rotated; where only the leading elements of a head rotate, the rest is joined behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, require
from moe_fx.lowering.ascend.norms import check_norm, rms_norm
from moe_fx.lowering.inline import inline

_MAX_WIDTH = 896


def choose(node: fx.Node) -> Choice:
    """The operators for a ``qk_norm_rope`` node.

    Raises:
        Refused: they cannot compute it.
    """
    a = bound(node)
    for x, weight in ((a["q"], a["q_weight"]), (a["k"], a["k_weight"])):
        check_norm(a, x, weight)
    dtype, tables = value(a["q"]).dtype, (value(a["cos"]), value(a["sin"]))
    rotary_dim = tables[0].shape[-1]
    require(a["q_bias"] is None and a["k_bias"] is None, "the norms have biases")
    require(a["rope"] == "half", f"rope {a['rope']!r}; npu_rotary_mul rotates halves with full-width tables")
    require(
        all(t.dtype == dtype for t in tables) and a["rope_dtype"] in (None, dtype), "the rotation runs in another dtype"
    )
    require(all(t.dim() == 3 for t in tables), "the tables are not [B, S, R]")
    require(rotary_dim < _MAX_WIDTH and rotary_dim % 2 == 0, f"{rotary_dim} rotated elements")
    static = {key: a[key] for key in ("eps", "norm", "layout")}

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        operands = [a[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin")]
        inline(gm, node, norm_then_rotate, operands, **static)

    return Choice("torch_npu rms_norm + rotary_mul", rewrite)


def norm_then_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``qk_norm_rope`` with rope ``half``."""
    return _one(q, q_weight, cos, sin, **attributes), _one(k, k_weight, cos, sin, **attributes)


def _one(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, eps: float, norm: str, layout: str
) -> torch.Tensor:
    h = rms_norm(x.flatten(-2) if norm == "full" else x, weight, eps=eps)
    if norm == "full":
        h = h.unflatten(-1, x.shape[-2:])
    if layout == "bnsd":
        h = h.transpose(1, 2)
    heads = 2 if layout == "bsnd" else 1
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    rotary_dim = cos.shape[-1]
    if rotary_dim == h.shape[-1]:
        return torch.ops.npu.npu_rotary_mul.default(h, cos, sin, "half", None)
    rotated = torch.ops.npu.npu_rotary_mul.default(h[..., :rotary_dim], cos, sin, "half", None)
    return torch.cat((rotated, h[..., rotary_dim:]), dim=-1)
