"""The norm kernel against the canonical ``rms_norm`` and ``add_rms_norm``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import assert_close_to_reference, assert_within, gpu_only, on_device

from moe_fx.lowering.cuda import configs, norms
from moe_fx.lowering.ops import CANONICAL_OPS

# From fine to coarse.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAUNCH: dict[str, Callable[..., Any]] = {"rms_norm": norms.rms_norm, "add_rms_norm": norms.add_rms_norm}
REFUSAL: dict[str, Callable[..., Any]] = {
    "rms_norm": norms.rms_norm_refusal,
    "add_rms_norm": norms.add_rms_norm_refusal,
}


def operands(op: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, or x and residual."""
    return tuple(torch.randn(shape).to(dtype) for _ in range(1 if op == "rms_norm" else 2))


def check(op: str, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    assert REFUSAL[op](*args, **kwargs) is None
    results = assert_close_to_reference(op, LAUNCH[op], args, kwargs)
    assert all(result.is_contiguous() for result in results)
    return results


def tuple_of(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", LAUNCH)
def test_samples(op: str, dtype: torch.dtype) -> None:
    for sample in CANONICAL_OPS[op].samples(dtype, torch.Generator().manual_seed(0)):
        check(op, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("width", [1, 3, 24, 100, 2880, 7168, 8192, 8193, 16384])
@pytest.mark.parametrize("op", LAUNCH)
def test_any_width(op: str, width: int) -> None:
    check(op, *operands(op, 3, width), torch.randn(width), 1e-6)


@pytest.mark.parametrize("block_r", [1, 2, 4])
@pytest.mark.parametrize("block_d", [16, 64])
@pytest.mark.parametrize("op", LAUNCH)
def test_blocks_and_loops(op: str, block_d: int, block_r: int) -> None:
    # More rows than programs of one wave have, and a last block that is not full; columns in four blocks, or one.
    launch = {"BLOCK_R": block_r, "BLOCK_D": block_d, "WAVES": 1, "num_warps": 4}
    with configs.forced({"norms": launch}):
        check(op, *operands(op, 15, 50, dtype=torch.bfloat16), torch.randn(50), 1e-6, cast="after", offset=1.0)


@pytest.mark.parametrize("weight_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", LAUNCH)
def test_dtypes(op: str, x_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    weight = None if weight_dtype is None else torch.randn(96).to(weight_dtype)
    xs = operands(op, 4, 96, dtype=x_dtype)
    check(op, *xs, weight, 1e-5)
    for cast, out_dtype in itertools.product(("before", "after"), DTYPES):
        # Rounded before the weight, the result has the dtype of the product, whatever was asked for.
        arguments = (*map(on_device, (*xs, weight)), 1e-5)
        offset = 1.0 if cast == "before" else 0.0
        given, *_ = tuple_of(LAUNCH[op](*arguments, cast=cast, out_dtype=out_dtype, offset=offset))
        wanted, *_ = tuple_of(CANONICAL_OPS[op].reference(*arguments, cast=cast, out_dtype=out_dtype, offset=offset))
        assert_within(op, given, wanted, max(x_dtype, wanted.dtype, key=DTYPES.index))


def test_rounds_where_the_reference_does() -> None:
    # fp16, since the interpreter rounds that as a GPU does. Nearly every value is the reference's to the last bit:
    # rounding the sum or the normalised value elsewhere changes a third of them.
    x, residual, weight = (torch.randn(shape).half() for shape in ((40, 64), (40, 64), (64,)))
    for cast in ("before", "after"):
        for op, args in (("rms_norm", (x,)), ("add_rms_norm", (x, residual))):
            given = check(op, *args, weight, 1e-6, cast=cast)
            wanted = tuple_of(CANONICAL_OPS[op].reference(*map(on_device, (*args, weight)), 1e-6, cast=cast))
            assert (given[0] == wanted[0]).double().mean() > 0.98
            assert all(torch.equal(*pair) for pair in zip(given[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("op", LAUNCH)
def test_strides_and_leading_shapes(op: str) -> None:
    weight = torch.randn(32, 2)[:, 1]
    for shape, view in (
        ((32,), lambda x: x),
        ((5, 96), lambda x: x[:, 32:64]),
        ((2, 3, 4, 32), lambda x: x.transpose(0, 2)),
        ((2, 3, 128), lambda x: x[..., :64].unflatten(-1, (2, 32))),
        ((32, 7), lambda x: x.t()),
        ((7, 64), lambda x: x[::2, ::2]),
    ):
        xs = [view(x) for x in operands(op, *shape, dtype=torch.float16)]
        check(op, *xs, weight, 1e-6)
        if len(xs) == 2:
            check(op, xs[0], xs[1].contiguous(), weight, 1e-6)


@pytest.mark.parametrize("op", LAUNCH)
def test_no_rows(op: str) -> None:
    check(op, *operands(op, 2, 0, 64), torch.randn(64), 1e-6)


def test_zero_and_large_rows() -> None:
    x = torch.zeros(3, 64)
    x[1] = 1e18  # of which the square is inf in fp16 and bf16 sums, and fits fp32
    x[2, 5] = float("nan")
    check("rms_norm", x, torch.randn(64), 1e-6)


@gpu_only
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", LAUNCH)
def test_model_shapes(op: str, dtype: torch.dtype, rows: int) -> None:
    for width in (128, 2048, 2880, 7168):
        for cast in ("before", "after"):
            check(op, *operands(op, rows, width, dtype=dtype), torch.randn(width).to(dtype), 1e-6, cast=cast)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((torch.empty(2, 8, dtype=torch.float64), None), {}, "torch.float64 is none of"),
        ((torch.empty(2, 8), torch.empty(8, dtype=torch.int32)), {}, "torch.int32 is none of"),
        ((torch.empty(2, 8), torch.empty(1)), {}, "the weight is of shape (1,), not [8]"),
        ((torch.empty(2, 8), None), dict(cast="never"), "cast = 'never' is none of before, after"),
        ((torch.empty(2, 8), None), dict(cast="after", out_dtype=torch.float64), "torch.float64 is none of"),
    ],
)
def test_refusals(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    assert reason in str(norms.rms_norm_refusal(*args, 1e-6, **kwargs))
    x, weight = args
    assert reason in str(norms.add_rms_norm_refusal(x, x, weight, 1e-6, **kwargs))


def test_refuses_residuals_that_broadcast_or_promote() -> None:
    x = torch.empty(2, 8)
    assert "residual is torch.float16" in str(norms.add_rms_norm_refusal(x, x.half(), None, 1e-6))
    for residual in (x[0], x[:1], x[:, :1]):
        assert "residual is of shape" in str(norms.add_rms_norm_refusal(x, residual, None, 1e-6))
