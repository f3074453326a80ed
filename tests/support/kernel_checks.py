"""Compare a kernel's launcher with its canonical op: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from moe_fx.lowering.cuda.device import INTERPRETED
from moe_fx.lowering.ops import CANONICAL_OPS

DEVICE = "cpu" if INTERPRETED else "cuda"


def gpu_only(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of what the interpreter cannot show; `pytest -m gpu` runs these alone."""
    reason = "needs a CUDA device; where there is one: make test ARGS='-m gpu'"
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED, reason=reason)(test))


def on_device(value: Any) -> Any:
    """A tensor moved to where kernels run with all of its memory, offset and strides; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type == DEVICE:
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


class AscendForm:
    """A kernel in the form that Ascend gets, for the launcher of CUDA."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            alone = {"BLOCK_S": 1, "MERGED": False, "ASCEND": True}
            changes = {name: value for name, value in alone.items() if name in constants}
            self.kernel[grid](*args, **{**constants, **changes})

        return launch


def assert_close_to_reference(
    op: str, launch: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, ...]:
    """Run both on the device's copies of the operands; dtype, shape and the op's tolerance must hold. Returns ours.

    Integer results (expert ids) must be equal.
    """
    args = tuple(map(on_device, args))
    keywords = {name: on_device(value) for name, value in (kwargs or {}).items()}
    wanted = _tuple(CANONICAL_OPS[op].reference(*args, **keywords))
    given = _tuple(launch(*args, **keywords))
    assert len(given) == len(wanted)
    for got, want in zip(given, wanted, strict=True):
        assert_within(op, got, want, args[0].dtype)
    return given


def assert_within(op: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """``got`` has the dtype and shape of ``want`` and lies within the op's tolerance for ``dtype``."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want)
        return
    tolerance = CANONICAL_OPS[op].tolerance[dtype]
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance.atol, rtol=tolerance.rtol, equal_nan=True)
    finite = torch.isfinite(want)
    distance = (got.double() - want.double())[finite].norm()
    assert distance <= tolerance.rel_l2 * want.double()[finite].norm() + 1e-30


def _tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
