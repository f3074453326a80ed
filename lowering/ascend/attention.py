"""``attention`` on ``npu_fused_infer_attention_score``, over the key/value heads as they are stored.

So is ``scaled_dot_product_attention`` that no pass made ``attention`` of, in GE graphs and in dynamic ones: torch_npu
computes it by ``npu_fusion_attention_v3``, which torchair has no converter for, and fixes all sizes as it traces it.
What the operator refuses is written out there, as PyTorch defines it.

The operator's mask is of the opposite sense (True is left out) and has no dimension for heads. With one query it runs
as incremental attention, which takes a mask but no causal mode, and leaves open what a query gets whose mask leaves out
every key: that is set to zeros, as PyTorch has it, for the rows of padding in a batch. With several, causal attention
counted from the first key is its sparse mode 2, whose mask is one fixed triangle for any size. Source: torch_npu's
documentation of the operator; not run on an NPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols, statically_known_true

from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, Refused, require
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.inline import inline

_MAX_HEADS, _MAX_GROUP, _MAX_WIDTH = 256, 64, 512
# Sparse modes: the mask says all; causal from the first key on, with a compressed mask of this size.
_WHOLE_MASK, _CAUSAL, _COMPRESSED = 0, 2, 2048
# Bit 1 of inner_precise gives zeros to queries that the mask leaves nothing; the operator has it for several queries.
_PRECISE, _PRECISE_EMPTY_ROWS = 0, 2

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def choose(node: fx.Node, settings: Settings, downstream: str) -> Choice:
    """The operator for an ``attention`` node, or for a call of ``SDPA`` that must not be left to torch_npu.

    Raises:
        Refused: the operator cannot compute it, or it is a call of ``SDPA``, and torch_npu's own operator can stay.
    """
    call = _arguments(node)
    dynamic = any(free_symbols(value(call[name])) for name in ("query", "key", "value"))
    replaced = downstream == "torchair" and (settings.ge or dynamic)
    require(call["dropout_p"] == 0, "dropout is for training")
    require(replaced or node.target is not SDPA, "torch_npu's own operator computes it")
    try:
        return _fused(node, call)
    except Refused as reason:
        if not replaced:
            raise
        return Choice(f"torchair (written out): {reason}", lambda gm, node: _write_out(gm, node, call))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Those of PyTorch's function, by its names, with a scale in any case."""
    call = bound(node)
    if node.target is not SDPA:
        renamed = dict(query=call["q"], key=call["k"], value=call["v"], attn_mask=call["mask"])
        call = dict(**renamed, is_causal=call["is_causal"], scale=call["scale"], dropout_p=0.0, enable_gqa=True)
    if call["scale"] is None:
        call["scale"] = 1 / math.sqrt(value(call["query"]).shape[-1])
    return call


def _fused(node: fx.Node, call: dict[str, Any]) -> Choice:
    q, k, v, mask = (value(call[name]) for name in ("query", "key", "value", "attn_mask"))
    require(q.dim() == k.dim() == v.dim() == 4, "queries, keys and values are not [batch, heads, tokens, width]")
    require(q.shape[0] == k.shape[0] == v.shape[0], "queries, keys and values differ in batch")
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    grouped = heads % kv_heads == 0 if call["enable_gqa"] else heads == kv_heads
    require(grouped and kv_heads == v.shape[1], "key/value heads are broadcast over the query heads")
    require(q.dtype in (torch.float16, torch.bfloat16), f"queries are {q.dtype}; the operator takes fp16 and bf16")
    require(width == v.shape[3], f"keys are {width} wide and values {v.shape[3]}; the operator takes one width")
    require(width % 16 == 0 and width <= _MAX_WIDTH, f"heads of width {width}, not a multiple of 16 up to {_MAX_WIDTH}")
    require(heads <= _MAX_HEADS and heads // kv_heads <= _MAX_GROUP, f"{heads} heads over {kv_heads}")
    single = statically_known_true(q.shape[2] == 1)
    require(single or statically_known_true(q.shape[2] > 1), "there may be one query or several")
    require(not (single and call["is_causal"]), "a single query with is_causal attends to the first key only")
    if mask is not None:
        _check_mask(mask, q, k)
    static: dict[str, Any] = dict(
        is_causal=call["is_causal"],
        scale=call["scale"],
        single=single,
        # The layout that PyTorch's attention has on most devices, and that the views behind it may count on.
        token_major=not single and value(node).transpose(1, 2).is_contiguous(),
    )

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        inline(gm, node, attention, [call[name] for name in ("query", "key", "value", "attn_mask")], **static)

    return Choice("torch_npu npu_fused_infer_attention_score", rewrite)


def _write_out(gm: fx.GraphModule, node: fx.Node, call: dict[str, Any]) -> None:
    operands = [call[name] for name in ("query", "key", "value", "attn_mask")]
    inline(gm, node, _written_out, operands, **{name: call[name] for name in ("is_causal", "scale", "enable_gqa")})


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> torch.Tensor:
    """PyTorch's definition, in fp32 as PyTorch has it, in operators that torchair converts as they are.

    ``repeat_interleave`` has no converter, and ``_safe_softmax`` loses there what makes it safe: zeros where nothing
    may be attended to.
    """
    if enable_gqa:
        # Both, for they may be grouped differently.
        k, v = (
            x.unsqueeze(-3).expand(*x.shape[:-2], q.shape[-3] // x.shape[-3], *x.shape[-2:]).flatten(-4, -3)
            for x in (k, v)
        )
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if is_causal:
        query, key = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(key > query[:, None], -math.inf)
    elif mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    if mask is not None:
        weights = weights.masked_fill(scores.max(-1, keepdim=True)[0] == -math.inf, 0.0)
    return (weights @ v.float()).to(q.dtype)


def _check_mask(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    require(mask.dtype == torch.bool, f"the mask is {mask.dtype}; the operator takes boolean ones")
    require(mask.dim() in (2, 4), f"the mask is of rank {mask.dim()}")
    require(mask.dim() == 2 or mask.shape[1] == 1, "the mask differs from head to head")
    require(statically_known_true(mask.shape[-1] == k.shape[2]), "the mask is broadcast over keys")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    single: bool,
    token_major: bool,
) -> torch.Tensor:
    """``attention`` with a boolean mask or none.

    Args:
        single: whether there is one query.
        token_major: whether the result lies as [B, S, H, D] in memory.
    """
    batch, heads, queries, _ = q.shape
    left_out, sparse_mode, precision = None, _WHOLE_MASK, _PRECISE
    if is_causal:
        position = torch.arange(_COMPRESSED, device=q.device)
        left_out, sparse_mode = position[None, :] > position[:, None], _CAUSAL
    elif mask is not None:
        # Sizes of the mask may be 1 where the operator wants them whole.
        left_out = mask.logical_not().expand(batch, 1, queries, k.shape[2]).contiguous()
        precision = _PRECISE if single else _PRECISE_EMPTY_ROWS
    result = torch.ops.npu.npu_fused_infer_attention_score.default(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        atten_mask=left_out,
        num_heads=heads,
        num_key_value_heads=k.shape[1],
        scale=scale,
        input_layout="BNSD_BSND" if token_major else "BNSD",
        sparse_mode=sparse_mode,
        inner_precise=precision,
    )[0]
    if single and mask is not None:
        # In operators that torchair converts, which `any` along a dimension is not.
        result = result.masked_fill(mask.float().max(-1, keepdim=True)[0] == 0, 0.0)
    return result.transpose(1, 2) if token_major else result
