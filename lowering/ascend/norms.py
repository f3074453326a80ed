"""``rms_norm``, ``add_rms_norm`` and ``swiglu`` on ``npu_rms_norm``, ``npu_add_rms_norm`` and ``npu_swiglu``.

The operators compute in fp32 and round to x's dtype. Where the model rounds between the norm and its weight (cast
``before``) they may differ by that one rounding, which the canonical ops' tolerances hold.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, require
from moe_fx.lowering.ascend.experts import activated, activation_name
from moe_fx.lowering.inline import inline

_FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def choose_rms_norm(node: fx.Node) -> Choice:
    """The operator for an ``rms_norm`` node.

    Raises:
        Refused: it cannot compute it.
    """
    a = bound(node)
    check_norm(a, a["x"], a["weight"])
    return _choice("npu_rms_norm", rms_norm, [a["x"], a["weight"]], eps=a["eps"])


def choose_add_rms_norm(node: fx.Node) -> Choice:
    """The operator for an ``add_rms_norm`` node; see ``choose_rms_norm``."""
    a = bound(node)
    check_norm(a, a["x"], a["weight"])
    x, residual = value(a["x"]), value(a["residual"])
    require(x.dtype == residual.dtype, "x and the residual are of two dtypes")
    return _choice("npu_add_rms_norm", add_rms_norm, [a["x"], a["residual"], a["weight"]], eps=a["eps"])


def choose_swiglu(node: fx.Node) -> Choice:
    """The operator for a ``swiglu`` node; see ``choose_rms_norm``."""
    a = bound(node)
    layout = a["layout"] if a["up"] is None else "gate_up"
    operator = activation_name(a["act"], a["limit"], layout)
    require(
        operator in ("swiglu", "clipped_swiglu"),
        f"no operator computes {a['act']} of layout {layout} with limit {a['limit']}",
    )
    require(value(a["gate"]).dtype in _FLOATING, f"the input is {value(a['gate']).dtype}")
    static = dict(layout=layout, act=a["act"], alpha=a["alpha"], limit=a["limit"])
    if a["up"] is None:
        return _choice(f"npu_{operator}", activated, [a["gate"]], **static)
    # Two projections would have to be joined in memory first, which costs more than the fusion saves.
    require(_from_one_tensor(a["gate"], a["up"]), "gate and up are two tensors; npu_swiglu takes them as one")
    return _choice(f"npu_{operator}", activated, [a["gate"].args[0].args[0]], **static)


def check_norm(a: dict[str, Any], x: fx.Node, weight: fx.Node | None) -> None:
    """Predicates of ``npu_rms_norm`` on a node's cast points, weight form and dtypes."""
    fake = value(x)
    require(weight is not None, "the norm has no weight; npu_rms_norm needs one")
    require(fake.dtype in _FLOATING, f"the input is {fake.dtype}")
    require(fake.dim() >= 2, "npu_rms_norm takes rank 2 and more")
    require(value(weight).dtype == fake.dtype, f"the weight is {value(weight).dtype}, the input {fake.dtype}")
    require(a["offset"] == 0.0, f"{a['offset']} is added to the weight in fp32, which npu_rms_norm cannot do")
    out_dtype = a.get("out_dtype")
    require(out_dtype in (None, fake.dtype), f"the result is {out_dtype}; npu_rms_norm keeps {fake.dtype}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """``rms_norm`` with a weight of x's dtype."""
    return torch.ops.npu.npu_rms_norm.default(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm`` with a weight of x's dtype."""
    normed, _, total = torch.ops.npu.npu_add_rms_norm.default(x, residual, weight, eps)
    return normed, total


def _from_one_tensor(gate: fx.Node, up: fx.Node) -> bool:
    """Whether gate and up are the halves, in this order, of one tensor's last dimension (``chunk`` or ``split``)."""
    splits = (torch.ops.aten.chunk.default, torch.ops.aten.split.Tensor)
    for node, index in ((gate, 0), (up, 1)):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.target not in splits or node.args[1] != index:
            return False
    source = gate.args[0]
    assert isinstance(source, fx.Node) and isinstance(source.args[0], fx.Node)
    whole, half = value(source.args[0]), value(gate)
    return source is up.args[0] and half.shape[-1] * 2 == whole.shape[-1] and half.shape[:-1] == whole.shape[:-1]


def _choice(operator: str, form: Any, operands: list[fx.Node | None], **static: Any) -> Choice:
    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        inline(gm, node, functools.partial(form, **static), operands)

    return Choice(f"torch_npu {operator}", rewrite)
