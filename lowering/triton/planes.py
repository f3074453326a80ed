"""Spreads rows of activations over planes: what meets one nibble of neighbouring int4 words then lies side by side."""

import triton
import triton.language as tl

from .dependent_launch import allow_dependents, wait_for_inputs


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
