"""``experts_int8`` on torch_npu's operators.

W8A8, silu without bias (``fused``): npu_dynamic_quant -> npu_moe_init_routing_v2 (rows and their scales) ->
npu_grouped_matmul_swiglu_quant_v2 -> npu_grouped_matmul with both scales -> combine. Between the products it stays in
fp32, where the reference rounds to x's dtype; what that moves by an int8 step is within the op's tolerance.

W8A8 otherwise (``dynamic``): the same with npu_grouped_matmul, the activation, and npu_dynamic_quant again.

W8A16: see ``antiquant``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ascend import weights as recipes
from moe_fx.lowering.ascend.antiquant import widened
from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, require
from moe_fx.lowering.ascend.experts import (
    activated,
    activation_name,
    are_inputs,
    bias_dtype,
    check_shapes,
    combined,
    grouped_matmul,
    init_routing,
    only_experts,
)
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.inline import inline
from moe_fx.lowering.prepared_inputs import call_recipe

_HALF = (torch.bfloat16, torch.float16)
# PyTorch's numbers of dtypes, for operators that take them as plain integers.
_FLOAT32, _INT8 = 6, 1
_NUMBER = {torch.float16: 5, torch.bfloat16: 15}


def choose(node: fx.Node, settings: Settings, ids_in_range: bool) -> Choice:
    """The operators for an ``experts_int8`` node; see ``experts.choose``.

    Raises:
        Refused: they cannot compute it.
    """
    a = bound(node)
    check_shapes(a)
    require(value(a["x"]).dtype in _HALF, f"x is {value(a['x']).dtype}; int8 weights give bf16 and fp16 results")
    weights = ("w13", "w13_scale", "w2", "w2_scale", "b13", "b2")
    require(
        are_inputs(a[name] for name in weights), "a weight is computed in the graph, and would be packed every call"
    )
    layout = "none" if a["layout"] == "none" else "gate_up"
    activation = activation_name(a["act"], a["limit"], layout)
    biased = a["b13"] is not None or a["b2"] is not None
    form: Callable[..., torch.Tensor]
    if not a["dynamic_activations"]:
        form, kernel = widened, f"grouped_matmul (W8A16) + {activation}"
    elif activation == "swiglu" and not biased:
        form, kernel = fused, "grouped_matmul_swiglu_quant_v2 + grouped_matmul (W8A8)"
    else:
        form, kernel = dynamic, f"grouped_matmul (W8A8) + {activation}"

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        operands = _operands(node, a, settings, form)
        static = {key: a[key] for key in ("act", "alpha", "limit", "out_dtype")}
        chosen = dict(layout=layout, combine=settings.combine, ids_in_range=ids_in_range)
        inline(gm, node, form, [a["x"], a["weights"], a["ids"], *operands], **chosen, **static)

    return Choice(f"torch_npu {kernel} + {settings.combine}", rewrite)


def _operands(node: fx.Node, a: dict[str, Any], settings: Settings, form: Any) -> list[fx.Node | None]:
    """The projections as the form takes them; weights [E, K, N], scales fp32 for W8A8, else x's dtype."""
    x_dtype, layout = value(a["x"]).dtype, a["layout"]
    scale_dtype = x_dtype if form is widened else torch.float32
    # Biases of int8 products are added behind them, in x's dtype, as in the reference.
    biases = bias_dtype(x_dtype) if form is widened else x_dtype

    def columns(vector: fx.Node | None, dtype: torch.dtype, layout: str = "gate_up") -> fx.Node | None:
        return None if vector is None else call_recipe(node, recipes.columns, [vector], layout=layout, dtype=dtype)

    def offsets(scale: fx.Node) -> list[fx.Node]:
        return [call_recipe(node, recipes.zero_offsets, scale, dtype=x_dtype)] if form is widened else []

    return [
        # The fused operator reads its weight in NZ only; the others read either form.
        call_recipe(node, recipes.stacked, [a["w13"]], layout=layout, nz=settings.nz or form is fused),
        columns(a["w13_scale"], scale_dtype, layout),
        *offsets(a["w13_scale"]),
        call_recipe(node, recipes.stacked, [a["w2"]], nz=settings.nz),
        columns(a["w2_scale"], scale_dtype),
        *offsets(a["w2_scale"]),
        columns(a["b13"], biases, layout),
        columns(a["b2"], biases),
    ]


def dynamic(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    *,
    layout: str,
    act: str,
    alpha: float,
    limit: float | None,
    **routed: Any,
) -> torch.Tensor:
    """W8A8 with any activation and biases, prepared weights."""

    def project(
        rows: torch.Tensor, row_scale: torch.Tensor, counts: torch.Tensor, experts_of_rows: torch.Tensor | None
    ) -> torch.Tensor:
        h = _times(rows, row_scale, w13, w13_scale, counts, x.dtype)
        h = activated(_plus(h, b13, experts_of_rows), layout, act, alpha, limit)
        quantised, row_scale = torch.ops.npu.npu_dynamic_quant.default(h)
        y = _times(quantised, row_scale, w2, w2_scale, counts, x.dtype)
        return _plus(y, b2, experts_of_rows)

    return _run_quantised(x, weights, ids, w13.shape[0], project, biased=b13 is not None or b2 is not None, **routed)


def fused(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b13: None,
    b2: None,
    *,
    layout: str,
    act: str,
    alpha: float,
    limit: float | None,
    **routed: Any,
) -> torch.Tensor:
    """W8A8 with silu, prepared weights."""

    def project(rows: torch.Tensor, row_scale: torch.Tensor, counts: torch.Tensor, _: None) -> torch.Tensor:
        h, h_scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2.default(
            rows, [w13], [w13_scale], row_scale, counts, dequant_mode=0, dequant_dtype=_FLOAT32, quant_mode=0,
            quant_dtype=_INT8, group_list_type=1,
        )  # fmt: skip
        return _times(h, h_scale, w2, w2_scale, counts, x.dtype)

    return _run_quantised(x, weights, ids, w13.shape[0], project, biased=False, **routed)


def _run_quantised(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    n_experts: int,
    project: Any,
    *,
    biased: bool,
    combine: str,
    ids_in_range: bool,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """``run_routed`` for rows that are quantised once per token, before they are sorted by expert."""
    top_k = ids.shape[1]
    combine_dtype = torch.promote_types(x.dtype, weights.dtype)
    ids, weights = only_experts(ids, weights, n_experts, ids_in_range)
    quantised, scale = torch.ops.npu.npu_dynamic_quant.default(x)
    rows, row_index, counts, row_scale = init_routing(quantised, ids, n_experts, scale)
    experts_of_rows = torch.sort(ids.reshape(-1), stable=True)[0] if biased else None
    out = project(rows, row_scale, counts, experts_of_rows)
    y = combined(out.to(combine_dtype), weights.to(combine_dtype), row_index, top_k, combine)
    return y.to(out_dtype or x.dtype)


def _times(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    counts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 rows by int8 weights, both scales applied, in ``dtype``."""
    # bf16 results take bf16 or fp32 scales, fp16 results fp32 ones.
    return grouped_matmul(rows, weight, counts, scale=[scale], per_token_scale=[row_scale], output_dtype=_NUMBER[dtype])


def _plus(h: torch.Tensor, bias: torch.Tensor | None, experts_of_rows: torch.Tensor | None) -> torch.Tensor:
    return h if bias is None or experts_of_rows is None else h + bias[experts_of_rows]
