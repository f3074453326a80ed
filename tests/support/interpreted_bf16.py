"""bf16 in Triton's interpreter as on a GPU: fp32 rounds to the nearest, and a dot takes values, not their bits.

Triton 3.7's interpreter keeps bf16 as its 16 bits. It truncates fp32 to them, and ``tl.dot`` multiplies the bits as
integers. Tests of kernels that do either use the fixture ``bf16_as_on_a_gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from moe_fx.lowering.cuda.device import INTERPRETED


@pytest.fixture
def bf16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within a test, bf16 behaves like the hardware's; without the interpreter it does anyway."""
    if INTERPRETED:
        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_dot", _dot_of_values(builder.create_dot))
        monkeypatch.setattr(builder, "cast_impl", _cast_to_nearest(builder.cast_impl))
    yield


def _dot_of_values(dot: Any) -> Any:
    def values(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widened(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, values(a), values(b), *rest)

    return create_dot


def _cast_to_nearest(cast: Any) -> Any:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        types = (src.dtype.scalar, dst_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_narrowed(src.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(src.data), tl.float32)
        return cast(self, src, dst_type)

    return cast_impl


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, to_even).astype(np.uint16)
