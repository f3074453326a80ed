"""What torch_npu's MoE operators compute, on CPU tensors: written from their documentation, its constraints as checks.

Each function has the operator's own arguments. Arithmetic is in fp32 and rounded once, as the kernels do it. A call
that the documentation rules out raises: on hardware it would fail, or worse, not fail.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensors = tuple[torch.Tensor, ...]
# What products by group need of their counts.
_COVER = "groups must cover all rows"
FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def _require(condition: bool, operator: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{operator}: {what}")


def npu_moe_gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> Tensors:
    """Softmax, then top-k, nothing renormalised; x [..., E]."""
    weights, ids, _ = npu_moe_gating_top_k_softmax_v2(x, k=k, finished=finished)
    n = ids.numel() // k
    rows = torch.arange(n * k, dtype=torch.int32).reshape(k, n).t().contiguous()
    return weights, ids, rows.reshape(ids.shape)


def npu_moe_gating_top_k_softmax_v2(
    x: torch.Tensor,
    *,
    k: int = 1,
    finished: torch.Tensor | None = None,
    renorm: int = 0,
    output_softmax: bool = False,
) -> Tensors:
    """``renorm`` 0: softmax, then top-k; 1: top-k, then softmax."""
    name = "npu_moe_gating_top_k_softmax_v2"
    _require(x.dim() in (2, 3) and x.dtype in FLOATING, name, "x must be a floating [.., E] of rank 2 or 3")
    _require(finished is None, name, "finished is not modelled")
    _require(0 < k <= min(x.shape[-1], 1024), name, f"k = {k} is out of range")
    scores = x.float() if renorm else torch.softmax(x.float(), -1)
    weights, ids = scores.topk(k, -1)
    if renorm:
        weights = torch.softmax(weights, -1)
    full = scores if output_softmax and not renorm else torch.empty(0)
    return weights.to(x.dtype), ids.to(torch.int32), full


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Tensors:
    """Group-limited selection on biased scores; the kernel divides sigmoid weights by their sum plus eps, always."""
    name = "npu_moe_gating_top_k"
    n_experts = x.shape[-1]
    in_group = n_experts // group_count
    _require(x.dim() == 2 and x.dtype in FLOATING, name, "x must be a floating [T, E]")
    _require(n_experts <= 2048, name, f"{n_experts} experts are more than 2048")
    _require(input_ids is None and tid2eid is None, name, "the hash mode is not modelled")
    _require(
        bias is None or (bias.dtype == x.dtype and bias.shape == (n_experts,)), name, "bias must be [E] of x's dtype"
    )
    _require(renorm == 0, name, "renorm supports 0 only")
    _require(norm_type in (0, 1) and group_select_mode in (0, 1), name, "norm_type and group_select_mode are 0 or 1")
    _require(1 <= k_group <= group_count, name, f"k_group = {k_group} with {group_count} groups")
    _require(n_experts % group_count == 0 and in_group > 2, name, f"groups of {in_group} experts are too small")
    _require(-(-in_group // 32) * 32 * group_count <= 2048, name, f"{group_count} groups are too many")
    _require(1 <= k <= in_group * k_group, name, f"k = {k} is out of range")
    scores = torch.sigmoid(x.float()) if norm_type == 1 else torch.softmax(x.float(), -1)
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        grouped = choice.unflatten(-1, (group_count, -1))
        best = grouped.max(-1)[0] if group_select_mode == 0 else grouped.topk(2, -1)[0].sum(-1)
        keep = torch.zeros_like(best).scatter(-1, best.topk(k_group, -1)[1], 1).bool()
        choice = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(k, -1)[1]
    weights = scores.gather(-1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = weights * routed_scaling_factor
    return weights.to(x.dtype), ids.to(torch.int32), scores if out_flag else torch.empty_like(scores)


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Any = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> Tensors:
    """Rows sorted by expert (stably), where each pair went (``row_idx_type`` 0) or came from (1), tokens per expert.

    Rows from ``active_num`` on are not written: zeros here. ``expert_tokens_num_type`` 0 gives running sums of tokens.
    """
    name = "npu_moe_init_routing_v2"
    first, last = list(active_expert_range) or (0, expert_num)
    _require(x.dim() == 2 and expert_idx.dim() == 2, name, "x and expert_idx must be of rank 2")
    _require(expert_idx.dtype == torch.int32, name, f"expert_idx must be int32, not {expert_idx.dtype}")
    _require(drop_pad_mode == 0, name, "drop_pad_mode supports 0 only")
    _require(
        expert_tokens_num_type in (0, 1) and expert_tokens_num_flag,
        name,
        "only token counts of type 0 or 1 are modelled",
    )
    _require(quant_mode == -1 and offset is None, name, "only quant_mode -1 is modelled")
    _require(scale is None or scale.shape == x.shape[:1], name, "scale must be [T] when nothing is quantised")
    flat = expert_idx.reshape(-1).long()
    _require(bool(((flat >= 0) & (flat < expert_num)).all()), name, "an expert id is out of range")
    top_k = expert_idx.shape[1]
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).sort(stable=True)[1]
    row = order
    if row_idx_type == 0:
        row = torch.empty_like(order)
        row[order] = torch.arange(order.numel())
        row = torch.where(active, row, -1)
    counts = torch.bincount(flat[active] - first, minlength=last - first)
    if expert_tokens_num_type == 0:
        counts = counts.cumsum(0)
    rows = x[order // top_k]
    if active_num > 0:
        rows[active_num:] = 0
    expanded_scale = torch.empty(order.numel()) if scale is None else scale[order // top_k].float()
    return rows, row.to(torch.int32), counts, expanded_scale


def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    output_dtype: int | torch.dtype | None = None,
    **unused: Any,
) -> list[torch.Tensor]:
    """Rows of x in groups, each by its own weight [K, N]; plain, W8A8 with token scales, or with widened weights."""
    name = "npu_grouped_matmul"
    given = sorted(key for key, value in unused.items() if value is not None)
    _require(not given, name, f"{given} are not modelled")
    if isinstance(output_dtype, int):
        output_dtype = {5: torch.float16, 15: torch.bfloat16}[output_dtype]
    _require(len(x) == len(weight) == 1 and weight[0].dim() == 3, name, "one x and one weight [E, K, N] are modelled")
    _require(group_type == 0 and split_item in (2, 3), name, "group_type 0 goes with split_item 2 or 3")
    _require(act_type == 0, name, "act_type is not modelled")
    rows, matrices = x[0], weight[0]
    _require(group_list is not None and group_list.dtype == torch.int64, name, "group_list must be int64")
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    _require(counts.shape == matrices.shape[:1], name, "group_list must count one group per expert")
    _require(int(counts.sum()) == rows.shape[0], name, _COVER)
    widened = matrices.dtype != rows.dtype
    if widened:
        _require(
            antiquant_scale is not None and antiquant_offset is not None,
            name,
            "weights of another dtype need antiquant",
        )
        assert antiquant_scale is not None and antiquant_offset is not None
        matrices = _widen(name, matrices, antiquant_scale[0], antiquant_offset[0], rows.dtype)
    _require(
        matrices.shape[1] == rows.shape[1], name, f"x has {rows.shape[1]} columns, weight {matrices.shape[1]} rows"
    )
    quantised = rows.dtype == torch.int8
    if quantised:
        _require(scale is not None and per_token_scale is not None, name, "int8 needs scale and per_token_scale")
        _require(output_dtype in (torch.float16, torch.bfloat16), name, "int8 gives fp16 or bf16")
        _require(bias is None, name, "int8 with a bias is not modelled")
    else:
        _require(output_dtype in (None, rows.dtype), name, "the output has x's dtype")
    if bias:
        wanted = torch.float16 if rows.dtype == torch.float16 else torch.float32
        _require(bias[0].dtype == wanted and bias[0].dim() == 2, name, f"bias must be [E, N] {wanted} for {rows.dtype}")
    exact = torch.float64 if quantised else torch.float32
    result = torch.zeros(rows.shape[0], matrices.shape[-1])
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        end = begin + count
        y = (rows[begin:end].to(exact) @ matrices[expert].to(exact)).float()
        if bias:
            y = y + bias[0][expert].float()
        if quantised:
            assert scale is not None and per_token_scale is not None
            y = y * per_token_scale[0][begin:end].unsqueeze(-1) * scale[0][expert].float()
        result[begin:end] = y
        begin = end
    return [result.to(output_dtype or rows.dtype)]


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Eight signed nibbles of each int32, the lowest first: [..., N / 8] -> int8 [..., N]."""
    nibbles = torch.stack([(packed >> shift) & 0xF for shift in range(0, 32, 4)], dim=-1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def _widen(
    name: str, packed: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    _require(scale.dtype == offset.dtype == dtype, name, "antiquant scale and offset must have x's dtype")
    _require(scale.shape == offset.shape, name, "antiquant scale and offset must have one shape")
    values = unpack_int4(packed) if packed.dtype == torch.int32 else packed
    if scale.dim() == 2:
        scale, offset = scale.unsqueeze(1), offset.unsqueeze(1)
    else:
        _require(packed.dtype == torch.int32, name, "only int4 weights have groups")
    per_group = values.shape[1] // scale.shape[1]
    scale, offset = (t.float().repeat_interleave(per_group, dim=1) for t in (scale, offset))
    return ((values.float() + offset) * scale).to(dtype)


def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    group_list_type: int = 0,
    dequant_mode: int = 0,
    dequant_dtype: int = 6,
    quant_mode: int = 0,
    quant_dtype: int = 1,
    **unused: Any,
) -> Tensors:
    """W8A8 gate/up, SwiGLU and per-token quantisation of the result."""
    name = "npu_grouped_matmul_swiglu_quant_v2"
    given = sorted(key for key, value in unused.items() if value is not None)
    _require(not given, name, f"{given} are not modelled")
    _require(x.dtype == weight[0].dtype == torch.int8, name, "x and weight must be int8")
    _require(weight_scale[0].dtype == x_scale.dtype == torch.float32, name, "scales must be fp32")
    _require((dequant_mode, quant_mode) == (0, 0), name, "dequant_mode and quant_mode support 0 only")
    _require((dequant_dtype, quant_dtype) == (6, 1), name, "fp32 between the products, and int8, are modelled")
    _require(int(group_list.sum() if group_list_type == 1 else group_list[-1]) == x.shape[0], name, _COVER)
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    h = torch.zeros(x.shape[0], weight[0].shape[-1])
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        end = begin + count
        y = (x[begin:end].double() @ weight[0][expert].double()).float()
        h[begin:end] = y * x_scale[begin:end].unsqueeze(-1) * weight_scale[0][expert]
        begin = end
    gate, up = h.chunk(2, -1)
    return npu_dynamic_quant((F.silu(gate) * up).to(torch.float32))


def npu_grouped_matmul_finalize_routing(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    shared_input: torch.Tensor | None = None,
    logit: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    shared_input_weight: float = 1.0,
    shared_input_offset: int = 0,
    output_bs: int = 0,
    group_list_type: int = 1,
    **unused: Any,
) -> torch.Tensor:
    """W8A8 down projection; rows are weighed by ``logit`` and added onto row ``row_index`` of [output_bs, N], in fp32.

    A shared expert's result is added onto the rows from ``shared_input_offset`` on, weighed.
    """
    name = "npu_grouped_matmul_finalize_routing"
    given = sorted(key for key, value in unused.items() if value is not None)
    _require(not given, name, f"{given} are not modelled")
    _require(x.dtype == w.dtype == torch.int8 and x.dim() == 2 and w.dim() == 3, name, "x [M, K] and w [E, K, N]: int8")
    (m, k), (n_experts, rows_of_w, n) = x.shape, w.shape
    _require(k == rows_of_w, name, f"x has {k} columns, w {rows_of_w} rows")
    _require(n_experts <= 256 and k % 16 == 0 and n % 32 == 0 and n >= 256, name, f"w of {list(w.shape)} is not taken")
    _require(1 <= m <= 16 * 1024 * 8 and 1 <= output_bs <= 16 * 1024, name, f"{m} rows to {output_bs} are not taken")
    _require(scale is not None and scale.dtype == torch.float32, name, "scale must be fp32")
    _require(pertoken_scale is not None and pertoken_scale.dtype == torch.float32, name, "pertoken_scale must be fp32")
    assert scale is not None and pertoken_scale is not None
    _require(scale.shape == (n_experts, n) and pertoken_scale.shape == (m,), name, "scales must be [E, N] and [M]")
    _require(row_index is not None and row_index.dtype == torch.int64, name, "row_index must be int64")
    _require(dtype in (None, torch.float32), name, "the result is fp32")
    _require((shared_input is None) == (logit is None), name, "shared_input and logit come together or not at all")
    _require(group_list.dtype == torch.int64 and group_list.shape == (n_experts,), name, "group_list must be int64 [E]")
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    assert row_index is not None
    _require(int(counts.sum()) <= m == row_index.numel(), name, "groups and row_index must fit the rows")
    _require(bool(((row_index >= 0) & (row_index < output_bs)).all()), name, "a row index is out of range")
    y = torch.zeros(m, n)
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        end = begin + count
        y[begin:end] = (x[begin:end].double() @ w[expert].double()).float() * scale[expert]
        begin = end
    y = y * pertoken_scale.unsqueeze(-1)
    result = torch.zeros(output_bs, n)
    if shared_input is not None and logit is not None:
        _require(shared_input.dtype == torch.bfloat16 and logit.dtype == torch.float32, name, "they are bf16 and fp32")
        _require(logit.shape == (m,) and shared_input.shape[1] == n, name, "they must be [M] and [.., N]")
        last = shared_input_offset + shared_input.shape[0]
        _require(1 <= shared_input.shape[0] <= 2048 and last <= output_bs, name, "shared_input has too many rows")
        y = y * logit.unsqueeze(-1)
        result[shared_input_offset:last] = shared_input.float() * shared_input_weight
    return result.index_add(0, row_index[:begin], y[:begin])


def npu_dynamic_quant(input: torch.Tensor, **unused: Any) -> Tensors:
    """Rows to int8 steps of ``max|row| / 127``; returns int8 and fp32 scales [..., rows]."""
    given = sorted(key for key, value in unused.items() if value not in (None, 1, "pertoken", 0.0))
    _require(not given, "npu_dynamic_quant", f"{given} are not modelled")
    rows = input.float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, rows / scale, 0).round().clamp(-128, 127)
    return steps.to(torch.int8), scale.squeeze(-1)


