"""Fused experts on int4 weights (W4A16): weights stay four bits wide until they are in registers.

A byte holds two neighbouring inputs, the even one in its low nibble. Nothing is interleaved to match: low nibbles meet
the even activations, high nibbles the odd ones. Weights are walked in chunks of CHUNK inputs, none of which crosses a
group of inputs with one scale.

* pairs: as ``experts_pairs``. Activations are read as words of two, whose halves are the even and the odd one. Sums are
  fp32 and a chunk's products are scaled together, so weights are not rounded to the model's dtype on the way.
* tiles: as ``experts_grouped``, with the weights, rounded to the model's dtype like the reference's, as the left
  operand of the product, which a tensor core takes from registers. Activations lie in planes: a row's even ones first.
"""

import triton
import triton.language as tl

from .activation import activate
from .experts_grouped import tile_and_block

# The nibble that stands for zero where there are no zero points.
_MIDDLE = tl.constexpr(8.0)
# The bits of the fp32 number 2**23, whose last bit counts ones: with a nibble put there it is 2**23 + nibble.
_BIAS_BITS = tl.constexpr(0x4B000000)
_BIAS = tl.constexpr(8388608.0)


@triton.jit
def nibbles(packed, zero, ASCEND: tl.constexpr):
    """Low and high nibbles of bytes, minus the zero point, as fp32."""
    if ASCEND:
        low = (packed & 15).to(tl.float32) - zero
        high = (packed >> 4).to(tl.float32) - zero
    else:
        # Conversion from integers runs at a quarter of the speed of an addition.
        low = ((packed & 15).to(tl.int32) | _BIAS_BITS).to(tl.float32, bitcast=True) - (zero + _BIAS)
        high = ((packed >> 4).to(tl.int32) | _BIAS_BITS).to(tl.float32, bitcast=True) - (zero + _BIAS)
    return low, high


