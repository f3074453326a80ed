"""What GE's operators compute, on CPU tensors: by type, from attributes and named inputs.

MoE operators are those of ``npu_ops``; the rest is what torchair makes of the ATen ops around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from host_cann import npu_ops

# Data types as the serialized graph and as the runtime number them.
PROTO_DTYPES = {
    1: torch.float32, 2: torch.float16, 3: torch.int8, 4: torch.uint8, 5: torch.int16, 6: torch.uint16, 7: torch.int32,
    8: torch.int64, 9: torch.uint32, 10: torch.uint64, 11: torch.bool, 12: torch.float64, 27: torch.bfloat16,
}  # fmt: skip
RUNTIME_DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 7: torch.uint16,
    8: torch.uint32, 9: torch.int64, 10: torch.uint64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16,
}  # fmt: skip
RUNTIME_CODES = {dtype: code for code, dtype in RUNTIME_DTYPES.items()}
_INT4 = 29

Result = torch.Tensor | Sequence[torch.Tensor]


class Op:
    """Attributes of one op in a graph."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self.type: str = proto.type

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value as a Python number, string or list."""
        if name not in self._proto.attr:
            return default
        value = self._proto.attr[name]
        kind = value.WhichOneof("value")
        if kind is None:
            return default
        if kind == "list":
            return list(value.list.i) or list(value.list.f) or list(value.list.b) or list(value.list.s)
        found = getattr(value, kind)
        return found.decode() if isinstance(found, bytes) else found

    def attrs(self, **defaults: Any) -> dict[str, Any]:
        """Several attributes with their defaults."""
        return {name: self.attr(name, default) for name, default in defaults.items()}


# --- MoE --------------------------------------------------------------------------------------------------------------


def _gating_softmax(op: Op, x: torch.Tensor, finished: torch.Tensor | None = None) -> Result:
    return npu_ops.npu_moe_gating_top_k_softmax(x, finished, op.attr("k"))


def _gating_softmax_v2(op: Op, x: torch.Tensor, finished: torch.Tensor | None = None) -> Result:
    return npu_ops.npu_moe_gating_top_k_softmax_v2(
        x, finished=finished, **op.attrs(k=1, renorm=0, output_softmax=False)
    )


def _gating_top_k(op: Op, x: torch.Tensor, bias: torch.Tensor | None = None, **hash_mode: None) -> Result:
    attributes = op.attrs(
        k=1, k_group=1, group_count=1, group_select_mode=0, renorm=0, norm_type=0, out_flag=False,
        routed_scaling_factor=1.0, eps=1e-20,
    )  # fmt: skip
    return npu_ops.npu_moe_gating_top_k(x, bias=bias, **attributes)


def _init_routing(op: Op, x: torch.Tensor, expert_idx: torch.Tensor, **scales: torch.Tensor | None) -> Result:
    attributes = op.attrs(
        active_num=-1, expert_capacity=-1, expert_num=-1, drop_pad_mode=0, expert_tokens_num_type=0,
        expert_tokens_num_flag=False, quant_mode=-1, active_expert_range=[], row_idx_type=0,
    )  # fmt: skip
    return npu_ops.npu_moe_init_routing_v2(x, expert_idx, **scales, **attributes)


def _grouped_matmul(
    op: Op,
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    group_list: torch.Tensor,
    per_token_scale: torch.Tensor | None = None,
    **operands: Any,
) -> Result:
    given = {name: value for name, value in operands.items() if value and value[0] is not None and value[0].numel()}
    if op.attr("transpose_weight", False):
        weight = [w.transpose(-1, -2) for w in weight]
    output_dtype = {0: torch.float16, 1: torch.bfloat16, 2: torch.int8}.get(op.attr("dtype", -1))
    return npu_ops.npu_grouped_matmul(
        x,
        weight,
        **given,
        per_token_scale=None if per_token_scale is None else [per_token_scale],
        group_list=group_list,
        output_dtype=output_dtype if x[0].dtype == torch.int8 else None,
        **op.attrs(split_item=0, group_type=-1, group_list_type=0, act_type=0),
    )


def _grouped_matmul_swiglu_quant(
    op: Op,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    **absent: Any,
) -> Result:
    if (op.attr("dequant_dtype", 0), op.attr("quant_dtype", 2)) != (0, 2):
        raise ValueError(f"{op.type}: fp32 between the steps and int8 behind them are modelled")
    attributes = op.attrs(group_list_type=0, dequant_mode=0, quant_mode=0)
    return npu_ops.npu_grouped_matmul_swiglu_quant_v2(x, weight, weight_scale, x_scale, group_list, **attributes)


def _grouped_matmul_finalize_routing(
    op: Op,
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    bias: None = None,
    offset: None = None,
    **operands: torch.Tensor | None,
) -> Result:
    attributes = op.attrs(shared_input_weight=1.0, shared_input_offset=0, output_bs=0, group_list_type=1)
    return npu_ops.npu_grouped_matmul_finalize_routing(x, w, group_list, **operands, **attributes)


def _matmul_all_reduce(op: Op, x1: torch.Tensor, x2: torch.Tensor, **operands: torch.Tensor | None) -> Result:
    if op.attr("is_trans_a", False) or op.attr("is_trans_b", False):
        raise ValueError("MatmulAllReduce with transposed operands is not modelled")
    attributes = op.attrs(reduce_op="sum", antiquant_group_size=0, comm_turn=0, comm_quant_mode=0)
    return npu_ops.npu_mm_all_reduce_base(x1, x2, op.attr("group"), **operands, **attributes)


def _finalize_routing(
    op: Op,
    expanded_x: torch.Tensor,
    expanded_row_idx: torch.Tensor,
    x1: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    expert_idx: torch.Tensor | None = None,
) -> Result:
    mode = op.attrs(drop_pad_mode=0, k=1)
    return npu_ops.npu_moe_finalize_routing(expanded_x, x1, x2, bias, scales, expanded_row_idx, expert_idx, **mode)


def _token_unpermute(
    op: Op, permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None
) -> Result:
    return npu_ops.npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs, op.attr("padded_mode", False))


def _rms_norm(op: Op, x: torch.Tensor, gamma: torch.Tensor) -> Result:
    return npu_ops.npu_rms_norm(x, gamma, op.attr("epsilon", 1e-6))


def _add_rms_norm(op: Op, x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> Result:
    return npu_ops.npu_add_rms_norm(x1, x2, gamma, op.attr("epsilon", 1e-6))


def _add_rms_norm_cast(op: Op, x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> Result:
    return npu_ops.npu_add_rms_norm_cast(x1, x2, gamma, op.attr("epsilon", 1e-6))


def _clipped_swiglu(op: Op, x: torch.Tensor, group_index: torch.Tensor | None = None) -> Result:
    return npu_ops.npu_clipped_swiglu(x, **op.attrs(dim=-1, alpha=1.702, limit=7.0, bias=1.0, interleaved=True))


def _fused_infer_attention_score(
    op: Op,
    query: torch.Tensor,
    key: list[torch.Tensor],
    value: list[torch.Tensor],
    atten_mask: torch.Tensor | None = None,
    **absent: None,
) -> Result:
    given = [name for name, operand in absent.items() if operand is not None]
    modes = ("block_size", "antiquant_mode", "softmax_lse_flag", "query_quant_mode", "pse_type", "out_dtype")
    given += [name for name in modes if op.attr(name, 0)]
    if given or len(key) != 1 or len(value) != 1:
        raise ValueError(f"{op.type}: lists of keys and {given} are not modelled")
    attributes = op.attrs(
        num_heads=1, scale=1.0, pre_tokens=2147483647, next_tokens=2147483647, input_layout="BSH",
        num_key_value_heads=0, sparse_mode=0, inner_precise=0,
    )  # fmt: skip
    return npu_ops.npu_fused_infer_attention_score(query, key[0], value[0], atten_mask=atten_mask, **attributes)


# --- Matrix products --------------------------------------------------------------------------------------------------


def _matmul(op: Op, x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None = None, **absent: None) -> Result:
    if op.attr("transpose_x1") or op.attr("adj_x1"):
        x1 = x1.transpose(-1, -2)
    if op.attr("transpose_x2") or op.attr("adj_x2"):
        x2 = x2.transpose(-1, -2)
    y = x1 @ x2
    return y if bias is None else y + bias


# --- Shapes and data movement -----------------------------------------------------------------------------------------


def _bitcast(op: Op, x: torch.Tensor) -> torch.Tensor:
    # There is no 4-bit dtype here: the operator that reads such a weight unpacks it.
    return x if op.attr("type") == _INT4 else x.view(RUNTIME_DTYPES[op.attr("type")])


def _strided_slice(
    op: Op,
    x: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    axes: torch.Tensor | None = None,
    strides: torch.Tensor | None = None,
) -> torch.Tensor:
    masks = [op.attr(f"{name}_mask", 0) for name in ("shrink_axis", "new_axis", "begin", "end", "ellipsis")]
    if any(masks):
        raise NotImplementedError(f"StridedSliceV2 with masks {masks}")
    first_positions, last_positions = begin.reshape(-1).tolist(), end.reshape(-1).tolist()
    where = range(begin.numel()) if axes is None else axes.reshape(-1).tolist()
    steps = [1] * begin.numel() if strides is None else strides.reshape(-1).tolist()
    index = [slice(None)] * x.dim()
    for axis, first, last, step in zip(where, first_positions, last_positions, steps, strict=True):
        index[axis] = slice(first, last, step)
    return x[tuple(index)]


def _index(op: Op, x: torch.Tensor, **indices: torch.Tensor) -> torch.Tensor:
    given = iter([indices[f"indices{i}"].long() for i in range(len(indices))])
    return x[tuple(next(given) if used else slice(None) for used in op.attr("indices_mask"))]


def _gather_v2(op: Op, x: torch.Tensor, indices: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    axis_number = int(axis) % x.dim()
    picked = x.index_select(axis_number, indices.reshape(-1).long())
    return picked.unflatten(axis_number, indices.shape) if indices.dim() != 1 else picked


def _concat(op: Op, x: list[torch.Tensor], concat_dim: torch.Tensor) -> torch.Tensor:
    return torch.cat(x, int(concat_dim))


def _split(op: Op, x: torch.Tensor, size_splits: torch.Tensor, split_dim: torch.Tensor) -> Result:
    sizes, axis = size_splits.tolist(), int(split_dim)
    rest = x.shape[axis] - sum(size for size in sizes if size >= 0)
    return x.split([rest if size < 0 else size for size in sizes], axis)


def _max(op: Op, x: torch.Tensor) -> Result:
    values, indices = x.max(op.attr("dimension"), keepdim=bool(op.attr("keep_dims", False)))
    return indices.to(torch.int32), values


def _unsqueeze(op: Op, x: torch.Tensor) -> torch.Tensor:
    for axis in op.attr("axes"):
        x = x.unsqueeze(axis)
    return x


def _softmax(op: Op, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, op.attr("axes")[0], dtype=torch.float32 if op.attr("half_to_float") else None)


def _top_k(op: Op, x: torch.Tensor, k: torch.Tensor) -> Result:
    values, ids = x.topk(int(k), op.attr("dim", -1), op.attr("largest", True), op.attr("sorted", True))
    return values, ids.to(torch.int32)


def _scatter(op: Op, data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    if op.attr("reduction", "none") != "none":
        raise NotImplementedError(f"ScatterElements with reduction {op.attr('reduction')}")
    return data.scatter(op.attr("axis", 0), indices.long(), updates)


OPERATORS: dict[str, Callable[..., Result]] = {
    "MoeGatingTopKSoftmax": _gating_softmax,
    "MoeGatingTopKSoftmaxV2": _gating_softmax_v2,
    "MoeGatingTopK": _gating_top_k,
    "MoeInitRoutingV3": _init_routing,
    "GroupedMatmul": _grouped_matmul,
    "GroupedMatmulSwigluQuantV2": _grouped_matmul_swiglu_quant,
    "GroupedMatmulFinalizeRouting": _grouped_matmul_finalize_routing,
    "MatmulAllReduce": _matmul_all_reduce,
    "DynamicQuant": lambda op, x, **absent: npu_ops.npu_dynamic_quant(x),
    "MoeFinalizeRoutingV2": _finalize_routing,
    "MoeTokenUnpermute": _token_unpermute,
    "RmsNorm": _rms_norm,
    "AddRmsNorm": _add_rms_norm,
    "AddRmsNormCast": _add_rms_norm_cast,
    "SwiGlu": lambda op, x: npu_ops.npu_swiglu(x, op.attr("dim", -1)),
    "ClippedSwiglu": _clipped_swiglu,
    "RotaryMul": lambda op, x, r1, r2: npu_ops.npu_rotary_mul(x, r1, r2),
    "FusedInferAttentionScore": _fused_infer_attention_score,
    "MatMul": _matmul,
    "MatMulV2": _matmul,
    "MatMulV3": _matmul,
    "BatchMatMul": _matmul,
    "BatchMatMulV2": _matmul,
    "Cast": lambda op, x: x.to(RUNTIME_DTYPES[op.attr("dst_type")]),
    "Bitcast": _bitcast,
    "Fill": lambda op, dims, value: torch.full(dims.tolist(), value.item(), dtype=value.dtype),
    "ReduceSum": lambda op, x, axes: x.sum(axes.tolist(), keepdim=bool(op.attr("keep_dims"))),
    "RealDiv": lambda op, x1, x2: x1 / x2,
    "FloorDiv": lambda op, x1, x2: x1.floor_divide(x2),
    "Mul": lambda op, x1, x2: x1 * x2,
    "Add": lambda op, x1, x2: x1 + x2,
    "AddV2": lambda op, x1, x2: x1 + x2,
    "Sub": lambda op, x1, x2: x1 - x2,
    "Sigmoid": lambda op, x: torch.sigmoid(x),
    "Swish": lambda op, x: F.silu(x),
    "Identity": lambda op, x: x,
    "TensorMove": lambda op, x: x.clone(),
    "Shape": lambda op, x: torch.tensor(x.shape, dtype=RUNTIME_DTYPES[op.attr("dtype", 3)]),
    "Reshape": lambda op, x, shape: x.reshape(shape.tolist()),
    "Transpose": lambda op, x, perm: x.permute(perm.tolist()).contiguous(),
    "Gather": lambda op, x, indices: x[indices.long()],
    "Pack": lambda op, x: torch.stack(x, op.attr("axis", 0)),
    "ArgMaxWithValue": _max,
    "BroadcastTo": lambda op, x, shape: x.broadcast_to(shape.tolist()).contiguous(),
    "ConcatV2": _concat,
    "Cos": lambda op, x: torch.cos(x),
    "Cumsum": lambda op, x, axis: x.cumsum(int(axis)),
    "Empty": lambda op, shape: torch.empty(shape.tolist(), dtype=RUNTIME_DTYPES[op.attr("dtype")]),
    "Equal": lambda op, x1, x2: x1 == x2,
    "GatherElements": lambda op, x, index: x.gather(op.attr("dim", 0), index.long()),
    "GatherV2": _gather_v2,
    "Greater": lambda op, x1, x2: x1 > x2,
    "GreaterEqual": lambda op, x1, x2: x1 >= x2,
    "Less": lambda op, x1, x2: x1 < x2,
    "LessEqual": lambda op, x1, x2: x1 <= x2,
    "IndexByTensor": _index,
    "LogicalAnd": lambda op, x1, x2: x1 & x2,
    "LogicalNot": lambda op, x: ~x,
    "MaskedFill": lambda op, x, mask, value: x.masked_fill(mask, value),
    "Maximum": lambda op, x1, x2: torch.maximum(x1, x2),
    "Minimum": lambda op, x1, x2: torch.minimum(x1, x2),
    "Muls": lambda op, x: x * op.attr("value"),
    "Neg": lambda op, x: -x,
    "NotEqual": lambda op, x1, x2: x1 != x2,
    "Range": lambda op, start, limit, delta: torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype),
    "ScatterElements": _scatter,
    "SelectV2": lambda op, condition, then, **other: torch.where(condition, then, other["else"]),
    "Sin": lambda op, x: torch.sin(x),
    "SoftmaxV2": _softmax,
    "SplitV": _split,
    "StridedSliceV2": _strided_slice,
    "StridedSlice": _strided_slice,
    "TopKV2": _top_k,
    "Unsqueeze": _unsqueeze,
    "ZerosLike": lambda op, x: torch.zeros_like(x),
    # Cache maintenance: type 6 is a prefetch, which reads memory and gives nothing.
    "Cmo": lambda op, src: (),
}
# Inputs that are lists: their parts are numbered.
DYNAMIC_INPUTS = {
    *(
        ("GroupedMatmul", name)
        for name in ("x", "weight", "bias", "scale", "offset", "antiquant_scale", "antiquant_offset")
    ),
    ("GroupedMatmulSwigluQuantV2", "weight"),
    ("GroupedMatmulSwigluQuantV2", "weight_scale"),
    ("GroupedMatmulSwigluQuantV2", "weight_assist_matrix"),
    ("FusedInferAttentionScore", "key"),
    ("FusedInferAttentionScore", "value"),
    ("Pack", "x"),
    ("ConcatV2", "x"),
}
# Operators that torchair asks CANN about before it uses them: inputs, outputs and attributes with their types.
IR = {
    "AddRmsNormCast": "attr epsilon VT_FLOAT",
    "Bitcast": "attr type VT_DATA_TYPE\nattr keep_dim VT_BOOL",
    "ClippedSwiglu": (
        "attr dim VT_INT\nattr alpha VT_FLOAT\nattr limit VT_FLOAT\nattr bias VT_FLOAT\nattr interleaved VT_BOOL"
    ),
    "GroupedMatmulFinalizeRouting": (
        "in x required\nin w required\nin scale optional\nin bias optional\nin pertoken_scale optional\n"
        "in group_list optional\nin shared_input optional\nin logit optional\nin row_index optional\n"
        "in offset optional\nout y required\n"
        "attr dtype VT_INT\nattr shared_input_weight VT_FLOAT\nattr shared_input_offset VT_INT\n"
        "attr transpose_x VT_BOOL\nattr transpose_w VT_BOOL\nattr output_bs VT_INT\nattr group_list_type VT_INT\n"
        "attr tuning_config VT_LIST_INT"
    ),
    "GroupedMatmulSwigluQuantV2": (
        "in x required\nin x_scale required\nin group_list required\nin weight dynamic\nin weight_scale dynamic\n"
        "in weight_assist_matrix dynamic\nin bias optional\nin smooth_scale optional\n"
        "out y required\nout y_scale required\n"
        "attr dequant_mode VT_INT\nattr dequant_dtype VT_INT\nattr quant_mode VT_INT\nattr quant_dtype VT_INT\n"
        "attr transpose_weight VT_BOOL\nattr group_list_type VT_INT\nattr tuning_config VT_LIST_INT"
    ),
    "MatmulAllReduce": (
        "in x1 required\nin x2 required\nin bias optional\nin x3 optional\nin antiquant_scale optional\n"
        "in antiquant_offset optional\nin dequant_scale optional\nin pertoken_scale optional\n"
        "in comm_quant_scale_1 optional\nin comm_quant_scale_2 optional\nout y required\n"
        "attr group VT_STRING\nattr reduce_op VT_STRING\nattr is_trans_a VT_BOOL\nattr is_trans_b VT_BOOL\n"
        "attr comm_turn VT_INT\nattr antiquant_group_size VT_INT\nattr group_size VT_INT\nattr y_dtype VT_INT\n"
        "attr comm_quant_mode VT_INT\nattr comm_mode VT_STRING"
    ),
    "MoeGatingTopKSoftmaxV2": "attr k VT_INT\nattr renorm VT_INT\nattr output_softmax VT_BOOL",
    "MoeTokenUnpermute": (
        "in permuted_tokens required\nin sorted_indices required\nin probs optional\nout unpermuted_tokens required\n"
        "attr padded_mode VT_BOOL"
    ),
}
