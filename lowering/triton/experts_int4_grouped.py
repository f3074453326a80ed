"""Fused experts on int4 weights (W4A16) for many tokens: as ``experts_grouped``, with weights widened in registers.

A byte holds two neighbouring inputs, the even one in its low nibble. Weights, rounded to the model's dtype like the
reference's, are the left operand of the product, which a tensor core takes from registers. Nothing is interleaved to
match: activations lie in two planes, a row's even elements first, and low nibbles meet the one, high ones the other.
Weights are walked in chunks of CHUNK inputs, none of which crosses a group of inputs with one scale.
"""

import triton
import triton.language as tl

from .activation import activate
from .experts_grouped import tile_and_block
from .experts_int4_pairs import MIDDLE_NIBBLE, add_bias

# The bits of the fp32 number 2**23, whose last bit counts ones: with a nibble put there it is 2**23 + nibble.
_BIAS_BITS = tl.constexpr(0x4B000000)
_BIAS = tl.constexpr(8388608.0)


@triton.jit
def nibbles(packed, zero):
    """Low and high nibbles of bytes, minus the zero point, as fp32."""
    # Conversion from integers runs at a quarter of the speed of an addition.
    low = ((packed & 15).to(tl.int32) | _BIAS_BITS).to(tl.float32, bitcast=True) - (zero + _BIAS)
    high = ((packed >> 4).to(tl.int32) | _BIAS_BITS).to(tl.float32, bitcast=True) - (zero + _BIAS)
    return low, high


@triton.jit
def scale_and_zero(scale_at, zero_at, group, mask, S_K: tl.constexpr, Z_K: tl.constexpr):
    """Scales of groups and their zero points, as fp32."""
    scale = tl.load(scale_at + group * S_K, mask=mask, other=0.0).to(tl.float32)
    zero = MIDDLE_NIBBLE if zero_at is None else tl.load(zero_at + group * Z_K, mask=mask, other=0).to(tl.float32)
    return scale, zero


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
    low, high = nibbles(packed, zero)
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
    """h of every row of ``order``, in planes; other arguments as in ``gate_up_pairs_int4_kernel`` (experts_int4_pairs).

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
