"""RMSNorm of queries and keys, then rotary embedding, in one launch; reads the parts of a merged qkv where they lie.

A head is held as three parts: the first and the second elements of all rotated pairs, and the rest that passes through.
So no pair layout needs slices of tensors. Values are fp32, rounded wherever the reference stores a narrower dtype.
"""

import triton
import triton.language as tl

from .rounding import round_to


@triton.jit
def _rounded_parts(first, second, rest, DTYPE: tl.constexpr):
    return round_to(first, DTYPE), round_to(second, DTYPE), round_to(rest, DTYPE)


@triton.jit
def _load(pointers, rows, columns, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``pointers`` [block of rows, block of columns] in fp32, zeros beyond the given sizes.

    Without masks where blocks divide the sizes: Ascend compares integers one at a time.
    """
    if ROWS % BLOCK_ROWS != 0:
        if columns.shape[1] == COLUMNS:
            x = tl.load(pointers, mask=rows < ROWS, other=0.0)
        else:
            x = tl.load(pointers, mask=(rows < ROWS) & (columns < COLUMNS), other=0.0)
    elif columns.shape[1] == COLUMNS:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=columns < COLUMNS, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(pointers, x, rows, columns, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of ``_load``."""
    x = x.to(pointers.dtype.element_ty)
    if ROWS % BLOCK_ROWS != 0:
        if columns.shape[1] == COLUMNS:
            tl.store(pointers, x, mask=rows < ROWS)
        else:
            tl.store(pointers, x, mask=(rows < ROWS) & (columns < COLUMNS))
    elif columns.shape[1] == COLUMNS:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=columns < COLUMNS)


