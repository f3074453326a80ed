"""Rounding of fp32 values within a kernel: to what a narrower dtype holds, and to whole numbers."""

import triton
import triton.language as tl

# Added and taken away again, it leaves a float below 2**22 rounded to an integer, half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 values as ``DTYPE`` holds them: "fp32", "bf16" or "fp16"."""
    if DTYPE == "bf16":
        x = x.to(tl.bfloat16).to(tl.float32)
    elif DTYPE == "fp16":
        x = x.to(tl.float16).to(tl.float32)
    else:
        tl.static_assert(DTYPE == "fp32", "unknown dtype")
    return x


@triton.jit
def to_nearest(x):
    """Whole numbers below 2**22, half to even."""
    return x + _ROUNDER - _ROUNDER
