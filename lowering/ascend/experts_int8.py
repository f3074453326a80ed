"""``experts_int8`` on torch_npu's operators.

W8A8, silu without bias (``fused``): npu_dynamic_quant -> npu_moe_init_routing_v2 (rows and their scales) ->
npu_grouped_matmul_swiglu_quant_v2 -> npu_grouped_matmul with both scales -> combine. Between the products it stays in
fp32, where the reference rounds to x's dtype; what that moves by an int8 step is within the op's tolerance.

W8A8 otherwise (``dynamic``): the same with npu_grouped_matmul, the activation, and npu_dynamic_quant again.

W8A8 with ``combine_in_product``: the second product and the combination are npu_grouped_matmul_finalize_routing where
``_in_product`` says that it applies. It adds each row, weighed in fp32, onto its token's, in no fixed order.

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
# In place of an operator behind the second product.
_IN_PRODUCT = "grouped_matmul_finalize_routing"
_NUMBER = {torch.float16: 5, torch.bfloat16: 15}
# What npu_grouped_matmul_finalize_routing takes for int8 weights [E, K, N], as torch_npu 2.13 documents it.
_MAX_EXPERTS, _K_STEP, _N_STEP, _MIN_N, _MAX_TOKENS, _MAX_ROWS = 256, 16, 32, 256, 16 * 1024, 16 * 1024 * 8


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

    combine, why = settings.combine, ""
    if settings.combine_in_product:
        why = _in_product(a)
        combine, why = (combine, f" (not in the product: {why})") if why else (_IN_PRODUCT, "")

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        operands = _operands(node, a, settings, form, combine == _IN_PRODUCT)
        static = {key: a[key] for key in ("act", "alpha", "limit", "out_dtype")}
        chosen = dict(layout=layout, combine=combine, ids_in_range=ids_in_range)
        inline(gm, node, form, [a["x"], a["weights"], a["ids"], *operands], **chosen, **static)

    return Choice(f"torch_npu {kernel} + {combine}{why}", rewrite)


def _in_product(a: dict[str, Any]) -> str:
    """Why npu_grouped_matmul_finalize_routing does not apply; empty where it does."""
    n_experts, n, k = value(a["w2"]).shape
    tokens, top_k = value(a["ids"]).shape
    if not a["dynamic_activations"]:
        return "it takes int8 activations"
    if a["b2"] is not None:
        return "it takes no bias"
    if not isinstance(tokens, int):
        return "its output_bs is a plain number, and the number of tokens is dynamic"
    if n_experts > _MAX_EXPERTS:
        return f"{n_experts} experts, and it takes {_MAX_EXPERTS}"
    if k % _K_STEP or n % _N_STEP or n < _MIN_N:
        return f"the weight is {k} x {n}; it takes multiples of {_K_STEP} and of {_N_STEP} from {_MIN_N} on"
    if not 0 < tokens <= _MAX_TOKENS or tokens * top_k > _MAX_ROWS:
        return f"{tokens} tokens to {top_k} experts each, and it takes 1 to {_MAX_TOKENS}, and {_MAX_ROWS} rows"
    return ""


def _operands(
    node: fx.Node, a: dict[str, Any], settings: Settings, form: Any, in_product: bool
) -> list[fx.Node | None]:
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
        # The fused operators read their weights in NZ only; the others read either form.
        call_recipe(node, recipes.stacked, [a["w13"]], layout=layout, nz=settings.nz or form is fused),
        columns(a["w13_scale"], scale_dtype, layout),
        *offsets(a["w13_scale"]),
        call_recipe(node, recipes.stacked, [a["w2"]], nz=settings.nz or in_product),
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = _times(rows, row_scale, w13, w13_scale, counts, x.dtype)
        h = activated(_plus(h, b13, experts_of_rows), layout, act, alpha, limit)
        quantised, row_scale = torch.ops.npu.npu_dynamic_quant.default(h)
        return quantised, row_scale

    return _run_quantised(x, weights, ids, project, w2, w2_scale, b2, biased=b13 is not None, **routed)


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

    def project(
        rows: torch.Tensor, row_scale: torch.Tensor, counts: torch.Tensor, _: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, h_scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2.default(
            rows, [w13], [w13_scale], row_scale, counts, dequant_mode=0, dequant_dtype=_FLOAT32, quant_mode=0,
            quant_dtype=_INT8, group_list_type=1,
        )  # fmt: skip
        return h, h_scale

    return _run_quantised(x, weights, ids, project, w2, w2_scale, None, biased=False, **routed)


def _run_quantised(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    project: Any,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    biased: bool,
    combine: str,
    ids_in_range: bool,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """``run_routed`` for rows that are quantised once per token, before they are sorted by expert.

    Args:
        project: the first product and the activation: int8 rows and their scales to such ones.
        biased: whether ``project`` adds a bias.
    """
    top_k, n_experts = ids.shape[1], w2.shape[0]
    combine_dtype = torch.promote_types(x.dtype, weights.dtype)
    ids, weights = only_experts(ids, weights, n_experts, ids_in_range)
    quantised, scale = torch.ops.npu.npu_dynamic_quant.default(x)
    inverse = combine == _IN_PRODUCT
    rows, row_index, counts, row_scale = init_routing(quantised, ids, n_experts, scale, inverse=inverse)
    experts_of_rows = torch.sort(ids.reshape(-1), stable=True)[0] if biased or b2 is not None else None
    h, h_scale = project(rows, row_scale, counts, experts_of_rows)
    if inverse:
        y = _times_and_combined(h, h_scale, w2, w2_scale, counts, weights, row_index)
    else:
        out = _plus(_times(h, h_scale, w2, w2_scale, counts, x.dtype), b2, experts_of_rows)
        y = combined(out.to(combine_dtype), weights.to(combine_dtype), row_index, top_k, combine)
    return y.to(out_dtype or x.dtype)


def _times_and_combined(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    counts: torch.Tensor,
    weights: torch.Tensor,
    pairs: torch.Tensor,
) -> torch.Tensor:
    """``_times``, and each token's weighted sum, fp32 [T, N]; ``pairs`` [T * k] are the pairs of the rows."""
    tokens, top_k = weights.shape
    pairs = pairs.to(torch.int64)
    # Its documentation knows routing weights only beside a shared expert's result, in bf16, of any part of the tokens.
    nothing = torch.zeros((1, weight.shape[-1]), dtype=torch.bfloat16, device=rows.device)
    return torch.ops.npu.npu_grouped_matmul_finalize_routing.default(
        rows, weight, counts, scale=scale, pertoken_scale=row_scale, shared_input=nothing,
        logit=weights.to(torch.float32).reshape(-1)[pairs], row_index=pairs // top_k, output_bs=tokens,
        group_list_type=1,
    )  # fmt: skip


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