@triton.jit
def _load_parts(
    base,
    offsets,
    rows,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of D elements at ``base + offsets`` as (first, second, rest); where there is no rest, any tensor."""
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        # One load of whole vectors, taken apart on the chip: strided ones take many times the room and time.
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        pairs = _load(base + offsets + columns, rows, columns, ROWS, BLOCK_ROWS, ROTARY)
        first, second = tl.split(tl.reshape(pairs, [BLOCK_ROWS, BLOCK_HALF, 2]))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        first = _load(base + offsets + columns, rows, columns, ROWS, BLOCK_ROWS, HALF)
        second = _load(base + HALF + offsets + columns, rows, columns, ROWS, BLOCK_ROWS, HALF)
    rest = first
    if D > ROTARY:
        columns = tl.arange(0, BLOCK_REST)[None, :]
        rest = _load(base + ROTARY + offsets + columns, rows, columns, ROWS, BLOCK_ROWS, D - ROTARY)
    return first, second, rest


@triton.jit
def _store_parts(
    base,
    offsets,
    first,
    second,
    rest,
    rows,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The inverse of ``_load_parts``."""
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        pairs = tl.reshape(tl.join(first, second), [BLOCK_ROWS, 2 * BLOCK_HALF])
        _store(base + offsets + columns, pairs, rows, columns, ROWS, BLOCK_ROWS, ROTARY)
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        _store(base + offsets + columns, first, rows, columns, ROWS, BLOCK_ROWS, HALF)
        _store(base + HALF + offsets + columns, second, rows, columns, ROWS, BLOCK_ROWS, HALF)
    if D > ROTARY:
        columns = tl.arange(0, BLOCK_REST)[None, :]
        _store(base + ROTARY + offsets + columns, rest, rows, columns, ROWS, BLOCK_ROWS, D - ROTARY)


@triton.jit
def _load_heads(
    x,
    stride,
    heads,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """The parts of a block of heads, and the sum of squares of each head."""
    offsets = _offsets(heads, stride, ASCEND)
    first, second, rest = _load_parts(x, offsets, heads, HEADS, BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
    squares = tl.sum(first * first + second * second, axis=1)
    if D > ROTARY:
        squares += tl.sum(rest * rest, axis=1)
    return first, second, rest, squares


@triton.jit
def _offsets(heads, stride, ASCEND: tl.constexpr):
    """Heads may lie far apart; Ascend would compute 64-bit vectors one element at a time."""
    return heads * stride if ASCEND else heads.to(tl.int64) * stride


@triton.jit
def _rotate_heads(
    x,
    x_stride,
    out,
    out_stride,
    weight,
    bias,
    cos,
    sin,
    eps,
    first_block,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED_IN: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    FULL_TABLES: tl.constexpr,
    X_DTYPE: tl.constexpr,
    WEIGHTED_DTYPE: tl.constexpr,
    NORMED_DTYPE: tl.constexpr,
    ROPE_DTYPE: tl.constexpr,
    ROTATED_DTYPE: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """BLOCKS blocks of BLOCK heads, of the token that x, out, cos and sin point at; all of them with NORM ``full``."""
    FULL: tl.constexpr = NORM == "full"
    WEIGHT_ROWS: tl.constexpr = HEADS if FULL else 1
    WEIGHT_BLOCK: tl.constexpr = BLOCK if FULL else 1
    only_row = tl.arange(0, 1)[:, None]

    if FULL_TABLES:
        cos_first, cos_second, _unused = _load_parts(
            cos, only_row, only_row, 1, 1, ROTARY, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED_IN
        )
        sin_first, sin_second, _unused = _load_parts(
            sin, only_row, only_row, 1, 1, ROTARY, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED_IN
        )
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        cos_first = _load(cos + columns, only_row, columns, 1, 1, ROTARY // 2)
        sin_first = _load(sin + columns, only_row, columns, 1, 1, ROTARY // 2)
        cos_second, sin_second = cos_first, sin_first

    total = tl.zeros([BLOCK], dtype=tl.float32)
    if FULL:
        # Where one block holds all heads, the compiler merges these loads with those below.
        for block in range(BLOCKS):
            heads = (first_block + block) * BLOCK + tl.arange(0, BLOCK)[:, None]
            first, second, rest, squares = _load_heads(
                x, x_stride, heads, HEADS, BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED_IN, ASCEND
            )
            total += squares

    for block in range(BLOCKS):
        heads = (first_block + block) * BLOCK + tl.arange(0, BLOCK)[:, None]
        weight_rows = heads if FULL else only_row
        # Ahead of the sum of squares, which waits for the heads: these loads need not wait with it.
        if weight is not None:
            by_first, by_second, by_rest = _load_parts(
                weight, weight_rows * D, weight_rows, WEIGHT_ROWS, WEIGHT_BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST,
                INTERLEAVED_IN,
            )  # fmt: skip
        if bias is not None:
            add_first, add_second, add_rest = _load_parts(
                bias, weight_rows * D, weight_rows, WEIGHT_ROWS, WEIGHT_BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST,
                INTERLEAVED_IN,
            )  # fmt: skip
        first, second, rest, squares = _load_heads(
            x, x_stride, heads, HEADS, BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED_IN, ASCEND
        )
        mean = tl.sum(total, axis=0) / (HEADS * D) if FULL else squares[:, None] / D
        scale = tl.rsqrt(mean + eps)
        first, second, rest = first * scale, second * scale, rest * scale
        if CAST == "before":
            first, second, rest = _rounded_parts(first, second, rest, X_DTYPE)
        if weight is not None:
            first, second, rest = first * (by_first + OFFSET), second * (by_second + OFFSET), rest * (by_rest + OFFSET)
        first, second, rest = _rounded_parts(first, second, rest, WEIGHTED_DTYPE)
        if bias is not None:
            first, second, rest = _rounded_parts(first + add_first, second + add_second, rest + add_rest, NORMED_DTYPE)

        # The rest passes through as the norm left it.
        first, second = round_to(first, ROPE_DTYPE), round_to(second, ROPE_DTYPE)
        turned_first = round_to(first * cos_first, ROTATED_DTYPE) - round_to(second * sin_first, ROTATED_DTYPE)
        turned_second = round_to(second * cos_second, ROTATED_DTYPE) + round_to(first * sin_second, ROTATED_DTYPE)
        first, second = round_to(turned_first, ROTATED_DTYPE), round_to(turned_second, ROTATED_DTYPE)
        offsets = _offsets(heads, out_stride, ASCEND)
        _store_parts(
            out, offsets, first, second, rest, heads, HEADS, BLOCK, D, ROTARY, BLOCK_HALF, BLOCK_REST, INTERLEAVED_OUT
        )


@triton.jit
def _copy(source, target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SIZE elements that lie together."""
    for start in tl.static_range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if SIZE % BLOCK == 0:
            tl.store(target + columns, tl.load(source + columns))
        else:
            tl.store(target + columns, tl.load(source + columns, mask=columns < SIZE), mask=columns < SIZE)


@triton.jit(do_not_specialize=["tokens", "length"])
def qk_norm_rope_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    cos,
    sin,
    positions,
    eps,
    tokens,
    length,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED_IN: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    FULL_TABLES: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    X_DTYPE: tl.constexpr,
    WEIGHTED_DTYPE: tl.constexpr,
    NORMED_DTYPE: tl.constexpr,
    ROPE_DTYPE: tl.constexpr,
    ROTATED_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """``moe_fx::qk_norm_rope``, and the split of a merged qkv.

    Args:
        q, k: [B, length, heads, D], with strides (in elements) ``*_batch``, ``*_token``, ``*_head`` and 1.
        v: [tokens, K_HEADS * D] with strides ``v_token`` and 1, or None for no copy of it; v_out: the same, dense.
        q_out, k_out: dense, [B, heads, length, D] with HEADS_FIRST, else [B, length, heads, D].
        q_weight, k_weight, q_bias, k_bias: dense [D] with NORM ``head``, [heads * D] with ``full``; or None.
        cos, sin: a row per token, with strides ``*_batch``, ``*_token`` and 1; of ROTARY values with FULL_TABLES, else
            of ROTARY / 2. With ``positions`` [tokens] the row is the position, else it is the token.
        tokens: B * length.
        BLOCK_Q, BLOCK_K: heads at a time; BLOCK_V: elements of v at a time; BLOCK_HALF, BLOCK_REST: powers of two, at
            least ROTARY / 2 and D - ROTARY.
        INTERLEAVED_IN, INTERLEAVED_OUT: whether pairs lie side by side, or a half apart.
        X_DTYPE, WEIGHTED_DTYPE, NORMED_DTYPE, ROPE_DTYPE, ROTATED_DTYPE: "bf16", "fp16" or "fp32", what the reference
            holds: q and k; they weighted; the norm's result; what the rotation reads; its products and sums.
        SPLIT: whether a work item is a part of a token (for GPUs: many programs, one step each) or a whole token.

    The grid is one-dimensional and of any size.
    """
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_Q - 1) // BLOCK_Q
    K_BLOCKS: tl.constexpr = (K_HEADS + BLOCK_K - 1) // BLOCK_K
    # A part is one block where heads are normalised on their own, else all of them.
    Q_PARTS: tl.constexpr = Q_BLOCKS if SPLIT and NORM == "head" else 1
    K_PARTS: tl.constexpr = K_BLOCKS if SPLIT and NORM == "head" else 1
    PARTS: tl.constexpr = Q_PARTS + K_PARTS + (0 if v is None else 1)
    ITEMS: tl.constexpr = PARTS if SPLIT else 1  # of a token

    for item in range(tl.program_id(0), tokens * ITEMS, tl.num_programs(0)):
        token = item // ITEMS
        # A token's offset may need 64 bits.
        b = tl.cast(token // length, tl.int64)
        s = tl.cast(token % length, tl.int64)
        row = s
        if positions is not None:
            row = tl.load(positions + token).to(tl.int64)
        token_cos = cos + b * cos_batch + row * cos_token
        token_sin = sin + b * sin_batch + row * sin_token
        token_q = q + b * q_batch + s * q_token
        token_k = k + b * k_batch + s * k_token
        if HEADS_FIRST:
            out_q = q_out + (b * Q_HEADS * length + s) * D
            out_k = k_out + (b * K_HEADS * length + s) * D
            out_head = length * D
        else:
            out_q = q_out + (b * length + s) * (Q_HEADS * D)
            out_k = k_out + (b * length + s) * (K_HEADS * D)
            out_head = D
        for step in tl.static_range(1 if SPLIT else PARTS):
            part = item % PARTS if SPLIT else step
            if part < Q_PARTS:
                _rotate_heads(
                    token_q, q_head, out_q, out_head, q_weight, q_bias, token_cos, token_sin, eps, part,
                    Q_BLOCKS // Q_PARTS, Q_HEADS, BLOCK_Q, D, ROTARY, BLOCK_HALF, BLOCK_REST, NORM, CAST, OFFSET,
                    INTERLEAVED_IN, INTERLEAVED_OUT, FULL_TABLES, X_DTYPE, WEIGHTED_DTYPE, NORMED_DTYPE, ROPE_DTYPE,
                    ROTATED_DTYPE, ASCEND
                )  # fmt: skip
            elif part < Q_PARTS + K_PARTS:
                _rotate_heads(
                    token_k, k_head, out_k, out_head, k_weight, k_bias, token_cos, token_sin, eps, part - Q_PARTS,
                    K_BLOCKS // K_PARTS, K_HEADS, BLOCK_K, D, ROTARY, BLOCK_HALF, BLOCK_REST, NORM, CAST, OFFSET,
                    INTERLEAVED_IN, INTERLEAVED_OUT, FULL_TABLES, X_DTYPE, WEIGHTED_DTYPE, NORMED_DTYPE, ROPE_DTYPE,
                    ROTATED_DTYPE, ASCEND
                )  # fmt: skip
            elif v is not None:
                to = tl.cast(token, tl.int64)
                _copy(v + to * v_token, v_out + to * (K_HEADS * D), K_HEADS * D, BLOCK_V)
