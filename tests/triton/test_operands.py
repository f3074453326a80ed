"""Distances that 32-bit offsets do not reach, on tensors without memory."""

from __future__ import annotations

import pytest
import torch

from moe_fx.lowering.cuda.operands import near


@pytest.mark.parametrize(
    ("strides", "rows", "copied"),
    [
        ((4096, 1), 8, False),
        ((1, 600_000), 1, True),  # 4,095 columns, so far apart, are more than 2**31 elements.
        ((1, 500_000), 1, False),
        ((2**30, 1), 2, False),
        ((2**30, 1), 3, True),
    ],
)
def test_rows_far_apart_are_copied(strides: tuple[int, int], rows: int, copied: bool) -> None:
    matrix = torch.empty_strided((16, 4096), strides, device="meta")
    assert (near(matrix, rows) is not matrix) == copied
    assert near(matrix, rows).is_contiguous() or not copied