def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> torch.Tensor:
    """Weighted sum over each token's k rows; row indices are column-major in modes 0 and 1, row-major in 2 and 3."""
    name = "npu_moe_finalize_routing"
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    _require(index.dtype == torch.int32 and index.dim() == 1, name, "row indices must be int32 [T * k]")
    _require(drop_pad_mode in (0, 2), name, "only dropless modes are modelled")
    _require(scales is None or scales.dtype == rows.dtype, name, "scales must have the rows' dtype")
    _require(bias is None or export_for_source_row is not None, name, "bias needs the expert of each row")
    tokens = index.numel() // k if scales is None else scales.shape[0]
    top_k = index.numel() // max(tokens, 1)
    _require(bool((index >= 0).all()), name, "a row index is negative")
    where = index.long().reshape(tokens, top_k) if drop_pad_mode == 2 else index.long().reshape(top_k, tokens).t()
    y = rows[where].float()
    if bias is not None and export_for_source_row is not None:
        y = y + bias.float()[export_for_source_row.long()]
    if scales is not None:
        y = y * scales.float().unsqueeze(-1)
    y = y.sum(1)
    for skip in (skip1, skip2):
        y = y if skip is None else y + skip.float()
    return y.to(rows.dtype)


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> torch.Tensor:
    """Rows taken back by row-major index, weighted and summed over k."""
    name = "npu_moe_token_unpermute"
    _require(not padded_mode, name, "padded_mode supports False only")
    _require(sorted_indices.dtype == torch.int32 and sorted_indices.dim() == 1, name, "indices must be int32 [T * k]")
    _require(probs is None or probs.dtype == permuted_tokens.dtype, name, "probs must have the rows' dtype")
    top_k = 1 if probs is None else probs.shape[1]
    y = permuted_tokens[sorted_indices.long()].float().unflatten(0, (-1, top_k))
    y = y if probs is None else y * probs.float().unsqueeze(-1)
    return y.sum(1).to(permuted_tokens.dtype)


