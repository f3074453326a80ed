"""``experts`` on torch_npu's operators: routing, two grouped matrix products around an activation, combination.

    npu_moe_init_routing_v2 -> npu_grouped_matmul (gate and up in one) -> npu_swiglu -> npu_grouped_matmul -> combine

Token counts stay dynamic: no operator is given a number of rows. Weights come in the layout of ``weights.stacked``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ascend import weights as recipes
from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, require
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.inline import inline
from moe_fx.lowering.ops.activation import activate, split_gate_up
from moe_fx.lowering.prepared_inputs import call_recipe

_FLOATING = (torch.bfloat16, torch.float16, torch.float32)
# Last dimensions of x and weight must be below this in npu_grouped_matmul.
_INNER_LIMIT = 65536
_WEIGHTS = ("w13", "w2", "b13", "b2", "w3", "b3")
# Instead of an operator's name, for activations that PyTorch's own ops compute.
_ATEN = "activation in ATen"


def choose(node: fx.Node, settings: Settings, ids_in_range: bool) -> Choice:
    """The operators for an ``experts`` node.

    Args:
        ids_in_range: whether every id is known to be an expert's.

    Raises:
        Refused: they cannot compute it.
    """
    a = bound(node)
    check_shapes(a)
    require(value(a["x"]).dtype in _FLOATING, f"x is {value(a['x']).dtype}")
    activation = activation_name(a["act"], a["limit"], layout_after(a, settings))

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        operands, transposed, layout = _operands(node, a, settings)
        static = {key: a[key] for key in ("act", "alpha", "limit", "weight_on", "out_dtype")}
        chosen = dict(layout=layout, transposed=transposed, combine=settings.combine, ids_in_range=ids_in_range)
        inline(gm, node, grouped, [a["x"], a["weights"], a["ids"], *operands], **chosen, **static)

    return Choice(f"torch_npu grouped_matmul + {activation} + {settings.combine}", rewrite)


def check_shapes(a: dict[str, Any]) -> None:
    """What all forms over grouped products need."""
    w13 = value(a["w13"])
    require(w13.dim() == 3, "weights are not stacked")
    require(w13.shape[0] > 1, "npu_grouped_matmul counts rows of more than one expert")
    require(all(size < _INNER_LIMIT for size in w13.shape[1:]), f"a dimension of the weights is {_INNER_LIMIT} or more")


def layout_after(a: dict[str, Any], settings: Settings) -> str:
    """How gate and up lie in the first product's result."""
    return a["layout"] if _used_as_is(a, settings) or a["layout"] == "none" else "gate_up"


def _used_as_is(a: dict[str, Any], settings: Settings) -> bool:
    """Whether w13 is multiplied as the model has it: as asked, or because it lies right already."""
    if not _prepared(a, settings):
        return True
    # Only one activation reads gate and up interleaved.
    interleaved = a["layout"] == "interleaved" and activation_name(a["act"], a["limit"], "interleaved") != _ATEN
    return a["transposed"] and not settings.nz and (a["layout"] in ("gate_up", "none") or interleaved)


def _prepared(a: dict[str, Any], settings: Settings) -> bool:
    """Whether the weights are brought into the operators' layout before the call: not those that the graph computes."""
    return settings.prepare and are_inputs(a[name] for name in _WEIGHTS)


def _operands(node: fx.Node, a: dict[str, Any], settings: Settings) -> tuple[list[fx.Node | None], bool, str]:
    """Nodes for [w13, w2, b13, b2, w3, b3], whether the weights are [E, K, N], and the layout of the first result.

    A weight that the graph computes itself cannot be prepared before the call: a view of it is multiplied.
    """
    if not _prepared(a, settings):
        return [a[name] for name in _WEIGHTS], a["transposed"], a["layout"]
    layout = "gate_up" if _used_as_is(a, settings) else a["layout"]
    stack = functools.partial(call_recipe, node, recipes.stacked, transposed=a["transposed"], nz=settings.nz)
    cast = functools.partial(call_recipe, node, recipes.columns, dtype=bias_dtype(value(a["x"]).dtype))
    w13, w2 = a["w13"], a["w2"]
    if not _used_as_is(a, settings):
        w13 = stack([w for w in (w13, a["w3"]) if w is not None], layout=layout)
    if not a["transposed"] or settings.nz:
        w2 = stack([w2])
    b13 = None if a["b13"] is None else cast([b for b in (a["b13"], a["b3"]) if b is not None], layout=layout)
    b2 = None if a["b2"] is None else cast([a["b2"]])
    return [w13, w2, b13, b2, None, None], True, layout_after(a, settings)


