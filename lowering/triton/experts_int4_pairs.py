"""Fused experts on int4 weights (W4A16) for a few tokens: as ``experts_pairs``, with weights four bits wide until used.

A word of 32 bits holds eight neighbouring inputs of a channel, low nibble first. Activations lie in eight planes (see
``planes``), so that each nibble of neighbouring words meets activations that are neighbours, too. Products are fp32
sums, scaled QUAD words at a time, so weights are not rounded to the model's dtype on the way.

On CUDA a step should be BLOCK_W = 32 lanes * 4 words wide, and QUAD those four words: a lane loads 16 bytes of a
channel, and weights, sums and scales have one layout, without shared memory between them. All loads of a step come
before its arithmetic, or a lane would wait for memory several times.
"""

import triton
import triton.language as tl

from .activation import activate
from .dependent_launch import allow_dependents, wait_for_inputs

# The nibble that stands for zero where there are no zero points.
_MIDDLE = tl.constexpr(8.0)
# 2**23, the fp32 number whose last bit counts ones: with a nibble put there it is 2**23 + nibble.
_BIAS = tl.constexpr(8388608.0)


@triton.jit
def nibble(word, SHIFT: tl.constexpr, bias_bits, ASCEND: tl.constexpr):
    """The nibble of each word that starts at bit SHIFT (0 to 16), minus 8, as fp32."""
    if ASCEND:
        value = ((word >> SHIFT) & 15).to(tl.float32) - _MIDDLE
    else:
        # 2**23 + nibble * 2**SHIFT, brought to nibble - 8 in one multiply-add without rounding: conversion from
        # integers runs at a quarter of the speed.
        high = (word & (15 << SHIFT) | bias_bits).to(tl.float32, bitcast=True)
        value = high * (1.0 / (1 << SHIFT)) - (_MIDDLE + _BIAS / (1 << SHIFT))
    return value


@triton.jit
def eight_planes(at, mask, PLANE: tl.constexpr):
    """The activations at ``at`` and at the same place of the seven planes that follow, PLANE elements apart."""
    x0 = tl.load(at, mask=mask, other=0.0)
    x1 = tl.load(at + PLANE, mask=mask, other=0.0)
    x2 = tl.load(at + 2 * PLANE, mask=mask, other=0.0)
    x3 = tl.load(at + 3 * PLANE, mask=mask, other=0.0)
    x4 = tl.load(at + 4 * PLANE, mask=mask, other=0.0)
    x5 = tl.load(at + 5 * PLANE, mask=mask, other=0.0)
    x6 = tl.load(at + 6 * PLANE, mask=mask, other=0.0)
    x7 = tl.load(at + 7 * PLANE, mask=mask, other=0.0)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def products(x0, x1, x2, x3, x4, x5, x6, x7, packed, bias_bits, ASCEND: tl.constexpr):
    """(weight - 8) * activation, summed over the eight inputs of each word."""
    if not ASCEND:
        packed = packed.to(tl.uint32, bitcast=True)
    total = nibble(packed, 0, bias_bits, ASCEND) * x0.to(tl.float32)
    total += nibble(packed, 4, bias_bits, ASCEND) * x1.to(tl.float32)
    total += nibble(packed, 8, bias_bits, ASCEND) * x2.to(tl.float32)
    total += nibble(packed, 12, bias_bits, ASCEND) * x3.to(tl.float32)
    total += nibble(packed, 16, bias_bits, ASCEND) * x4.to(tl.float32)
    packed = packed >> 12
    total += nibble(packed, 8, bias_bits, ASCEND) * x5.to(tl.float32)
    total += nibble(packed, 12, bias_bits, ASCEND) * x6.to(tl.float32)
    total += nibble(packed, 16, bias_bits, ASCEND) * x7.to(tl.float32)
    return total


@triton.jit
def sum_of_planes(x0, x1, x2, x3, x4, x5, x6, x7):
    """The eight activations of each word added up, fp32."""
    first = (x0.to(tl.float32) + x1.to(tl.float32)) + (x2.to(tl.float32) + x3.to(tl.float32))
    return first + ((x4.to(tl.float32) + x5.to(tl.float32)) + (x6.to(tl.float32) + x7.to(tl.float32)))