# Groups of ranks by the name that HCCL would have for them; they talk over gloo.
GROUPS: dict[str, Any] = {}


def npu_mm_all_reduce_base(
    x1: torch.Tensor,
    x2: torch.Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: torch.Tensor | None = None,
    x3: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    comm_quant_mode: int = 0,
    comm_mode: str | None = None,
    **unused: Any,
) -> torch.Tensor:
    """``x1 @ x2 + bias + x3``, summed over the ranks of a group."""
    name = "npu_mm_all_reduce_base"
    given = sorted(key for key, value in unused.items() if value is not None)
    _require(not given and not antiquant_group_size and not comm_quant_mode, name, f"{given} are not modelled")
    _require(x1.dtype == x2.dtype and x1.dtype in FLOATING[:2], name, f"{x1.dtype} and {x2.dtype} are not taken")
    _require(x1.dim() in (2, 3) and x2.dim() == 2, name, "x1 must be of rank 2 or 3, x2 of rank 2")
    _require(reduce_op == "sum" and comm_turn == 0, name, "sums in one turn are supported")
    y = x1.float() @ x2.float()
    for summand in (bias, x3):
        _require(summand is None or summand.dtype == x1.dtype, name, "summands must have x1's dtype")
        y = y if summand is None else y + summand.float()
    torch.distributed.all_reduce(y, group=GROUPS[hcom])
    return y.to(x1.dtype)


