"""Spreads rows of activations over planes: what meets one nibble of neighbouring int4 words then lies side by side."""

import triton
import triton.language as tl

from .dependent_launch import allow_dependents, wait_for_inputs
from .rounding import to_nearest

# The largest fixed-point activation: 127 * 128.
_LARGEST = tl.constexpr(16256.0)
_ABSOLUTE_BITS = tl.constexpr(0x7FFFFFFF)
# The bits of 2**-111: of what is smaller, the scale would be subnormal, and too coarse to divide by.
_LEAST_BITS = tl.constexpr(0x08000000)


@triton.jit(do_not_specialize=["n_rows"])
def split_planes_kernel(
    x, planes, n_rows, x_stride, K: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """planes [n_rows, PLANES, K / PLANES], dense: element i of a row lies in plane i % PLANES at i // PLANES.

    Args:
        x: [n_rows, K], rows x_stride apart. BLOCK: elements of a plane at a time.
        PDL: launched while what made x may still run; the next kernel is launched so, too.
    """
    wait_for_inputs(PDL)
    allow_dependents(PDL)
    LENGTH: tl.constexpr = K // PLANES
    BLOCKS: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    plane = tl.arange(0, PLANES)[None, :]
    for item in range(tl.program_id(0), n_rows * BLOCKS, tl.num_programs(0)):
        row = tl.cast(item // BLOCKS, tl.int64)
        i = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)[:, None]
        values = tl.load(x + row * x_stride + i * PLANES + plane, mask=i < LENGTH, other=0.0)
        tl.store(planes + row * K + plane * LENGTH + i, values, mask=i < LENGTH)


@triton.jit(do_not_specialize=["n_rows"])
def fixed_point_planes_kernel(
    x,
    planes,
    scales,
    n_rows,
    x_stride,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WAIT_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows as 15-bit fixed-point numbers with a scale to every 32 elements, in bytes that an integer dot product takes.

    Element i is (128 * high + low) * scale, with high within +-127 and low from -64 to 63, and an error of at most half
    a scale: 2**-15 of the largest of the 32. Where one of the 32 is inf or NaN, so is the scale, and all numbers are 0:
    what they meet becomes NaN.

    Args:
        x: [n_rows, K], rows x_stride apart; K is a multiple of 32.
        planes: int32 [n_rows, 4, K / 8], dense. Word w of a plane has a byte of each of four elements 8 w + offset:
            high bytes of offsets 0, 2, 4, 6; of 1, 3, 5, 7; and the low bytes of both.
        scales: fp32 [n_rows, 2, K / 32], dense: the scales, then the sums of each 32 numbers.
        BLOCK_R: runs of 32 elements at a time.
        WAIT_FIRST: let the next kernel start only when all before this one has ended. It then may read whatever is
            older than x; else what is older than the kernel that made x.
        PDL: launched while what made x may still run; the next kernel is launched so, too.
    """
    if WAIT_FIRST:
        wait_for_inputs(PDL)
    allow_dependents(PDL)
    wait_for_inputs(PDL)
    WORDS: tl.constexpr = K // 8
    RUNS: tl.constexpr = K // 32
    BLOCKS: tl.constexpr = (RUNS + BLOCK_R - 1) // BLOCK_R
    offset = tl.arange(0, 8)[None, None, :]
    for item in range(tl.program_id(0), n_rows * BLOCKS, tl.num_programs(0)):
        row = tl.cast(item // BLOCKS, tl.int64)
        run = (item % BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
        word = run[:, None] * 4 + tl.arange(0, 4)[None, :]
        mask = word < WORDS
        at = x + row * x_stride + word[:, :, None] * 8 + offset
        values = tl.load(at, mask=mask[:, :, None], other=0.0).to(tl.float32)
        # As integers, absolute values keep their order, and NaN is above all; a maximum of floats would pass over it.
        bits = values.to(tl.int32, bitcast=True) & _ABSOLUTE_BITS
        largest = tl.maximum(tl.max(tl.max(bits, axis=2), axis=1), _LEAST_BITS)
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / _LARGEST)
        divisor = scale[:, None, None]
        numbers = tl.where(divisor < float("inf"), values / divisor, 0.0)
        numbers = to_nearest(numbers).to(tl.int32)
        high = (numbers + 64) >> 7
        low = numbers - (high << 7)
        byte = (offset // 2) * 8
        out = planes + row * (4 * WORDS) + word
        for parity in tl.static_range(2):
            taken = offset % 2 == parity
            tl.store(out + parity * WORDS, tl.sum(tl.where(taken, (high & 255) << byte, 0), axis=2), mask=mask)
            tl.store(out + (2 + parity) * WORDS, tl.sum(tl.where(taken, (low & 255) << byte, 0), axis=2), mask=mask)
        total = tl.sum(tl.sum(numbers, axis=2), axis=1).to(tl.float32)
        tl.store(scales + row * (2 * RUNS) + run, scale, mask=run < RUNS)
        tl.store(scales + row * (2 * RUNS) + RUNS + run, total, mask=run < RUNS)
