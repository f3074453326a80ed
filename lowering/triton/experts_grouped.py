"""Fused experts for many tokens: matrix products over tiles of pairs that share an expert (see ``expert_tiles``).

``gate_up_tiles_kernel`` gathers tokens, multiplies, and applies the activation while gate and up are in registers;
``down_tiles_kernel`` scatters each pair's result; ``combine_kernel`` sums a token's pairs. Tiles are walked in groups
of GROUP: consecutive programs take one block of weights for all tiles of a group, most of which share their expert, and
then the next block, so that weights are read from memory once and from the cache after that.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def tile_and_block(item, n_tiles, N_BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """The tile and the block of channels that a work item stands for."""
    group = item // (GROUP * N_BLOCKS)
    within = item % (GROUP * N_BLOCKS)
    size = tl.minimum(n_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def wide(index, ASCEND: tl.constexpr):
    """Row indices in 64 bits, where rows times their length may not fit 32; Ascend's vector unit has no such."""
    if not ASCEND:
        index = index.to(tl.int64)
    return index


@triton.jit
def with_bias(value, bias, first, channel, mask, model: tl.constexpr):
    """A product [m, n] rounded to the model's dtype, plus a bias [n], rounded again, as fp32."""
    value = value.to(model).to(tl.float32)
    if bias is not None:
        row = tl.load(bias + first + channel, mask=mask, other=0.0).to(tl.float32)
        value = (value + row[None, :]).to(model).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_tiles_kernel(
    x,
    weights,
    order,
    tiles,
    w_gate,
    w_up,
    b_gate,
    b_up,
    h,
    max_tiles,
    x_stride,
    alpha,
    limit,
    H: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    UP_E: tl.constexpr,
    UP_N: tl.constexpr,
    UP_K: tl.constexpr,
    B_E: tl.constexpr,
    GATE_AT: tl.constexpr,
    UP_AT: tl.constexpr,
    STEP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """h[row] = activation(gate, up) for every row of ``order``; arguments as in ``gate_up_pairs_kernel``.

    Args:
        order, tiles, max_tiles: of ``place_pairs_kernel``, with the same BLOCK_M.
        h: [n_pairs, I] in the model's dtype, in the order of ``order``.
        MERGED: read rows of gate and up alternately, as one block: one product of twice the width, and either half of
            a pair of columns lies in the same registers.
    """
    model = h.dtype.element_ty
    N_BLOCKS: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = 2 * BLOCK_N if MERGED else BLOCK_N
    n_tiles = tl.load(tiles)
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_and_block(item, n_tiles, N_BLOCKS, GROUP)
        expert = tl.load(tiles + 1 + tile)
        rows = tl.load(tiles + 1 + max_tiles + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tiles + 1 + 2 * max_tiles + tile)
        pairs = tl.load(order + rows, mask=live, other=0)
        k = tl.arange(0, BLOCK_K)
        first = block * BLOCK_N
        if not MERGED:
            column = first + tl.arange(0, COLUMNS)
            column_mask = column < INTER
            channel = GATE_AT + column * STEP
        elif STEP == 2:
            channel = 2 * first + tl.arange(0, COLUMNS)
            column_mask = channel < 2 * INTER
        else:
            column = first + tl.arange(0, COLUMNS) // 2
            column_mask = column < INTER
            channel = GATE_AT + column + (tl.arange(0, COLUMNS) % 2) * (UP_AT - GATE_AT)
        x_at = x + wide(pairs // TOP_K, ASCEND)[:, None] * x_stride + k[None, :]
        gate_at = w_gate + expert.to(tl.int64) * W_E + channel[None, :] * W_N + k[:, None] * W_K
        up_at = w_up + expert.to(tl.int64) * UP_E + (channel + (UP_AT - GATE_AT))[None, :] * UP_N + k[:, None] * UP_K
        if WEIGHT_ON_INPUT:
            weight = tl.load(weights + pairs, mask=live, other=0.0).to(tl.float32)[:, None]
        gate_sum = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
        up_sum = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
        for start in range(0, H, BLOCK_K):
            k_mask = start + k < H
            if ASCEND:
                # A mask of a gather is computed, and the vector unit orders fp32, no integers. Rows past a tile's end
                # are token 0's, and not stored.
                a = tl.load(x_at + start, mask=(k.to(tl.float32) < H - start)[None, :], other=0.0)
            else:
                a = tl.load(x_at + start, mask=live[:, None] & k_mask[None, :], other=0.0)
            if WEIGHT_ON_INPUT:
                a = (a.to(tl.float32) * weight).to(model)
            mask = column_mask[None, :] & k_mask[:, None]
            gate_sum = tl.dot(
                a, tl.load(gate_at + start * W_K, mask=mask, other=0.0), acc=gate_sum, input_precision="ieee"
            )
            if GATED and not MERGED:
                up = tl.load(up_at + start * UP_K, mask=mask, other=0.0)
                up_sum = tl.dot(a, up, acc=up_sum, input_precision="ieee")
        bias_at = expert.to(tl.int64) * B_E
        gate = with_bias(gate_sum, b_gate, bias_at, channel, column_mask, model)
        if MERGED:
            gate, up_value = tl.split(tl.reshape(gate, [BLOCK_M, BLOCK_N, 2]))
        elif GATED:
            up_value = with_bias(up_sum, b_up, bias_at, channel + (UP_AT - GATE_AT), column_mask, model)
        else:
            up_value = gate
        activated = activate(gate, up_value, ACT, GATED, alpha, limit, HAS_LIMIT)
        out = first + tl.arange(0, BLOCK_N)
        h_at = h + wide(rows, ASCEND)[:, None] * INTER + out[None, :]
        tl.store(h_at, activated.to(model), mask=live[:, None] & (out < INTER)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def down_tiles_kernel(
    h,
    order,
    tiles,
    w2,
    b2,
    results,
    max_tiles,
    H: tl.constexpr,
    INTER: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """results[pair] = w2 of the pair's expert @ h[row of the pair] + b2, rounded as the reference does.

    Args:
        h: [n_pairs, I] in the order of ``order``. order, tiles, max_tiles: of ``place_pairs_kernel``, same BLOCK_M.
        w2, b2: as in ``down_pairs_kernel``.
        results: [n_pairs, H] in the model's dtype; rows of pairs without an expert stay unwritten.
    """
    model = results.dtype.element_ty
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.load(tiles)
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_and_block(item, n_tiles, N_BLOCKS, GROUP)
        expert = tl.load(tiles + 1 + tile)
        rows = tl.load(tiles + 1 + max_tiles + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tiles + 1 + 2 * max_tiles + tile)
        k = tl.arange(0, BLOCK_K)
        channel = block * BLOCK_N + tl.arange(0, BLOCK_N)
        h_at = h + wide(rows, ASCEND)[:, None] * INTER + k[None, :]
        w_at = w2 + expert.to(tl.int64) * W_E + channel[None, :] * W_N + k[:, None] * W_K
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, INTER, BLOCK_K):
            k_mask = start + k < INTER
            a = tl.load(h_at + start, mask=live[:, None] & k_mask[None, :], other=0.0)
            w = tl.load(w_at + start * W_K, mask=(channel < H)[None, :] & k_mask[:, None], other=0.0)
            sums = tl.dot(a, w, acc=sums, input_precision="ieee")
        out = with_bias(sums, b2, expert.to(tl.int64) * H, channel, channel < H, model)
        pairs = tl.load(order + rows, mask=live, other=0)
        out_at = results + wide(pairs, ASCEND)[:, None] * H + channel[None, :]
        tl.store(out_at, out.to(model), mask=live[:, None] & (channel < H)[None, :])


@triton.jit(do_not_specialize=["n_tokens"])
def combine_kernel(
    results,
    weights,
    ids,
    y,
    n_tokens,
    E: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y[t] = sum over t's pairs of weight * results[pair], leaving out pairs without an expert.

    Args:
        results: [T * TOP_K, H] in the model's dtype. weights, ids: [T, TOP_K], dense. y: [T, H].
        WEIGHT_ON_INPUT: the weights were applied before gate and up.
    """
    model = results.dtype.element_ty
    H_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    for item in range(tl.program_id(0), n_tokens * H_BLOCKS, tl.num_programs(0)):
        token = item // H_BLOCKS
        channel = (item % H_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for slot in range(0, TOP_K):
            pair = token * TOP_K + slot
            expert = tl.load(ids + pair)
            valid = (expert >= 0) & (expert < E)
            part = tl.load(results + pair.to(tl.int64) * H + channel, mask=(channel < H) & valid, other=0.0)
            part = part.to(tl.float32)
            if not WEIGHT_ON_INPUT:
                # A weight of NaN or inf on no expert still counts for nothing.
                part *= tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)
                if weights.dtype.element_ty == model:
                    part = part.to(model).to(tl.float32)
            total += part
        if weights.dtype.element_ty == model:
            total = total.to(model).to(tl.float32)
        tl.store(y + token.to(tl.int64) * H + channel, total.to(y.dtype.element_ty), mask=channel < H)