def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Tensors:
    """Over gamma's dimensions; also the reciprocal root mean square, fp32."""
    _require(input.dtype == gamma.dtype, "npu_rms_norm", f"gamma is {gamma.dtype}, the input {input.dtype}")
    x = input.float()
    reciprocal = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return (x * reciprocal * gamma.float()).to(input.dtype), reciprocal


def npu_add_rms_norm(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Tensors:
    """The norm of the rounded sum, the reciprocal root mean square, and the sum."""
    _require(x1.dtype == x2.dtype and x1.shape == x2.shape, "npu_add_rms_norm", "x1 and x2 must be alike")
    total = (x1.float() + x2.float()).to(x1.dtype)
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_add_rms_norm_cast(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Tensors:
    """What torchair makes of ``npu_add_rms_norm`` with a cast to fp32 behind it: the rounded norm in fp32 too."""
    y, reciprocal, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
    return y.float(), y, reciprocal, total


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``silu(first half) * second half``."""
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


def npu_clipped_swiglu(
    x: torch.Tensor,
    *,
    group_index: torch.Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> torch.Tensor:
    """gpt-oss' activation: clamped gate and up, then ``gate * sigmoid(alpha * gate) * (up + bias)``."""
    _require(
        group_index is None and dim in (-1, x.dim() - 1), "npu_clipped_swiglu", "only the last dimension is modelled"
    )
    h = x.float()
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)


def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """``input * r1 + rotated(input) * r2`` on rank 4: halves, or neighbours, change places; the first's sign, too.

    The result is contiguous whatever the input is, as torch_npu's meta function has it.
    """
    name = "npu_rotary_mul"
    _require(rotary_mode in ("half", "interleave") and rotate is None, name, "only halves and pairs are modelled")
    _require(input.dim() == r1.dim() == r2.dim() == 4, name, "operands must be of rank 4")
    _require(input.dtype == r1.dtype == r2.dtype, name, "operands must be of one dtype")
    _require(
        r1.shape[-1] == input.shape[-1] < 896 and input.shape[-1] % 2 == 0, name, "tables must be as wide as the head"
    )
    if rotary_mode == "half":
        first, second = input.float().chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        first, second = input.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-second, first), -1).flatten(-2)
    return (input.float() * r1.float() + turned * r2.float()).to(input.dtype).contiguous()


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
) -> Tensors:
    """Attention over [B, N, S, D]; a mask of True leaves out. Quantisation, paging and lengths are not modelled."""
    name = "npu_fused_infer_attention_score"
    batch, heads, queries, width = query.shape
    kv_heads, keys = num_key_value_heads or num_heads, key.shape[2]
    half = all(x.is_contiguous() and x.dtype in FLOATING[:2] and x.dtype == query.dtype for x in (query, key, value))
    _require(half, name, "query, key and value must be contiguous, fp16 or bf16")
    _require(key.shape == value.shape == (batch, kv_heads, keys, width), name, "key and value must be [B, Nkv, T, D]")
    _require(width % 16 == 0 and width <= 512, name, f"a width of {width}")
    _require(heads == num_heads <= 256 and heads % kv_heads == 0 and heads // kv_heads <= 64, name, "heads")
    layouts = ("BNSD", "BNSD_BSND") if queries > 1 else ("BNSD",)
    _require(input_layout in layouts, name, f"layout {input_layout} with {queries} queries is refused or not modelled")
    _require(min(pre_tokens, next_tokens) == 2147483647, name, "windows are not modelled")
    _require(inner_precise in ((0, 1, 2, 3) if queries > 1 else (0, 1)), name, f"inner_precise {inner_precise}")
    left_out = torch.zeros(queries, keys, dtype=torch.bool)
    if sparse_mode in (2, 3):
        _require(queries > 1, name, "one query has no sparse mode")
        triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        given = atten_mask is not None and atten_mask.dtype == torch.bool and torch.equal(atten_mask, triangle)
        _require(given, name, "causal modes take a triangle of 2048 x 2048")
        left_out = torch.ones(queries, keys, dtype=torch.bool).triu(1 + (0 if sparse_mode == 2 else keys - queries))
    elif atten_mask is not None:
        _require(sparse_mode == 0, name, f"sparse mode {sparse_mode} is not modelled")
        _require(atten_mask.dtype == torch.bool and atten_mask.is_contiguous(), name, "a mask must be contiguous, bool")
        _require(atten_mask.shape == (batch, 1, queries, keys), name, "a mask must be [B, 1, S, T]")
        left_out = atten_mask
    key, value = (x.float().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    weights = (query.float() @ key.transpose(-1, -2) * scale).masked_fill(left_out, -torch.inf).softmax(-1)
    if inner_precise & 2:
        weights = weights.nan_to_num(0.0)
    result = (weights @ value).to(query.dtype)
    # No sums of exponentials unless softmax_lse_flag asks for them.
    return (result.transpose(1, 2).contiguous() if "_" in input_layout else result), torch.zeros(1)


def npu_fusion_attention_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: None = None,
    padding_mask: None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: None = None,
    actual_seq_qlen: None = None,
    actual_seq_kvlen: None = None,
    sparse_mode: int = 0,
) -> Tensors:
    """What torch_npu makes of ``scaled_dot_product_attention``, its forward for BNSD; a mask of True leaves out."""
    name = "npu_fusion_attention_v3"
    _require(input_layout == "BNSD" and query.shape[1] == head_num, name, "one layout is modelled, BNSD")
    _require(keep_prob == 1.0, name, "dropout is not modelled")
    (batch, heads, queries, width), (kv_heads, keys) = query.shape, key.shape[1:3]
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in FLOATING
    _require(one_dtype, name, "query, key and value must be of one floating dtype")
    _require(key.shape == (batch, kv_heads, keys, width) and width <= 768, name, "key must be [B, Nkv, T, D]")
    fits = value.shape[:3] == key.shape[:3] and value.shape[3] <= width
    _require(fits, name, "value must be [B, Nkv, T, Dv] with Dv <= D")
    _require(heads <= 256 and heads % kv_heads == 0, name, "heads")
    left_out = torch.zeros(queries, keys, dtype=torch.bool)
    if atten_mask is not None:
        _require(atten_mask.dtype in (torch.bool, torch.uint8), name, "a mask must be bool or uint8")
        left_out = atten_mask.bool()
    if sparse_mode == 2:
        triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        _require(torch.equal(left_out, triangle), name, "causal modes take a triangle of 2048 x 2048")
        left_out = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    else:
        _require(sparse_mode == 0 and min(pre_tockens, next_tockens) == 2147483647, name, "windows are not modelled")
        shapes = [(batch, heads), (batch, 1), (1, 1), ()]
        fits = tuple(left_out.shape) in [(*leading, queries, keys) for leading in shapes]
        _require(fits, name, "a mask must be [B, N, S, T], [B, 1, S, T], [1, 1, S, T] or [S, T]")
    key, value = (x.float().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = (query.float() @ key.transpose(-1, -2) * scale).masked_fill(left_out, -torch.inf)
    weights = scores.softmax(-1)
    if inner_precise == 2:
        weights = weights.nan_to_num(0.0)
    # What a backward would read, eight times each; seed and offset of a dropout.
    highest = scores.amax(-1, keepdim=True)
    sums = [x.expand(-1, -1, -1, 8).clone() for x in (highest, (scores - highest).exp().sum(-1, keepdim=True))]
    return (weights @ value).to(query.dtype), *sums, query.new_empty(0), *torch.zeros(2, 1, dtype=torch.int64)


OPERATORS = {
    function.__name__: function
    for function in (
        npu_moe_gating_top_k_softmax,
        npu_moe_gating_top_k_softmax_v2,
        npu_moe_gating_top_k,
        npu_moe_init_routing_v2,
        npu_grouped_matmul,
        npu_grouped_matmul_swiglu_quant_v2,
        npu_grouped_matmul_finalize_routing,
        npu_dynamic_quant,
        npu_moe_finalize_routing,
        npu_moe_token_unpermute,
        npu_mm_all_reduce_base,
        npu_rms_norm,
        npu_add_rms_norm,
        npu_add_rms_norm_cast,
        npu_swiglu,
        npu_clipped_swiglu,
        npu_rotary_mul,
        npu_fused_infer_attention_score,
        npu_fusion_attention_v3,
    )
}
