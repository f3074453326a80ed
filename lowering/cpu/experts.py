"""``experts`` in forms that Inductor makes fast on a CPU; the choice between them is made once per graph.

* gathered, for few tokens: each pair of a token and an expert reads its expert's weights inside one fused reduction.
  A matrix-vector product is bound by memory, and this form streams weights two to three times as fast as one library
  call per expert; it reads an expert again for each of its tokens.
* grouped, otherwise: pairs sorted by expert, two ``aten._grouped_mm`` with everything around them left to Inductor.

``benchmarks/cpu_model.py`` compares both with what Inductor makes of the model's own forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_fx.lowering.ops.activation import activate, split_gate_up

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# `gathered` accumulates in fp32.
_GATHERED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# From this release on, the CPU kernel of `_grouped_mm` takes weights at any address.
_GROUPED_MM_SINCE = (2, 11)


def choose(node: fx.Node) -> Callable[..., torch.Tensor] | None:
    """The form for an ``experts`` node that Inductor finishes, or None for the reference."""
    x, _, ids, w13, w2 = (arg.meta["val"] for arg in node.args[:5])  # type: ignore[union-attr]
    n_experts = w13.shape[0]
    # So few pairs that, on average, no expert is read twice. An unknown number of tokens may be large.
    if statically_known_true(ids.numel() <= n_experts) and x.dtype in _GATHERED_DTYPES:
        return gathered
    weights = [w13, w2, *(arg.meta["val"] for arg in node.args[7:8] if arg is not None)]  # type: ignore[union-attr]
    return grouped if all(_fits_grouped_mm(x, w) for w in weights) else None


def _fits_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``_grouped_mm`` and Inductor take a weight: bf16 in whole 16-byte rows."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return (
        release >= _GROUPED_MM_SINCE
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and all(size % 8 == 0 for size in weight.shape[1:])
    )


def gathered(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *projections: torch.Tensor | None, **attributes: Any
) -> torch.Tensor:
    """See ``moe_fx.lowering.ops.experts.experts`` for the arguments."""
    n_experts = _given(projections[0]).shape[0]
    top_k = ids.shape[1]
    pair_ids = ids.reshape(-1)
    valid = (pair_ids >= 0) & (pair_ids < n_experts)
    expert = torch.where(valid, pair_ids, 0)
    transposed = attributes.get("transposed", False)

    def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A product and a sum, not a bmm: Inductor then reads the weight in place and never stores the gathered copy.
        if transposed:
            y = (rows.unsqueeze(-1).float() * weight[expert].float()).sum(dim=-2)
        else:
            y = (rows.unsqueeze(-2).float() * weight[expert].float()).sum(dim=-1)
        return (y if bias is None else y + bias[expert]).to(rows.dtype)

    rows = x.repeat_interleave(top_k, dim=0)
    out = _run_pairs(rows, weights.reshape(-1, 1), projections, linear, attributes)
    return _combine(out.masked_fill(~valid.unsqueeze(-1), 0), ids.shape, attributes.get("out_dtype") or x.dtype)


def grouped(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *projections: torch.Tensor | None, **attributes: Any
) -> torch.Tensor:
    """See ``moe_fx.lowering.ops.experts.experts`` for the arguments."""
    n_experts = _given(projections[0]).shape[0]
    top_k = ids.shape[1]
    pair_ids = ids.reshape(-1)
    valid = (pair_ids >= 0) & (pair_ids < n_experts)
    # Pairs without an expert come last, beyond the last offset.
    expert, perm = torch.sort(torch.where(valid, pair_ids, n_experts), stable=True)
    ends = torch.arange(1, n_experts + 1, dtype=expert.dtype, device=expert.device)
    offsets = torch.searchsorted(expert, ends, out_int32=True)
    transposed = attributes.get("transposed", False)

    def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = torch._grouped_mm(rows, weight if transposed else weight.transpose(-2, -1), offs=offsets)
        return y if bias is None else y + bias[expert.clamp(max=n_experts - 1)]

    out = _run_pairs(x[perm // top_k], weights.reshape(-1, 1)[perm], projections, linear, attributes)
    unsorted = torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.shape[0], device=perm.device))
    # `_grouped_mm` leaves rows beyond the last offset unwritten.
    return _combine(
        out[unsorted].masked_fill(~valid.unsqueeze(-1), 0), ids.shape, attributes.get("out_dtype") or x.dtype
    )


def _run_pairs(
    rows: torch.Tensor,
    weight: torch.Tensor,
    projections: tuple[torch.Tensor | None, ...],
    linear: Linear,
    attributes: dict[str, Any],
) -> torch.Tensor:
    """One output row per pair, weighted, in the dtype in which pairs are summed."""
    w13, w2, b13, b2, w3, b3 = [*projections, None, None, None, None][:6]
    on_input = attributes.get("weight_on", "output") == "input"
    combine_dtype = torch.promote_types(rows.dtype, weight.dtype)
    if on_input:
        rows = (rows * weight).to(rows.dtype)
    gate = linear(rows, _given(w13), b13)
    if w3 is None:
        gate, up = split_gate_up(gate, attributes.get("layout", "gate_up"))
    else:
        up = linear(rows, w3, b3)
    activated = activate(
        gate, up, attributes.get("act", "silu"), attributes.get("alpha", 1.702), attributes.get("limit")
    )
    out = linear(activated, _given(w2), b2)
    return out.to(combine_dtype) if on_input else out * weight


def _combine(pairs: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return pairs.view(*shape, -1).sum(dim=1).to(dtype)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