@triton.jit
def halves(words, model: tl.constexpr):
    """The two activations in each word, first the one at the lower address, as fp32."""
    if model == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    elif model == tl.float16:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.int32).to(tl.float32, bitcast=True)
        high = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def scale_and_zero(scale_at, zero_at, group, mask, S_K: tl.constexpr, Z_K: tl.constexpr):
    """Scales of groups and their zero points, as fp32."""
    scale = tl.load(scale_at + group * S_K, mask=mask, other=0.0).to(tl.float32)
    zero = _MIDDLE if zero_at is None else tl.load(zero_at + group * Z_K, mask=mask, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def four_words(at, mask, ASCEND: tl.constexpr):
    """For each of ``at`` [...] the four words from there on, as four tensors; zeros where ``mask`` is false."""
    if ASCEND:
        first = tl.load(at, mask=mask, other=0)
        second = tl.load(at + 1, mask=mask, other=0)
        third = tl.load(at + 2, mask=mask, other=0)
        fourth = tl.load(at + 3, mask=mask, other=0)
    else:
        # One load of 16 bytes, taken apart in registers.
        at = tl.expand_dims(tl.expand_dims(at, -1), -1)
        pairs = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
        mask = tl.expand_dims(tl.expand_dims(mask, -1), -1)
        even, odd = tl.split(tl.load(at + pairs, mask=mask, other=0))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def nibble(word, SHIFT: tl.constexpr, zero, bias_bits, ASCEND: tl.constexpr):
    """The nibble of each word that starts at bit SHIFT (0, 4, 8 or 12), minus the zero point, as fp32."""
    if ASCEND:
        value = ((word >> SHIFT) & 15).to(tl.float32) - zero
    else:
        # 2**23 + nibble * 2**SHIFT, brought to nibble - zero in one multiply-add without rounding.
        high = (word & (15 << SHIFT) | bias_bits).to(tl.float32, bitcast=True)
        value = high * (1.0 / (1 << SHIFT)) - (zero + _BIAS / (1 << SHIFT))
    return value


@triton.jit
def products(
    x0,
    x1,
    x2,
    x3,
    w_at,
    scale_at,
    zero_at,
    chunk,
    word,
    mask,
    bias_bits,
    model: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    S_K: tl.constexpr,
    Z_K: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """weight * activation, summed over the eight inputs of each word; SHARE chunks have one scale."""
    packed = tl.load(w_at + chunk * (CHUNK // 8) + word, mask=mask, other=0)
    scale, zero = scale_and_zero(scale_at, zero_at, chunk // SHARE, mask, S_K, Z_K)
    if not ASCEND:
        packed = packed.to(tl.uint32, bitcast=True)
    low, high = halves(x0, model)
    total = nibble(packed, 0, zero, bias_bits, ASCEND) * low
    total += nibble(packed, 4, zero, bias_bits, ASCEND) * high
    low, high = halves(x1, model)
    total += nibble(packed, 8, zero, bias_bits, ASCEND) * low
    total += nibble(packed, 12, zero, bias_bits, ASCEND) * high
    packed = packed >> 16
    low, high = halves(x2, model)
    total += nibble(packed, 0, zero, bias_bits, ASCEND) * low
    total += nibble(packed, 4, zero, bias_bits, ASCEND) * high
    low, high = halves(x3, model)
    total += nibble(packed, 8, zero, bias_bits, ASCEND) * low
    total += nibble(packed, 12, zero, bias_bits, ASCEND) * high
    return total * scale


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
    x_words,
    ids,
    w13,
    w13_scale,
    w13_zero,
    b13,
    h,
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
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """h[pair, i] = activation(gate, up) of the pair's token and expert; rows of pairs without an expert stay unwritten.

    Args:
        x_words: [T, H / 2] words of two activations, dense: int32 for bf16 and fp16, int64 for fp32.
        w13: int32 words of eight inputs; expert e's word (n, k) lies at e * W_E + n * W_N + k, scales [E, rows, groups]
            and uint8 zero points (or None: 8) at S_* and Z_*. bias_bits: the bits of 2**23, see ``nibble``.
            Channels of gate and up are rows as in ``gate_up_pairs_kernel``. b13: None, or biases [E, rows], B_E apart.
        h: [n_pairs, INTER] in the model's dtype.
        CHUNK: inputs that are scaled together; SHARE chunks have one scale. BLOCK_C chunks are read at a time.
    """
    model: tl.constexpr = h.dtype.element_ty
    CHUNKS: tl.constexpr = H // CHUNK
    N_BLOCKS: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    for item in range(tl.program_id(0), n_pairs * N_BLOCKS, tl.num_programs(0)):
        pair = item // N_BLOCKS
        first = (item % N_BLOCKS) * BLOCK_N
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < E):
            word = tl.arange(0, CHUNK // 8)[None, None, :]
            channel = first + tl.arange(0, BLOCK_N)[:, None, None]
            gate_row = GATE_AT + channel * STEP
            up_row = UP_AT + channel * STEP
            w = w13 + expert.to(tl.int64) * W_E
            scale = w13_scale + expert.to(tl.int64) * S_E
            x_at = x_words + (pair // TOP_K).to(tl.int64) * (H // 2)
            gate_zero = None if w13_zero is None else w13_zero + expert.to(tl.int64) * Z_E + gate_row * Z_N
            up_zero = None if w13_zero is None else w13_zero + expert.to(tl.int64) * Z_E + up_row * Z_N
            gate_sum = tl.zeros([BLOCK_N, BLOCK_C, CHUNK // 8], dtype=tl.float32)
            up_sum = tl.zeros([BLOCK_N, BLOCK_C, CHUNK // 8], dtype=tl.float32)
            for start in range(0, CHUNKS, BLOCK_C):
                chunk = start + tl.arange(0, BLOCK_C)[None, :, None]
                row_at = x_at + chunk * (CHUNK // 2) + 4 * word
                x0, x1, x2, x3 = four_words(row_at, (chunk < CHUNKS) & (word >= 0), ASCEND)
                mask = (channel < INTER) & (chunk < CHUNKS)
                gate_sum += products(
                    x0, x1, x2, x3, w + gate_row * W_N, scale + gate_row * S_N, gate_zero, chunk, word, mask, bias_bits,
                    model, CHUNK, SHARE, S_K, Z_K, ASCEND,
                )  # fmt: skip
                if GATED:
                    up_sum += products(
                        x0, x1, x2, x3, w + up_row * W_N, scale + up_row * S_N, up_zero, chunk, word, mask, bias_bits,
                        model, CHUNK, SHARE, S_K, Z_K, ASCEND,
                    )  # fmt: skip
            channel = first + tl.arange(0, BLOCK_N)
            mask = channel < INTER
            gate = tl.sum(tl.sum(gate_sum, axis=2), axis=1)
            gate = add_bias(gate, b13, expert, GATE_AT + channel * STEP, mask, B_E, model)
            up = tl.sum(tl.sum(up_sum, axis=2), axis=1)
            up = add_bias(up, b13 if GATED else None, expert, UP_AT + channel * STEP, mask, B_E, model)
            activated = activate(gate, up, ACT, GATED, alpha, limit, HAS_LIMIT)
            tl.store(h + pair.to(tl.int64) * INTER + channel, activated.to(model), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def down_pairs_int4_kernel(
    h_words,
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
    MODEL: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """y[t] = sum over t's pairs of weight * (w2 of the pair's expert @ h[pair] + b2), BLOCK_S pairs at a time.

    Args:
        h_words: [T * TOP_K, INTER / 2] words of two activations of dtype MODEL ("bf16", "fp16" or "fp32").
        w2, w2_scale, w2_zero: as in ``gate_up_pairs_int4_kernel``. b2: None or [E, H], dense.
        weights, ids, y: as in ``down_pairs_kernel``.
    """
    model: tl.constexpr = tl.bfloat16 if MODEL == "bf16" else tl.float16 if MODEL == "fp16" else tl.float32
    CHUNKS: tl.constexpr = INTER // CHUNK
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    for item in range(tl.program_id(0), n_tokens * N_BLOCKS, tl.num_programs(0)):
        token = item // N_BLOCKS
        first = (item % N_BLOCKS) * BLOCK_N
        word = tl.arange(0, CHUNK // 8)[None, None, None, :]
        n = first + tl.arange(0, BLOCK_N)[None, :, None, None]
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for slot in range(0, TOP_K, BLOCK_S):
            if ASCEND:
                # One pair at a time, as scalars: the vector unit has no 64-bit offsets.
                tl.static_assert(BLOCK_S == 1, "several pairs at a time need 64-bit vectors")
                pair = token * TOP_K + slot
                expert = tl.load(ids + pair)
            else:
                slots = slot + tl.arange(0, BLOCK_S)[:, None, None, None]
                pair = token * TOP_K + slots
                expert = tl.load(ids + pair, mask=slots < TOP_K, other=-1)
            valid = (expert >= 0) & (expert < E)
            expert = tl.where(valid, expert, 0).to(tl.int64)
            row = h_words + pair.to(tl.int64) * (INTER // 2)
            w_at = w2 + expert * W_E + n * W_N
            scale_at = w2_scale + expert * S_E + n * S_N
            zero_at = None if w2_zero is None else w2_zero + expert * Z_E + n * Z_N
            sums = tl.zeros([BLOCK_S, BLOCK_N, BLOCK_C, CHUNK // 8], dtype=tl.float32)
            for start in range(0, CHUNKS, BLOCK_C):
                chunk = start + tl.arange(0, BLOCK_C)[None, None, :, None]
                mask = (chunk < CHUNKS) & valid
                row_at = row + chunk * (CHUNK // 2) + 4 * word
                x0, x1, x2, x3 = four_words(row_at, mask & (word >= 0), ASCEND)
                sums += products(
                    x0, x1, x2, x3, w_at, scale_at, zero_at, chunk, word, mask & (n < H), bias_bits,
                    model, CHUNK, SHARE, S_K, Z_K, ASCEND,
                )  # fmt: skip
            out = tl.sum(tl.sum(sums, axis=3, keep_dims=True), axis=2, keep_dims=True)
            out = add_bias(out, b2, expert, n, (n < H) & valid, H, model)
            out = out * tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)
            if weights.dtype.element_ty == model:
                out = out.to(model).to(tl.float32)
            total += tl.sum(tl.sum(tl.sum(out, axis=3), axis=2), axis=0)
        if weights.dtype.element_ty == model:
            total = total.to(model).to(tl.float32)
        channel = first + tl.arange(0, BLOCK_N)
        tl.store(y + token.to(tl.int64) * H + channel, total.to(y.dtype.element_ty), mask=channel < H)


@triton.jit(do_not_specialize=["n_rows"])
def split_planes_kernel(x, planes, n_rows, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """planes[row] = the row's even elements, then its odd ones. x: [n_rows, K], x_stride apart. planes: dense."""
    BLOCKS: tl.constexpr = (K // 2 + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), n_rows * BLOCKS, tl.num_programs(0)):
        row = item // BLOCKS
        pair = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        mask = pair < K // 2
        for parity in tl.static_range(2):
            values = tl.load(x + row.to(tl.int64) * x_stride + 2 * pair + parity, mask=mask, other=0.0)
            tl.store(planes + row.to(tl.int64) * K + parity * (K // 2) + pair, values, mask=mask)


@triton.jit
def add_tile_products(
    sums,
    even,
    odd,
    w_at,
    scale_at,
    zero_at,
    chunk,
    mask,
    HALF: tl.constexpr,
    SHARE: tl.constexpr,
    S_K: tl.constexpr,
    Z_K: tl.constexpr,
):
    """sums [n, m] plus the products of one chunk's weights with its even and odd activations [CHUNK / 2, m]."""
    model: tl.constexpr = even.dtype
    packed = tl.load(w_at + chunk * HALF, mask=mask, other=0)
    scale, zero = scale_and_zero(scale_at, zero_at, chunk // SHARE, mask, S_K, Z_K)
    low, high = nibbles(packed, zero, False)
    sums = tl.dot((low * scale).to(model), even, acc=sums, input_precision="ieee")
    return tl.dot((high * scale).to(model), odd, acc=sums, input_precision="ieee")


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_tiles_int4_kernel(
    x_planes,
    order,
    tiles,
    w13,
    w13_scale,
    w13_zero,
    b13,
    h_planes,
    max_tiles,
    alpha,
    limit,
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
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """h of every row of ``order``, in planes; other arguments as in ``gate_up_pairs_int4_kernel``.

    Args:
        w13: bytes of two inputs, laid out with W_E and W_N, too.
        x_planes: [T, H] in the model's dtype, each row's even elements first. h_planes: the same, [n_pairs, INTER].
        order, tiles, max_tiles: of ``place_pairs_kernel``, with the same BLOCK_M.
    """
    model = h_planes.dtype.element_ty
    HALF: tl.constexpr = CHUNK // 2
    N_BLOCKS: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.load(tiles)
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_and_block(item, n_tiles, N_BLOCKS, GROUP)
        expert = tl.load(tiles + 1 + tile).to(tl.int64)
        rows = tl.load(tiles + 1 + max_tiles + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tiles + 1 + 2 * max_tiles + tile)
        pairs = tl.load(order + rows, mask=live, other=0)
        channel = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        mask = channel < INTER
        gate_row = GATE_AT + channel * STEP
        up_row = UP_AT + channel * STEP
        byte = tl.arange(0, HALF)
        x_at = x_planes + (pairs // TOP_K).to(tl.int64)[None, :] * H + byte[:, None]
        gate_at = w13 + expert * W_E + gate_row * W_N + byte[None, :]
        up_at = w13 + expert * W_E + up_row * W_N + byte[None, :]
        scale_at = w13_scale + expert * S_E
        gate_zero = None if w13_zero is None else w13_zero + expert * Z_E + gate_row * Z_N
        up_zero = None if w13_zero is None else w13_zero + expert * Z_E + up_row * Z_N
        gate_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        up_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for chunk in range(0, H // CHUNK):
            even = tl.load(x_at + chunk * HALF, mask=live[None, :], other=0.0)
            odd = tl.load(x_at + (H // 2 + chunk * HALF), mask=live[None, :], other=0.0)
            gate_sum = add_tile_products(
                gate_sum, even, odd, gate_at, scale_at + gate_row * S_N, gate_zero, chunk, mask, HALF, SHARE, S_K, Z_K
            )
            if GATED:
                up_sum = add_tile_products(
                    up_sum, even, odd, up_at, scale_at + up_row * S_N, up_zero, chunk, mask, HALF, SHARE, S_K, Z_K
                )
        gate = add_bias(gate_sum, b13, expert, gate_row, mask, B_E, model)
        up = add_bias(up_sum, b13 if GATED else None, expert, up_row, mask, B_E, model)
        activated = activate(gate, up, ACT, GATED, alpha, limit, HAS_LIMIT)
        h_at = h_planes + rows.to(tl.int64)[None, :] * INTER + (channel % 2) * (INTER // 2) + channel // 2
        tl.store(h_at, activated.to(model), mask=mask & live[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def down_tiles_int4_kernel(
    h_planes,
    order,
    tiles,
    w2,
    w2_scale,
    w2_zero,
    b2,
    results,
    max_tiles,
    H: tl.constexpr,
    INTER: tl.constexpr,
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    S_E: tl.constexpr,
    S_N: tl.constexpr,
    S_K: tl.constexpr,
    Z_E: tl.constexpr,
    Z_N: tl.constexpr,
    Z_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """results[pair] = w2 of the pair's expert @ h[row of the pair] + b2, rounded as the reference does.

    Args:
        h_planes: of ``gate_up_tiles_int4_kernel``. results: [n_pairs, H] as in ``down_tiles_kernel``.
        w2, w2_scale, w2_zero: as in ``gate_up_pairs_int4_kernel``. b2: None or [E, H], dense.
    """
    model = results.dtype.element_ty
    HALF: tl.constexpr = CHUNK // 2
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.load(tiles)
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_and_block(item, n_tiles, N_BLOCKS, GROUP)
        expert = tl.load(tiles + 1 + tile).to(tl.int64)
        rows = tl.load(tiles + 1 + max_tiles + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tiles + 1 + 2 * max_tiles + tile)
        channel = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        mask = channel < H
        byte = tl.arange(0, HALF)
        h_at = h_planes + rows.to(tl.int64)[None, :] * INTER + byte[:, None]
        w_at = w2 + expert * W_E + channel * W_N + byte[None, :]
        scale_at = w2_scale + expert * S_E + channel * S_N
        zero_at = None if w2_zero is None else w2_zero + expert * Z_E + channel * Z_N
        sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for chunk in range(0, INTER // CHUNK):
            even = tl.load(h_at + chunk * HALF, mask=live[None, :], other=0.0)
            odd = tl.load(h_at + (INTER // 2 + chunk * HALF), mask=live[None, :], other=0.0)
            sums = add_tile_products(sums, even, odd, w_at, scale_at, zero_at, chunk, mask, HALF, SHARE, S_K, Z_K)
        out = add_bias(sums, b2, expert, channel, mask, H, model)
        pairs = tl.load(order + rows, mask=live, other=0)
        out_at = results + pairs.to(tl.int64)[None, :] * H + channel
        tl.store(out_at, out.to(model), mask=mask & live[None, :])
