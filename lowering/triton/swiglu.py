"""Gated activation of an MLP, and the same with each row quantised to int8: ``lowering/ops/swiglu.py``, fp32 inside."""

import triton
import triton.language as tl

from .activation import activate
from .rounding import to_nearest


@triton.jit
def activated(gate_at, up_at, mask, alpha, limit, ACT: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """The activation, fp32, of what lies at pointers to gate and up (None: not gated)."""
    g = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    u = g
    if up_at is not None:
        u = tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
    return activate(g, u, ACT, up_at is not None, alpha, limit, HAS_LIMIT)


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_kernel(
    gate,
    up,
    out,
    n_rows,
    gate_stride,
    gate_step,
    up_stride,
    up_step,
    alpha,
    limit,
    N: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out [n_rows, N], dense, of gate and up [n_rows, N] (up None: not gated), bf16, fp16 or fp32.

    A merged projection is two operands with a stride of 2 N, or with a step of 2 when it is interleaved.
    """
    COL_BLOCKS: tl.constexpr = (N + BLOCK_I - 1) // BLOCK_I
    row = tl.arange(0, BLOCK_R)[:, None]
    col = tl.arange(0, BLOCK_I)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R) * COL_BLOCKS, tl.num_programs(0)):
        # Offsets of the block in int64, as scalars, which Ascend has; within a block int32 does.
        first_row = block // COL_BLOCKS * BLOCK_R
        first = tl.cast(first_row, tl.int64)
        cols = block % COL_BLOCKS * BLOCK_I + col
        mask = (row < n_rows - first_row) & (cols < N)
        gate_at = gate + first * gate_stride + row * gate_stride + cols * gate_step
        up_at = up
        if up is not None:
            up_at = up + first * up_stride + row * up_stride + cols * up_step
        y = activated(gate_at, up_at, mask, alpha, limit, ACT, HAS_LIMIT)
        tl.store(out + first * N + row * N + cols, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def scale_of(largest, ASCEND: tl.constexpr):
    """The int8 scale of a row from its largest magnitude; a row of zeros gets one that is not 0."""
    largest = tl.maximum(largest, 1e-12)
    # triton-ascend cannot convert div_rn of scalars; its "/" is exact, and that of CUDA is not.
    return largest / 127.0 if ASCEND else tl.div_rn(largest, 127.0)


@triton.jit
def quantised(y, scale):
    """round(y / scale), half to even, within +-127; the division is exact to the last bit, lest halves go astray."""
    q = to_nearest(tl.div_rn(y, scale))
    q = tl.where(q > 127.0, 127.0, q)
    return tl.where(q < -127.0, -127.0, q).to(tl.int8)


@triton.jit
def activated_row(
    gate_row,
    up_row,
    cols,
    gate_step,
    up_step,
    alpha,
    limit,
    N: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):
    """Columns of a row of ``swiglu_kernel``'s result: rounded to gate's dtype, as fp32; 0 beyond N."""
    up_at = up_row
    if up_row is not None:
        up_at = up_row + cols * up_step
    y = activated(gate_row + cols * gate_step, up_at, cols < N, alpha, limit, ACT, HAS_LIMIT)
    return y.to(gate_row.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_quant_kernel(
    gate,
    up,
    out,
    scales,
    n_rows,
    gate_stride,
    gate_step,
    up_stride,
    up_step,
    alpha,
    limit,
    N: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """out [n_rows, N] int8 and scales [n_rows] fp32, both dense: each row of ``swiglu_kernel``'s result / its scale.

    BLOCK_I: columns at a time. Longer rows are computed twice, the second time from the cache. A row at a time, in one
    dimension: in two, Ascend pads every int8 to a block of its memory.
    """
    col = tl.arange(0, BLOCK_I)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        gate_row = gate + at * gate_stride
        up_row = up
        if up is not None:
            up_row = up + at * up_stride
        out_row = out + at * N
        if BLOCK_I >= N:
            y = activated_row(gate_row, up_row, col, gate_step, up_step, alpha, limit, N, ACT, HAS_LIMIT)
            scale = scale_of(tl.max(tl.abs(y), axis=0), ASCEND)
            tl.store(out_row + col, quantised(y, scale), mask=col < N)
        else:
            largest = tl.zeros([BLOCK_I], tl.float32)
            for start in range(0, N, BLOCK_I):
                y = activated_row(gate_row, up_row, start + col, gate_step, up_step, alpha, limit, N, ACT, HAS_LIMIT)
                largest = tl.maximum(largest, tl.abs(y))
            scale = scale_of(tl.max(largest, axis=0), ASCEND)
            for start in range(0, N, BLOCK_I):
                y = activated_row(gate_row, up_row, start + col, gate_step, up_step, alpha, limit, N, ACT, HAS_LIMIT)
                tl.store(out_row + start + col, quantised(y, scale), mask=start + col < N)
        tl.store(scales + at, scale)
