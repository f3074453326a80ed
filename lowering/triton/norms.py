"""RMSNorm, and addition with RMSNorm, over the rows of a matrix: what ``lowering/ops/norms.py`` means, fp32 inside."""

import triton
import triton.language as tl


@triton.jit
def load_row(x, residual, x_at, residual_at, mask):
    """fp32 values of x, or of x + residual rounded to x's dtype."""
    h = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
        h = h.to(x.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def scaled(h, factor, gain, x, CAST_BEFORE: tl.constexpr):
    """``h * factor``, rounded to x's dtype when CAST_BEFORE, times the gain (or None)."""
    y = h * factor
    if CAST_BEFORE:
        y = y.to(x.dtype.element_ty).to(tl.float32)
    if gain is not None:
        y = y * gain
    return y


@triton.jit
def load_gain(weight, offset, cols, mask):
    """weight + offset in fp32, or None."""
    gain = None
    if weight is not None:
        gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) + offset
    return gain


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    n_rows,
    x_stride,
    x_step,
    residual_stride,
    residual_step,
    eps,
    offset,
    D: tl.constexpr,
    CAST_BEFORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [n_rows, D] = norm of the rows of x (+ residual), and total [n_rows, D] their sum; both dense.

    Args:
        x, residual: of one dtype, with strides from row to row and steps from column to column; residual and total
            may be None, together.
        weight: [D] or None. offset: added to it.
        CAST_BEFORE: round to x's dtype before the weight is applied.
        BLOCK_D: columns at a time. Longer rows are read twice, the second time from the cache.
    """
    row = tl.arange(0, BLOCK_R)[:, None]
    block_cols = tl.arange(0, BLOCK_D)[None, :]
    gain = load_gain(weight, offset, block_cols, block_cols < D)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R), tl.num_programs(0)):
        # Offsets of the block in int64, as scalars, which Ascend has; within a block int32 does.
        first = tl.cast(block * BLOCK_R, tl.int64)
        live = row < n_rows - block * BLOCK_R
        x_rows = x + first * x_stride
        residual_rows = residual
        if residual is not None:
            residual_rows = residual + first * residual_stride
        if BLOCK_D >= D:
            mask = live & (block_cols < D)
            at = row * D + block_cols
            x_at, residual_at = row * x_stride + block_cols * x_step, row * residual_stride + block_cols * residual_step
            h = load_row(x_rows, residual_rows, x_at, residual_at, mask)
            if total is not None:
                tl.store(total + first * D + at, h.to(total.dtype.element_ty), mask=mask)
            factor = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)
            y = scaled(h, factor, gain, x, CAST_BEFORE)
            tl.store(out + first * D + at, y.to(out.dtype.element_ty), mask=mask)
        else:
            squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for start in range(0, D, BLOCK_D):
                cols = start + block_cols
                mask = live & (cols < D)
                x_at, residual_at = row * x_stride + cols * x_step, row * residual_stride + cols * residual_step
                h = load_row(x_rows, residual_rows, x_at, residual_at, mask)
                if total is not None:
                    tl.store(total + first * D + row * D + cols, h.to(total.dtype.element_ty), mask=mask)
                squares += h * h
            factor = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / D + eps)
            for start in range(0, D, BLOCK_D):
                cols = start + block_cols
                mask = live & (cols < D)
                x_at, residual_at = row * x_stride + cols * x_step, row * residual_stride + cols * residual_step
                h = load_row(x_rows, residual_rows, x_at, residual_at, mask)
                y = scaled(h, factor, load_gain(weight, offset, cols, cols < D), x, CAST_BEFORE)
                tl.store(out + first * D + row * D + cols, y.to(out.dtype.element_ty), mask=mask)
