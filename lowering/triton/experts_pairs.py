"""Fused experts for a few tokens: each (token, expert) pair reads its expert's rows, two launches in all.

``gate_up_pairs_kernel`` turns tokens into h [pairs, I]; ``down_rows_kernel`` turns h into y [T, H], the weighted sum
over a token's pairs included, and ``down_pairs_kernel`` does so for weights that it does not suit, and on Ascend. Such
calls are bound by reading weights, so products are plain fp32 multiply-adds: no tensor core, no padding to a tile of
tokens, and what a block holds is reduced once, after its last step along K.

On CUDA a block of gate and up should be BLOCK_K = 32 lanes * 16 bytes * num_warps wide: then weights and activations
have one layout, loads are 16 bytes a lane, and no shared memory or barrier comes between them. With PDL, the second
kernel reads its first weights while the first one ends.
"""

import triton
import triton.language as tl

from .activation import activate
from .dependent_launch import allow_dependents, wait_for_inputs


@triton.jit(do_not_specialize=["n_pairs"])
def gate_up_pairs_kernel(
    x,
    weights,
    ids,
    w_gate,
    w_up,
    b_gate,
    b_up,
    h,
    n_pairs,
    x_stride,
    alpha,
    limit,
    E: tl.constexpr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[pair, i] = activation(gate, up) of the pair's token and expert; rows of pairs without an expert stay unwritten.

    Args:
        x: [T, H], rows x_stride apart. weights, ids: [T, TOP_K], dense.
        w_gate, w_up: weights; expert e's element (n, k) lies at e * W_E + n * W_N + k * W_K (UP_* for w_up). Channel i
            of the gate is row GATE_AT + i * STEP, of the up projection UP_AT + i * STEP. b_gate, b_up: None, or biases
            with the same rows, experts B_E apart.
        h: [n_pairs, I] in the model's dtype.
        GATED: false leaves w_up unread. MERGED: gate and up alternate in memory (STEP 2) and are read as one block.
        PDL: launched while what made x, weights or ids may still run; the next kernel is launched so, too.
    """
    model = h.dtype.element_ty
    wait_for_inputs(PDL)
    allow_dependents(PDL)
    N_BLOCKS: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = 2 * BLOCK_N if MERGED else BLOCK_N
    for item in range(tl.program_id(0), n_pairs * N_BLOCKS, tl.num_programs(0)):
        pair = item // N_BLOCKS
        first = (item % N_BLOCKS) * BLOCK_N
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < E):
            k = tl.arange(0, BLOCK_K)[None, :]
            if MERGED:
                rows = 2 * first + tl.arange(0, ROWS)[:, None]
                row_mask = rows < 2 * INTER
            else:
                rows = first + tl.arange(0, ROWS)[:, None]
                row_mask = rows < INTER
                rows = GATE_AT + rows * STEP
            gate_at = w_gate + expert.to(tl.int64) * W_E + rows * W_N + k * W_K
            up_at = w_up + expert.to(tl.int64) * UP_E + (rows + (UP_AT - GATE_AT)) * UP_N + k * UP_K
            x_at = x + (pair // TOP_K).to(tl.int64) * x_stride + k
            if WEIGHT_ON_INPUT:
                weight = tl.load(weights + pair).to(tl.float32)
            gate_sum = tl.zeros([ROWS, BLOCK_K], dtype=tl.float32)
            up_sum = tl.zeros([ROWS, BLOCK_K], dtype=tl.float32)
            for start in range(0, H, BLOCK_K):
                k_mask = start + k < H
                row = tl.load(x_at + start, mask=k_mask, other=0.0).to(tl.float32)
                if WEIGHT_ON_INPUT:
                    row = (row * weight).to(model).to(tl.float32)
                mask = row_mask & k_mask
                gate_sum += row * tl.load(gate_at + start * W_K, mask=mask, other=0.0).to(tl.float32)
                if GATED and not MERGED:
                    up_sum += row * tl.load(up_at + start * UP_K, mask=mask, other=0.0).to(tl.float32)
            # Rounded to the model's dtype where the reference rounds: after the product, after the bias.
            gate = tl.sum(gate_sum, axis=1).to(model)
            up = tl.sum(up_sum, axis=1).to(model)
            channel = first + tl.arange(0, BLOCK_N)
            if MERGED:
                both = gate.to(tl.float32)
                if b_gate is not None:
                    merged = 2 * first + tl.arange(0, ROWS)
                    bias = tl.load(b_gate + expert.to(tl.int64) * B_E + merged, mask=merged < 2 * INTER, other=0.0)
                    both = (both + bias.to(tl.float32)).to(model).to(tl.float32)
                both = tl.reshape(both, [BLOCK_N, 2])
                is_up = tl.arange(0, 2)[None, :] == 1
                gate_value = tl.sum(tl.where(is_up, 0.0, both), axis=1)
                up_value = tl.sum(tl.where(is_up, both, 0.0), axis=1)
            else:
                gate_value, up_value = gate.to(tl.float32), up.to(tl.float32)
                if b_gate is not None:
                    at = b_gate + expert.to(tl.int64) * B_E + GATE_AT
                    bias = tl.load(at + channel * STEP, mask=channel < INTER, other=0.0)
                    gate_value = (gate_value + bias.to(tl.float32)).to(model).to(tl.float32)
                if GATED and b_up is not None:
                    at = b_up + expert.to(tl.int64) * B_E + UP_AT
                    bias = tl.load(at + channel * STEP, mask=channel < INTER, other=0.0)
                    up_value = (up_value + bias.to(tl.float32)).to(model).to(tl.float32)
            activated = activate(gate_value, up_value, ACT, GATED, alpha, limit, HAS_LIMIT)
            tl.store(h + pair.to(tl.int64) * INTER + channel, activated.to(model), mask=channel < INTER)


@triton.jit
def _share_of_sum(out, b2, channel, mask, share, MODEL: tl.constexpr):
    """A pair's part of its token's sum, rounded where the reference rounds: (out + bias) * share.

    Args:
        out: products with w2, fp32. b2: None, or biases, at ``channel``. share: the routing weight, or None.
    """
    out = out.to(MODEL).to(tl.float32)
    if b2 is not None:
        out += tl.load(b2 + channel, mask=mask, other=0.0).to(tl.float32)
        out = out.to(MODEL).to(tl.float32)
    if share is not None:
        out = out * share.to(tl.float32)
        if share.dtype == MODEL:
            out = out.to(MODEL).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["n_tokens"])
def down_pairs_kernel(
    h,
    weights,
    ids,
    w2,
    b2,
    y,
    n_tokens,
    E: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASCEND: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = sum over t's pairs of weight * (w2 of the pair's expert @ h[pair] + b2), BLOCK_S pairs at a time.

    Args:
        h: [T * TOP_K, I] in the model's dtype. weights, ids: [T, TOP_K], dense.
        w2: expert e's element (n, k) lies at e * W_E + n * W_N + k * W_K. b2: None or [E, H], dense.
        y: [T, H]; each pair's result is rounded to the model's dtype and, weighted, to the dtype that weights and model
            share, as the reference does; the sum is taken in fp32.
        WEIGHT_ON_INPUT: the weights were applied before gate and up.
        PDL: what made h is still running; it began after all that made the other operands had ended.
    """
    model = h.dtype.element_ty
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    for item in range(tl.program_id(0), n_tokens * N_BLOCKS, tl.num_programs(0)):
        token = item // N_BLOCKS
        channel = (item % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = channel[:, None, None]
        k = tl.arange(0, BLOCK_K)[None, None, :]
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for first in range(0, TOP_K, BLOCK_S):
            if ASCEND:
                # One pair at a time, as scalars: the vector unit has no 64-bit offsets.
                tl.static_assert(BLOCK_S == 1, "several pairs at a time need 64-bit vectors")
                pair = token * TOP_K + first
                expert = tl.load(ids + pair)
            else:
                slot = first + tl.arange(0, BLOCK_S)[None, :, None]
                pair = token * TOP_K + slot
                expert = tl.load(ids + pair, mask=slot < TOP_K, other=-1)
            valid = (expert >= 0) & (expert < E)
            expert = tl.where(valid, expert, 0).to(tl.int64)
            row = h + pair.to(tl.int64) * INTER
            matrix = w2 + expert * W_E + n * W_N
            sums = tl.zeros([BLOCK_N, BLOCK_S, BLOCK_K], dtype=tl.float32)
            for start in range(0, INTER, BLOCK_K):
                mask = (start + k < INTER) & valid
                part_of_w2 = tl.load(matrix + (start + k) * W_K, mask=(n < H) & mask, other=0.0)
                wait_for_inputs(PDL)
                part = tl.load(row + start + k, mask=mask, other=0.0).to(tl.float32)
                sums += part * part_of_w2.to(tl.float32)
            share = None
            if not WEIGHT_ON_INPUT:
                share = tl.load(weights + pair, mask=valid, other=0.0)
            out = _share_of_sum(tl.sum(sums, axis=2, keep_dims=True), b2, expert * H + n, (n < H) & valid, share, model)
            total += tl.sum(tl.sum(out, axis=2), axis=1)
        if weights.dtype.element_ty == model:
            total = total.to(model).to(tl.float32)
        tl.store(y + token.to(tl.int64) * H + channel, total.to(y.dtype.element_ty), mask=channel < H)


@triton.jit
def _part_of_row(row, k, start, mask, SIZE: tl.constexpr):
    """Elements ``start + k`` of rows of SIZE elements, zeros beyond them; ``row`` points at their elements ``k``."""
    return tl.load(row + start, mask=mask & (k < SIZE - start), other=0.0)


@triton.jit(do_not_specialize=["n_tokens"])
def down_rows_kernel(
    h,
    weights,
    ids,
    w2,
    b2,
    y,
    n_tokens,
    E: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """As ``down_pairs_kernel``, a program for ROWS channels of a token: it keeps h, and reads whole rows of w2.

    A program's life is a chain of waits (ids, rows, h, sums across warps), and reading goes on only as far as rows of
    programs in every state of it fit the registers at once: so the more rows to a chain, the better. Not for Ascend,
    whose Triton has no tuples, and whose vector unit has no 64-bit offsets.

    Args:
        w2: expert e's row n lies at e * W_E + n * W_N, its elements together. The rest: see ``down_pairs_kernel``.
        BLOCK_S: a power of two, at least TOP_K; BLOCK_K: 16 bytes of a row to each of 32 lanes.
        ROWS: a power of two. AHEAD: how many of them are read before the wait.
    """
    model = h.dtype.element_ty
    N_BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (INTER + BLOCK_K - 1) // BLOCK_K
    slot = tl.arange(0, BLOCK_S)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    nth = tl.arange(0, ROWS)[None, :]
    for item in range(tl.program_id(0), n_tokens * N_BLOCKS, tl.num_programs(0)):
        token = item // N_BLOCKS
        first = (item % N_BLOCKS) * ROWS
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair, mask=slot < TOP_K, other=-1)
        valid = (expert >= 0) & (expert < E)
        expert = tl.where(valid, expert, 0).to(tl.int64)
        share = None
        if not WEIGHT_ON_INPUT:
            share = tl.load(weights + pair, mask=valid, other=0.0)
        rows = w2 + expert * W_E + first * W_N + k
        ahead = ()
        for row in tl.static_range(AHEAD):
            for step in tl.static_range(STEPS):
                part = _part_of_row(rows + row * W_N, k, step * BLOCK_K, valid & (first + row < H), INTER)
                ahead += (part,)  # type: ignore[assignment]
        wait_for_inputs(PDL)
        inputs = ()
        for step in tl.static_range(STEPS):
            part = _part_of_row(h + pair.to(tl.int64) * INTER + k, k, step * BLOCK_K, valid, INTER)
            inputs += (part,)  # type: ignore[assignment]
        out = tl.zeros([BLOCK_S, ROWS], tl.float32)
        for row in tl.static_range(ROWS):
            sums = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
            for step in tl.static_range(STEPS):
                if row < AHEAD:
                    part = ahead[row * STEPS + step]
                else:
                    part = _part_of_row(rows + row * W_N, k, step * BLOCK_K, valid & (first + row < H), INTER)
                sums += inputs[step].to(tl.float32) * part.to(tl.float32)
            out = tl.where(nth == row, tl.sum(sums, axis=1, keep_dims=True), out)
        out = _share_of_sum(out, b2, expert * H + first + nth, valid & (first + nth < H), share, model)
        total = tl.sum(out, axis=0, keep_dims=True)
        if weights.dtype.element_ty == model:
            total = total.to(model).to(tl.float32)
        tl.store(y + token.to(tl.int64) * H + first + nth, total.to(y.dtype.element_ty), mask=first + nth < H)