def are_inputs(nodes: Iterable[fx.Node | None]) -> bool:
    """Whether all nodes that are there are inputs of the graph, which can be prepared before a call."""
    return all(node is None or node.op == "placeholder" for node in nodes)


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """What npu_grouped_matmul takes as a bias for rows of a dtype."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def grouped(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    w3: torch.Tensor | None,
    b3: torch.Tensor | None,
    *,
    layout: str,
    transposed: bool,
    combine: str,
    ids_in_range: bool,
    act: str,
    alpha: float,
    limit: float | None,
    weight_on: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """``experts`` (see there for the arguments). Products are rounded to x's dtype; a bias is added before that."""

    def project(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        def multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            weight = weight if transposed else weight.transpose(1, 2)
            return grouped_matmul(rows, weight, counts, None if bias is None else bias.to(bias_dtype(rows.dtype)))

        h = multiply(rows, w13, b13)
        if w3 is not None:
            h = activate(h, multiply(rows, w3, b3), act, alpha, limit)
        else:
            h = activated(h, layout, act, alpha, limit)
        return multiply(h, w2, b2)

    return run_routed(
        x, weights, ids, w13.shape[0], project,
        combine=combine, ids_in_range=ids_in_range, weight_on=weight_on, out_dtype=out_dtype,
    )  # fmt: skip


def run_routed(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    n_experts: int,
    project: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    combine: str,
    ids_in_range: bool,
    weight_on: str = "output",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sort rows by expert, ``project(rows, rows per expert)``, and sum each token's weighted results."""
    top_k = ids.shape[1]
    combine_dtype = torch.promote_types(x.dtype, weights.dtype)
    # Where an expert has biases, a row of zeros does not come out as zeros: its weight must be zero behind them.
    scales = None if ids_in_range else ((ids >= 0) & (ids < n_experts)).to(combine_dtype)
    ids, weights = only_experts(ids, weights, n_experts, ids_in_range)
    rows, routed_ids = x, ids
    if weight_on == "input":
        # One row per pair, each with one expert: the order of the expanded rows is the same.
        rows = (x.unsqueeze(1) * weights.unsqueeze(-1)).to(x.dtype).reshape(-1, x.shape[1])
        routed_ids = ids.reshape(-1, 1)
    expanded, row_index, counts, _ = init_routing(rows, routed_ids, n_experts)
    out = project(expanded, counts)
    if weight_on == "output":
        scales = weights.to(combine_dtype)
    y = combined(out.to(combine_dtype), scales, row_index, top_k, combine)
    return y.to(out_dtype or x.dtype)


def only_experts(
    ids: torch.Tensor, weights: torch.Tensor, n_experts: int, ids_in_range: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ids within [0, E); a pair without an expert goes to expert 0 with weight 0."""
    if not ids_in_range:
        valid = (ids >= 0) & (ids < n_experts)
        ids, weights = torch.where(valid, ids, 0), torch.where(valid, weights, 0)
    return ids.to(torch.int32), weights


def init_routing(
    rows: torch.Tensor, ids: torch.Tensor, n_experts: int, scale: torch.Tensor | None = None, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows by expert, the place of each pair [T * k], rows per expert [E], and ``scale`` [T] by row.

    Args:
        inverse: the pair of each row in place of the row of each pair.
    """
    # active_num is a plain integer: -1 is "all rows" for any number of them.
    return torch.ops.npu.npu_moe_init_routing_v2.default(
        rows, ids, scale=scale, active_num=-1, expert_capacity=-1, expert_num=n_experts, drop_pad_mode=0,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, n_experts],
        row_idx_type=int(inverse),
    )  # fmt: skip


def grouped_matmul(
    rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, bias: torch.Tensor | None = None, **quantised: Any
) -> torch.Tensor:
    """``rows`` by expert times ``weight`` [E, K, N]."""
    return torch.ops.npu.npu_grouped_matmul.default(
        [rows], [weight], bias=None if bias is None else [bias], group_list=counts, split_item=3, group_type=0,
        group_list_type=1, **quantised,
    )[0]  # fmt: skip


def combined(
    rows: torch.Tensor, scales: torch.Tensor | None, row_index: torch.Tensor, top_k: int, combine: str
) -> torch.Tensor:
    """Each token's weighted sum; ``scales`` [T, k] in the rows' dtype, or None for a plain sum."""
    if combine == "token_unpermute":
        y = torch.ops.npu.npu_moe_token_unpermute.default(rows, row_index, scales)
        return y if scales is not None else y.unflatten(0, (-1, top_k)).sum(dim=1)
    # Mode 2 reads the row-major index that npu_moe_init_routing_v2 gives; mode 0 would read it column-major.
    return torch.ops.npu.npu_moe_finalize_routing.default(
        rows, None, None, None, scales, row_index, None, drop_pad_mode=2, k=top_k
    )


def activation_name(act: str, limit: float | None, layout: str) -> str:
    """The operator of torch_npu for an activation, or ``_ATEN``."""
    if act == "silu" and limit is None and layout == "gate_up":
        return "swiglu"
    if act == "swiglu_oai" and limit is not None and layout in ("gate_up", "interleaved"):
        return "clipped_swiglu"
    return _ATEN


def activated(h: torch.Tensor, layout: str, act: str, alpha: float, limit: float | None) -> torch.Tensor:
    """The activation of a merged projection [N, 2I] (or [N, I] with layout ``none``)."""
    operator = activation_name(act, limit, layout)
    if operator == "swiglu":
        return torch.ops.npu.npu_swiglu.default(h, -1)
    if operator == "clipped_swiglu":
        return torch.ops.npu.npu_clipped_swiglu.default(
            h, dim=-1, alpha=alpha, limit=limit, bias=1.0, interleaved=layout == "interleaved"
        )
    return activate(*split_gate_up(h, layout), act, alpha, limit)