@triton.jit
def by_quads(words, ROWS: tl.constexpr, QUADS: tl.constexpr, QUAD: tl.constexpr):
    """[ROWS, QUADS * QUAD] summed over each quad."""
    return tl.sum(tl.reshape(words, [ROWS, QUADS, QUAD]), axis=2)


@triton.jit
def scale_and_zero(scale_at, zero_at, zero_row, group, mask, S_K: tl.constexpr, Z_K: tl.constexpr):
    """Scales of groups, and their zero points; the scales again where ``zero_at`` is None."""
    scale = tl.load(scale_at + group * S_K, mask=mask, other=0.0)
    zero = scale
    if zero_at is not None:
        zero = tl.load(zero_at + zero_row + group * Z_K, mask=mask, other=0)
    return scale, zero


@triton.jit
def scaled(sums, x_sums, scale, zero, MIDDLE: tl.constexpr):
    """sums of (weight - 8) * activation by quads, as (weight - zero) * scale * activation.

    Args:
        x_sums: the activations of each quad added up. MIDDLE: whether 8 is the zero point, whatever ``zero`` is.
    """
    if not MIDDLE:
        sums -= (zero.to(tl.float32) - _MIDDLE) * x_sums
    return sums * scale.to(tl.float32)


@triton.jit
def add_bias(value, bias, expert, row, mask, B_E: tl.constexpr, model: tl.constexpr):
    """fp32 values rounded to the model's dtype, plus a bias, rounded again."""
    value = value.to(model).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + expert.to(tl.int64) * B_E + row, mask=mask, other=0.0).to(tl.float32)
        value = value.to(model).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["n_pairs"])
