"""Fused experts on int4 weights (W4A16) for a few tokens: as ``experts_pairs``, with weights four bits wide until used.

A word of 32 bits holds eight neighbouring inputs of a channel, low nibble first. Activations are made ready in planes,
so that what meets one nibble of neighbouring words is itself neighbours in memory, in one of two forms (``planes``):

* FIXED (bf16 and fp16 on CUDA): 15-bit fixed-point numbers with a scale to every 32 inputs. A word takes four integer
  dot products of four bytes each, a third of the instructions that fp32 takes; sums of integers are exact.
* else (fp32, and Ascend): as they are, widened to fp32.

Products are summed over QUAD words and then scaled, so weights are not rounded to the model's dtype on the way. On CUDA
a step should be BLOCK_W = 32 lanes * 4 words wide for each warp along it, and QUAD those four words: a lane loads 16
bytes of a channel, and weights, sums and scales have one layout (scales of groups of 32 with zero points apart, which
pass through shared memory). All loads of a step come before its arithmetic, or a lane would wait several times.
"""

import triton
import triton.language as tl

from .activation import activate
from .dependent_launch import allow_dependents, wait_for_inputs

# The nibble that stands for zero where there are no zero points.
MIDDLE_NIBBLE = tl.constexpr(8.0)


@triton.jit
def nibble(word, SHIFT: tl.constexpr):
    """The nibble of each word that starts at bit SHIFT, as fp32."""
    return ((word >> SHIFT) & 15).to(tl.float32)


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr):
    """c + the sum of the products of the four bytes of a and b, all signed."""
    if ASM:
        sum = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    else:
        sum = c + (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
        sum += (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24)
    return sum


@triton.jit
def activations(x_at, scales_at, mask, quad_mask, WORDS: tl.constexpr, QUADS: tl.constexpr, QUAD: tl.constexpr):
    """What meets the words at ``x_at``: eight operands of ``quad_sums``, and by quads a scale and the activations' sum.

    Args:
        x_at: pointers into planes WORDS apart, of ``fixed_point_planes_kernel``; or of ``split_planes_kernel`` with
            eight planes, and scales_at None. scales_at: pointers to the quads' scales.
    """
    if scales_at is None:
        x0 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x_at + WORDS, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + 2 * WORDS, mask=mask, other=0.0).to(tl.float32)
        x3 = tl.load(x_at + 3 * WORDS, mask=mask, other=0.0).to(tl.float32)
        x4 = tl.load(x_at + 4 * WORDS, mask=mask, other=0.0).to(tl.float32)
        x5 = tl.load(x_at + 5 * WORDS, mask=mask, other=0.0).to(tl.float32)
        x6 = tl.load(x_at + 6 * WORDS, mask=mask, other=0.0).to(tl.float32)
        x7 = tl.load(x_at + 7 * WORDS, mask=mask, other=0.0).to(tl.float32)
        total = by_quads(((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7)), 1, QUADS, QUAD)
        scale = total  # Not used.
    else:
        x0 = tl.load(x_at, mask=mask, other=0)
        x1 = tl.load(x_at + WORDS, mask=mask, other=0)
        x2 = tl.load(x_at + 2 * WORDS, mask=mask, other=0)
        x3 = tl.load(x_at + 3 * WORDS, mask=mask, other=0)
        x4, x5, x6, x7 = x0, x1, x2, x3  # Not used.
        scale = tl.load(scales_at, mask=quad_mask, other=0.0)
        total = tl.load(scales_at + WORDS // QUAD, mask=quad_mask, other=0.0)
    return x0, x1, x2, x3, x4, x5, x6, x7, scale, total


@triton.jit
def quad_sums(
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    packed,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
    QUAD: tl.constexpr,
    FIXED: tl.constexpr,
    ASM: tl.constexpr,
):
    """nibble * activation summed over each quad of words, [ROWS, QUADS] fp32."""
    if FIXED:
        even = packed & 0x0F0F0F0F
        odd = (packed >> 4) & 0x0F0F0F0F
        high = dot4(odd, x1, dot4(even, x0, 0, ASM), ASM)
        # At most 32 * 15 * 16256 to a quad: exact in fp32.
        words = dot4(odd, x3, dot4(even, x2, high << 7, ASM), ASM)
    else:
        words = nibble(packed, 0) * x0 + nibble(packed, 4) * x1
        words += nibble(packed, 8) * x2 + nibble(packed, 12) * x3
        words += nibble(packed, 16) * x4 + nibble(packed, 20) * x5
        words += nibble(packed, 24) * x6 + nibble(packed, 28) * x7
    return by_quads(words, ROWS, QUADS, QUAD).to(tl.float32)


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
def scaled(sums, total, x_scale, scale, zero, MIDDLE: tl.constexpr, FIXED: tl.constexpr):
    """Sums of nibble * activation by quads, as (nibble - zero) * scale * activation.

    Args:
        total, x_scale: of ``activations``. MIDDLE: whether 8 is the zero point, whatever ``zero`` is.
    """
    sums -= (MIDDLE_NIBBLE if MIDDLE else zero.to(tl.float32)) * total
    sums *= scale.to(tl.float32)
    if FIXED:
        sums *= x_scale
    return sums


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
    x_scales,
    ids,
    w13,
    w13_scale,
    w13_zero,
    b13,
    h,
    n_pairs,
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
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[pair, i] = activation(gate, up) of the pair's token and expert; rows of pairs without an expert stay unwritten.

    Args:
        x_planes, x_scales: of ``fixed_point_planes_kernel``; or [T, 8, H / 8] of ``split_planes_kernel``, and None.
        w13: int32 words of eight inputs; expert e's word (n, k) lies at e * W_E + n * W_N + k, scales [E, rows, groups]
            and uint8 zero points (or None: 8) at S_* and Z_*. Channels of gate and up are rows as in
            ``gate_up_pairs_kernel``. b13: None, or biases [E, rows], B_E apart.
        h: [n_pairs, INTER] in the model's dtype, dense.
        GROUP: inputs with one scale. QUAD: words that are scaled together, a power of two that divides a group; 4 with
            x_scales. BLOCK_W: words at a time.
        ASM: use the GPU's instruction for dot products of four bytes.
        PDL: what made x_planes is still running; it began after all that made the other operands had ended. The next
            kernel is launched so, too.
    """
    model = h.dtype.element_ty
    allow_dependents(PDL)
    FIXED: tl.constexpr = x_scales is not None
    ROW: tl.constexpr = H // 2 if FIXED else H
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
            token = (pair // TOP_K).to(tl.int64)
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
                scales_at = None if x_scales is None else x_scales + token * (WORDS // 2) + quad
                x0, x1, x2, x3, x4, x5, x6, x7, x_scale, total = activations(
                    x_planes + token * ROW + word, scales_at, word < WORDS, quad < WORDS // QUAD, WORDS, QUADS, QUAD
                )
                sums = quad_sums(x0, x1, x2, x3, x4, x5, x6, x7, gate, BLOCK_N, QUADS, QUAD, FIXED, ASM)
                gate_sums += scaled(sums, total, x_scale, gate_scale, gate_zero, zero_at is None, FIXED)
                if GATED:
                    sums = quad_sums(x0, x1, x2, x3, x4, x5, x6, x7, up, BLOCK_N, QUADS, QUAD, FIXED, ASM)
                    up_sums += scaled(sums, total, x_scale, up_scale, up_zero, zero_at is None, FIXED)
            mask = channel < INTER
            gate_value = tl.sum(gate_sums, axis=1)
            gate_value = add_bias(gate_value, b13, expert, GATE_AT + channel * STEP, mask, B_E, model)
            up_value = tl.sum(up_sums, axis=1)
            up_value = add_bias(up_value, b13 if GATED else None, expert, UP_AT + channel * STEP, mask, B_E, model)
            activated = activate(gate_value, up_value, ACT, GATED, alpha, limit, HAS_LIMIT)
            tl.store(h + pair.to(tl.int64) * INTER + channel, activated.to(model), mask=mask)
    # For programs without an expert; see dependent_launch.
    wait_for_inputs(PDL)


@triton.jit(do_not_specialize=["n_tokens"])
def down_pairs_int4_kernel(
    h_planes,
    h_scales,
    weights,
    ids,
    w2,
    w2_scale,
    w2_zero,
    b2,
    y,
    n_tokens,
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
    MODEL: tl.constexpr,
    ASM: tl.constexpr,
    ASCEND: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = sum over t's pairs of weight * (w2 of the pair's expert @ h[pair] + b2).

    The words of a channel in all of a token's experts count as one row of TOP_K * INTER / 8 words, of which BLOCK_W
    are read at a time: so no lane is idle where INTER is no power of two. Routing weights are applied to quads; a
    pair's result is not rounded on its own.

    Args:
        h_planes, h_scales: the planes of h, as x_planes and x_scales of ``gate_up_pairs_int4_kernel``.
        w2, w2_scale, w2_zero, GROUP, QUAD, ASM: as there. b2: None or [E, H], dense.
        weights, ids, y, PDL: as in ``down_pairs_kernel``. MODEL: the model's dtype, "bf16", "fp16" or "fp32".
        ASCEND: BLOCK_W is at most the words of a pair, and a step stays within one: experts are scalars, since the
            vector unit has no 64-bit offsets.
    """
    model: tl.constexpr = tl.bfloat16 if MODEL == "bf16" else tl.float16 if MODEL == "fp16" else tl.float32
    FIXED: tl.constexpr = h_scales is not None
    ROW: tl.constexpr = INTER // 2 if FIXED else INTER
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
                weight_live = (expert >= 0) & (expert < E)
                live, quad_live = word < WORDS, quad < WORDS // QUAD
            else:
                row = start + tl.arange(0, BLOCK_W)[None, :]
                quad_row = start // QUAD + tl.arange(0, QUADS)[None, :]
                slot, quad_slot = row // WORDS, quad_row // (WORDS // QUAD)
                word, quad = row % WORDS, quad_row % (WORDS // QUAD)
                live, quad_live = row < ALL_WORDS, quad_row < ALL_WORDS // QUAD
                expert = tl.load(ids + token * TOP_K + slot, mask=live, other=-1)
                quad_expert = tl.load(ids + token * TOP_K + quad_slot, mask=quad_live, other=-1)
                weight_live = quad_live & (quad_expert >= 0) & (quad_expert < E)
            weight = tl.load(weights + token * TOP_K + quad_slot, mask=weight_live, other=0.0)
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
            x_at = h_planes + (token * TOP_K + slot).to(tl.int64) * ROW + word
            quad_pair = token * TOP_K + quad_slot
            scales_at = None if h_scales is None else h_scales + quad_pair.to(tl.int64) * (WORDS // 2) + quad
            x0, x1, x2, x3, x4, x5, x6, x7, x_scale, total = activations(
                x_at, scales_at, live, quad_live, WORDS, QUADS, QUAD
            )
            part = quad_sums(x0, x1, x2, x3, x4, x5, x6, x7, packed, BLOCK_N, QUADS, QUAD, FIXED, ASM)
            part = scaled(part, total, x_scale, scale, zero, w2_zero is None, FIXED)
            sums += part * weight.to(tl.float32)
        result = tl.sum(sums, axis=1)
        if b2 is not None:
            for slot in range(TOP_K):
                expert = tl.load(ids + token * TOP_K + slot)
                if (expert >= 0) & (expert < E):
                    weight = tl.load(weights + token * TOP_K + slot).to(tl.float32)
                    bias = tl.load(b2 + expert.to(tl.int64) * H + channel, mask=channel < H, other=0.0)
                    result += weight * bias.to(tl.float32)
        if weights.dtype.element_ty == model:
            result = result.to(model).to(tl.float32)
        tl.store(y + token.to(tl.int64) * H + channel, result.to(y.dtype.element_ty), mask=channel < H)
