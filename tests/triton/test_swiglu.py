"""The kernels of the gated activation against the canonical ``swiglu``, and against quantising its result."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_checks import assert_close_to_reference, gpu_only, on_device

from moe_fx.lowering.cuda import configs, swiglu
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.activation import ACTIVATIONS, UNARY

SWIGLU = CANONICAL_OPS["swiglu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("gate_up", "up_gate", "interleaved")


def check(*args: Any, **kwargs: Any) -> torch.Tensor:
    assert swiglu.swiglu_refusal(*args, **kwargs) is None
    (result,) = assert_close_to_reference("swiglu", swiglu.swiglu, args, kwargs)
    assert result.is_contiguous()
    return result


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``experts_int8`` with ``dynamic_activations`` quantises what enters its second projection."""
    # By a number, torch divides on a GPU with its reciprocal, which is not exact.
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / torch.tensor(127.0, device=rows.device)
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale.squeeze(-1)


def check_quantised(*args: Any, **kwargs: Any) -> None:
    args = tuple(map(on_device, args))
    assert swiglu.swiglu_refusal(*args, **kwargs) is None
    values, scales = swiglu.swiglu_quant(*args, **kwargs)
    # What the kernel quantises is what its sibling returns: that one is compared with the reference above.
    wanted, wanted_scales = quantise(swiglu.swiglu(*args, **kwargs))
    assert values.is_contiguous() and scales.is_contiguous()
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(values, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    for sample in SWIGLU.samples(dtype, torch.Generator().manual_seed(0)):
        check(*sample.args, **sample.kwargs)
        check_quantised(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str, limit: float | None, dtype: torch.dtype) -> None:
    if act == "silu_then_clamp" and limit is None:
        pytest.skip("has no meaning")
    merged = torch.randn(3, 40).to(dtype)
    for layout in LAYOUTS:
        check(merged, act=act, limit=limit, layout=layout, alpha=1.3)
    gate, up = merged.chunk(2, dim=-1)
    check(gate, up, act=act, limit=limit)
    check_quantised(gate, up, act=act, limit=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", UNARY)
def test_without_up(act: str, dtype: torch.dtype) -> None:
    check(torch.randn(3, 20).to(dtype), layout="none", act=act, limit=0.1)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_far_values(act: str) -> None:
    far = torch.tensor([-1e4, -200.0, -90.0, -20.0, -5.0, -1e-4, 0.0, 1e-4, 5.0, 20.0, 90.0, 200.0, 1e4, float("nan")])
    gate, up = torch.meshgrid(far, far, indexing="ij")
    if act.startswith("gelu"):
        up = up / 1e4  # of 1 + erf(x) near -1 little is left but rounding, which a large factor would show
    check(gate.contiguous(), up.contiguous(), act=act, limit=7.0 if act == "silu_then_clamp" else None)
    check(gate.contiguous(), up.contiguous(), act=act, limit=100.0)


@pytest.mark.parametrize(("block_r", "block_i"), [(1, 16), (2, 16), (4, 64)])
def test_blocks_and_loops(block_r: int, block_i: int) -> None:
    # More blocks than programs of one wave have, and last blocks that are not full either way.
    launch = {"BLOCK_R": block_r, "BLOCK_I": block_i, "WAVES": 1, "num_warps": 4}
    quant = {"BLOCK_I": block_i, "WAVES": 1, "num_warps": 4}
    with configs.forced({"swiglu": launch, "swiglu_quant": quant}):
        for layout in LAYOUTS:
            merged = torch.randn(7, 84).bfloat16()
            check(merged, layout=layout)
            check_quantised(merged, layout=layout)


def test_default_blocks() -> None:
    for rows, width in ((1, 1), (1, 600), (65, 24), (66, 520), (65, 2100)):
        check(torch.randn(rows, 2 * width))
    check_quantised(torch.randn(2, 2 * 8200))


def test_strides_and_leading_shapes() -> None:
    for shape, view in (
        ((40,), lambda x: x),
        ((2, 3, 40), lambda x: x),
        ((5, 60), lambda x: x[:, 10:50]),
        ((2, 3, 4, 40), lambda x: x.transpose(0, 2)),
        ((40, 7), lambda x: x.t()),
        ((7, 80), lambda x: x[::2, ::2]),
    ):
        gate, up = (view(torch.randn(shape)) for _ in range(2))
        check(gate, up.contiguous())
        check_quantised(gate, up)
        for layout in LAYOUTS:
            check(gate, layout=layout)


def test_no_rows() -> None:
    check(torch.empty(2, 0, 16))
    values, scales = swiglu.swiglu_quant(on_device(torch.empty(2, 0, 16)))
    assert (values.shape, scales.shape) == ((2, 0, 8), (2, 0))
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)


def test_quantisation_rounds_half_to_even_and_survives_zeros() -> None:
    # With the largest magnitude at 127 the scale is 1, and halves stay halves.
    rows = torch.zeros(3, 16)
    rows[0, :9] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.49])
    rows[1, :2] = torch.tensor([-254.0, 1.0])
    values, scales = swiglu.swiglu_quant(on_device(rows), act="identity", layout="none")
    assert values[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, 0]
    assert values[1, :2].tolist() == [-127, 0]
    assert values[2].tolist() == [0] * 16
    torch.testing.assert_close(scales, on_device(torch.tensor([1.0, 2.0, 1e-12 / 127])), rtol=0, atol=0)


@gpu_only
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_shapes(dtype: torch.dtype, rows: int) -> None:
    for width, layout in itertools.product((768, 2048, 2880, 18432), LAYOUTS):
        merged = torch.randn(rows, 2 * width).to(dtype)
        check(merged, layout=layout)
        check_quantised(merged, layout=layout)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((torch.empty(2, 8, dtype=torch.float64),), {}, "torch.float64 is none of"),
        ((torch.empty(2, 7),), {}, "7 columns does not divide"),
        ((torch.empty(2, 8),), dict(layout="up"), "layout = 'up' is none of gate_up"),
        ((torch.empty(2, 8),), dict(act="mish"), "act = 'mish' is none of silu"),
        ((torch.empty(2, 8),), dict(act="swiglu_oai", layout="none"), "act = 'swiglu_oai' is none of silu"),
        ((torch.empty(2, 8),), dict(act="silu_then_clamp"), "needs a limit"),
        ((torch.empty(2, 8), torch.empty(2, 8).half()), {}, "up is torch.float16, gate is torch.float32"),
        ((torch.empty(2, 8), torch.empty(1, 8)), {}, "up is of shape (1, 8), gate of (2, 8)"),
        ((torch.empty(2, 8), torch.empty(8)), {}, "up is of shape (8,), gate of (2, 8)"),
    ],
)
def test_refusals(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    assert reason in str(swiglu.swiglu_refusal(*args, **kwargs))