def gate_up_pairs_int4_kernel(
    x_planes,
    ids,
    w13,
    w13_scale,
    w13_zero,
    b13,
    h_planes,
    n_pairs,
    bias_bits,
    alpha,
    limit,
    E: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    S_E: tl.constexpr,
    S_N: tl.constexpr,
    S_K: tl.constexpr,
    Z_E: tl.constexpr,
    Z_N: tl.constexpr,
    Z_K: tl.constexpr,
    B_E: tl.constexpr,
    GATE_AT: tl.constexpr,
    UP_AT: tl.constexpr,
    STEP: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    QUAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ASCEND: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[pair, i] = activation(gate, up) of the pair's token and expert; rows of pairs without an expert stay unwritten.

    Args:
        x_planes: [T, 8, H / 8], dense: input i of a token lies in plane i % 8 at i // 8.
        w13: int32 words of eight inputs; expert e's word (n, k) lies at e * W_E + n * W_N + k, scales [E, rows, groups]
            and uint8 zero points (or None: 8) at S_* and Z_*. bias_bits: the bits of 2**23, see ``nibble``.
            Channels of gate and up are rows as in ``gate_up_pairs_kernel``. b13: None, or biases [E, rows], B_E apart.
        h_planes: [n_pairs, 8, INTER / 8] in the model's dtype, as x_planes.
        GROUP: inputs with one scale. QUAD: words that are scaled together, a power of two that divides a group.
        BLOCK_W: words at a time.
        PDL: what made x_planes is still running; it began after all that made the other operands had ended. The next
            kernel is launched so, too.
    """
    model = h_planes.dtype.element_ty
    allow_dependents(PDL)
    WORDS: tl.constexpr = H // 8
    QUADS: tl.constexpr = BLOCK_W // QUAD
    N_BLOCKS: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    for item in range(tl.program_id(0), n_pairs * N_BLOCKS, tl.num_programs(0)):
        pair = item // N_BLOCKS
        first = (item % N_BLOCKS) * BLOCK_N
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < E):
            channel = first + tl.arange(0, BLOCK_N)
            rows = channel[:, None]
            gate_row = GATE_AT + rows * STEP
            up_row = UP_AT + rows * STEP
            w = w13 + expert.to(tl.int64) * W_E
            scale_at = w13_scale + expert.to(tl.int64) * S_E
            zero_at = None if w13_zero is None else w13_zero + expert.to(tl.int64) * Z_E
            x_at = x_planes + (pair // TOP_K).to(tl.int64) * H
            gate_sums = tl.zeros([BLOCK_N, QUADS], dtype=tl.float32)
            up_sums = tl.zeros([BLOCK_N, QUADS], dtype=tl.float32)
            for start in range(0, WORDS, BLOCK_W):
                word = start + tl.arange(0, BLOCK_W)[None, :]
                quad = start // QUAD + tl.arange(0, QUADS)[None, :]
                group = quad if QUAD * 8 == GROUP else quad // (GROUP // (QUAD * 8))
                mask = (rows < INTER) & (word < WORDS)
                quad_mask = (rows < INTER) & (quad < WORDS // QUAD)
                gate = tl.load(w + gate_row * W_N + word, mask=mask, other=0)
                gate_scale, gate_zero = scale_and_zero(
                    scale_at + gate_row * S_N, zero_at, gate_row * Z_N, group, quad_mask, S_K, Z_K
                )
                if GATED:
                    up = tl.load(w + up_row * W_N + word, mask=mask, other=0)
                    up_scale, up_zero = scale_and_zero(
                        scale_at + up_row * S_N, zero_at, up_row * Z_N, group, quad_mask, S_K, Z_K
                    )
                wait_for_inputs(PDL)
                x0, x1, x2, x3, x4, x5, x6, x7 = eight_planes(x_at + word, word < WORDS, WORDS)
                x_sums = by_quads(sum_of_planes(x0, x1, x2, x3, x4, x5, x6, x7), 1, QUADS, QUAD)
                sums = products(x0, x1, x2, x3, x4, x5, x6, x7, gate, bias_bits, ASCEND)
                sums = by_quads(sums, BLOCK_N, QUADS, QUAD)
                gate_sums += scaled(sums, x_sums, gate_scale, gate_zero, zero_at is None)
                if GATED:
                    sums = products(x0, x1, x2, x3, x4, x5, x6, x7, up, bias_bits, ASCEND)
                    sums = by_quads(sums, BLOCK_N, QUADS, QUAD)
                    up_sums += scaled(sums, x_sums, up_scale, up_zero, zero_at is None)
            mask = channel < INTER
            gate_value = tl.sum(gate_sums, axis=1)
            gate_value = add_bias(gate_value, b13, expert, GATE_AT + channel * STEP, mask, B_E, model)
            up_value = tl.sum(up_sums, axis=1)
            up_value = add_bias(up_value, b13 if GATED else None, expert, UP_AT + channel * STEP, mask, B_E, model)
            activated = activate(gate_value, up_value, ACT, GATED, alpha, limit, HAS_LIMIT)
            h_at = h_planes + pair.to(tl.int64) * INTER + (channel % 8) * (INTER // 8) + channel // 8
            tl.store(h_at, activated.to(model), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def down_pairs_int4_kernel(
    h_planes,
    weights,
    ids,
    w2,
    w2_scale,
    w2_zero,
    b2,
    y,
    n_tokens,
    bias_bits,
    E: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    S_E: tl.constexpr,
    S_N: tl.constexpr,
    S_K: tl.constexpr,
    Z_E: tl.constexpr,
    Z_N: tl.constexpr,
    Z_K: tl.constexpr,
    GROUP: tl.constexpr,
    QUAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ASCEND: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = sum over t's pairs of weight * (w2 of the pair's expert @ h[pair] + b2).

    The words of a channel in all of a token's experts count as one row of TOP_K * INTER / 8 words, of which BLOCK_W
    are read at a time: so no lane is idle where INTER is no power of two. Routing weights are applied to quads; a
    pair's result is not rounded on its own.

    Args:
        h_planes: of ``gate_up_pairs_int4_kernel``.
        w2, w2_scale, w2_zero, GROUP, QUAD: as there. b2: None or [E, H], dense.
        weights, ids, y, PDL: as in ``down_pairs_kernel``.
        ASCEND: BLOCK_W is at most the words of a pair, and a step stays within one: experts are scalars, since the
            vector unit has no 64-bit offsets.
    """
    model = h_planes.dtype.element_ty
    WORDS: tl.constexpr = INTER // 8
    QUADS: tl.constexpr = BLOCK_W // QUAD
    STEPS: tl.constexpr = (WORDS + BLOCK_W - 1) // BLOCK_W if ASCEND else 1
    ALL_WORDS: tl.constexpr = TOP_K * STEPS * BLOCK_W if ASCEND else TOP_K * WORDS
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    for item in range(tl.program_id(0), n_tokens * N_BLOCKS, tl.num_programs(0)):
        token = item // N_BLOCKS
        channel = (item % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = channel[:, None]
        sums = tl.zeros([BLOCK_N, QUADS], dtype=tl.float32)
        for start in range(0, ALL_WORDS, BLOCK_W):
            if ASCEND:
                slot = start // (STEPS * BLOCK_W)
                quad_slot = slot
                word = start % (STEPS * BLOCK_W) + tl.arange(0, BLOCK_W)[None, :]
                quad = start % (STEPS * BLOCK_W) // QUAD + tl.arange(0, QUADS)[None, :]
                expert = tl.load(ids + token * TOP_K + slot)
                quad_expert = expert
                weight = tl.load(weights + token * TOP_K + slot)
                live, quad_live = word < WORDS, quad < WORDS // QUAD
            else:
                row = start + tl.arange(0, BLOCK_W)[None, :]
                quad_row = start // QUAD + tl.arange(0, QUADS)[None, :]
                slot, quad_slot = row // WORDS, quad_row // (WORDS // QUAD)
                word, quad = row % WORDS, quad_row % (WORDS // QUAD)
                live, quad_live = row < ALL_WORDS, quad_row < ALL_WORDS // QUAD
                expert = tl.load(ids + token * TOP_K + slot, mask=live, other=-1)
                quad_expert = tl.load(ids + token * TOP_K + quad_slot, mask=quad_live, other=-1)
                weight = tl.load(weights + token * TOP_K + quad_slot, mask=quad_live, other=0.0)
            live = live & (expert >= 0) & (expert < E)
            quad_live = quad_live & (quad_expert >= 0) & (quad_expert < E)
            expert = tl.where((expert >= 0) & (expert < E), expert, 0).to(tl.int64)
            quad_expert = tl.where((quad_expert >= 0) & (quad_expert < E), quad_expert, 0).to(tl.int64)
            group = quad if QUAD * 8 == GROUP else quad // (GROUP // (QUAD * 8))
            packed = tl.load(w2 + expert * W_E + n * W_N + word, mask=(n < H) & live, other=0)
            zero_at = None if w2_zero is None else w2_zero + quad_expert * Z_E
            scale, zero = scale_and_zero(
                w2_scale + quad_expert * S_E + n * S_N, zero_at, n * Z_N, group, (n < H) & quad_live, S_K, Z_K
            )
            wait_for_inputs(PDL)
            x_at = h_planes + (token * TOP_K + slot).to(tl.int64) * INTER + word
            x0, x1, x2, x3, x4, x5, x6, x7 = eight_planes(x_at, live, WORDS)
            x_sums = by_quads(sum_of_planes(x0, x1, x2, x3, x4, x5, x6, x7), 1, QUADS, QUAD)
            part = by_quads(products(x0, x1, x2, x3, x4, x5, x6, x7, packed, bias_bits, ASCEND), BLOCK_N, QUADS, QUAD)
            sums += scaled(part, x_sums, scale, zero, w2_zero is None) * weight.to(tl.float32)
        total = tl.sum(sums, axis=1)
        if b2 is not None:
            for slot in range(TOP_K):
                expert = tl.load(ids + token * TOP_K + slot)
                if (expert >= 0) & (expert < E):
                    weight = tl.load(weights + token * TOP_K + slot).to(tl.float32)
                    bias = tl.load(b2 + expert.to(tl.int64) * H + channel, mask=channel < H, other=0.0)
                    total += weight * bias.to(tl.float32)
        if weights.dtype.element_ty == model:
            total = total.to(model).to(tl.float32)
        tl.store(y + token.to(tl.int64) * H + channel, total.to(y.dtype.element_ty), mask=channel < H)
