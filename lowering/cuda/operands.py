"""What launchers ask of their operands: dtypes that kernels take, sizes that may be symbols, distances in memory."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Kernels take offsets within a block of rows, and within one expert's matrix, in 32 bits.
OFFSETS = 2**31


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for certain; asking binds no symbol."""
    return bool(statically_known_true(a == b))


def near(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """``matrix`` [n, D], copied where ``rows`` neighbouring rows lie further apart than 32-bit offsets reach."""
    span = (rows - 1) * matrix.stride(0) + (matrix.shape[1] - 1) * matrix.stride(1)
    return matrix if span < OFFSETS else matrix.contiguous()
