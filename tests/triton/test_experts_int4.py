"""The kernels of fused experts on int4 weights, for few tokens and for many, against the canonical ``experts_int4``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, AscendForm, assert_close_to_reference, gpu_only, on_device

from moe_fx.lowering.cuda import configs
from moe_fx.lowering.cuda import experts_int4 as launcher
from moe_fx.lowering.cuda.device import dependent_launch
from moe_fx.lowering.cuda.experts_int4 import TUNABLE, experts_int4, experts_int4_refusal
from moe_fx.lowering.ops import CANONICAL_OPS

PATHS = ("pairs", "grouped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Small enough for several blocks along every dimension, large enough for the interpreter.
BLOCKS = {
    "experts_int4_gate_up_pairs": {"BLOCK_N": 32, "BLOCK_W": 8},
    "experts_int4_down_pairs": {"BLOCK_N": 64, "BLOCK_W": 8},
    "experts_int4_tiles": {"BLOCK_M": 16},
    "experts_int4_gate_up_tiles": {"BLOCK_N": 32, "GROUP": 2},
    "experts_int4_down_tiles": {"BLOCK_N": 32, "GROUP": 2},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on both paths, whatever the number of tokens."""
    with configs.forced({**BLOCKS, "experts_int4": {"PAIRS": 10**6 if request.param == "pairs" else 0}}):
        yield request.param


def samples() -> list[Any]:
    return [
        pytest.param(sample, id=f"{str(dtype)[6:]}-{sample.name}")
        for dtype in DTYPES
        for sample in CANONICAL_OPS["experts_int4"].samples(dtype, torch.Generator().manual_seed(0))
        if not sample.kwargs["dynamic_activations"]
    ]


@pytest.mark.parametrize("sample", samples())
def test_canonical_samples(sample: Any, path: str) -> None:
    assert_close_to_reference("experts_int4", experts_int4, sample.args, sample.kwargs)


def operands(
    tokens: int = 3,
    hidden: int = 128,
    inter: int = 64,
    n_experts: int = 3,
    top_k: int = 2,
    *,
    groups: tuple[int, int] = (64, 32),
    zeros: bool = True,
    layout: str = "gate_up",
    biases: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of ``experts_int4`` by name; ``groups`` are the group sizes of w13 and w2."""
    rng = torch.Generator().manual_seed(1)
    rows = inter if layout == "none" else 2 * inter
    given: dict[str, Any] = {
        "x": torch.randn(tokens, hidden, generator=rng).to(dtype),
        "weights": torch.rand(tokens, top_k, generator=rng).to(weights_dtype),
        "ids": torch.randint(0, n_experts, (tokens, top_k), generator=rng, dtype=torch.int32),
    }
    for name, n, k, group in (("w13", rows, hidden, groups[0]), ("w2", hidden, inter, groups[1])):
        given[name] = torch.randint(0, 256, (n_experts, n, k // 2), generator=rng).to(torch.uint8)
        scale = (0.5 + torch.rand(n_experts, n, k // group, generator=rng)) / (8 * k**0.5)
        given[f"{name}_scale"] = scale.to(scale_dtype)
        zero = torch.randint(0, 16, (n_experts, n, k // group), generator=rng).to(torch.uint8)
        given[f"{name}_zero"] = zero if zeros else None
    given["b13"] = torch.randn(n_experts, rows, generator=rng).to(dtype) if biases else None
    given["b2"] = torch.randn(n_experts, hidden, generator=rng).to(dtype) if biases else None
    given["layout"] = layout
    return given


NAMES = ("x", "weights", "ids", "w13", "w13_scale", "w2", "w2_scale", "w13_zero", "w2_zero", "b13", "b2")


def check(given: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Compare with the reference; the operands may be changed by name."""
    given = {**given, **kwargs}
    args = tuple(given.pop(name) for name in NAMES)
    (y,) = assert_close_to_reference("experts_int4", experts_int4, args, given)
    return y


def test_one_row_of_any_stride(path: str) -> None:
    given, wide = operands(1), torch.randn(1, 129).to(torch.bfloat16)
    check(given, x=torch.randn(128, 1).to(torch.bfloat16).t())
    check(given, x=wide[:, 1:])
    check(given, x=wide[:, :128])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [(32, 64), (128, 32), (256, 96), (96, 192)])
def test_group_sizes(groups: tuple[int, int], zeros: bool, path: str) -> None:
    """Powers of two up to a chunk, several chunks to a group, and groups that hold an odd number of chunks."""
    hidden = groups[0] if groups[0] > 128 else 2 * groups[0]
    check(operands(1, hidden, groups[1], groups=groups, zeros=zeros))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved", "none"])
def test_layouts(layout: str, dtype: torch.dtype, path: str) -> None:
    check(operands(layout=layout, biases=True, dtype=dtype), act="gelu_tanh")


@pytest.mark.parametrize(("act", "limit"), [("swiglu_oai", 7.0), ("silu", 0.5), ("silu_then_clamp", 0.5)])
def test_activations(act: str, limit: float, path: str) -> None:
    check(operands(2, layout="interleaved"), act=act, limit=limit)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_scales_and_weights(scale_dtype: torch.dtype, path: str) -> None:
    given = operands(scale_dtype=scale_dtype, weights_dtype=torch.bfloat16)
    check(given, out_dtype=torch.float32)
    check(given, weights=given["weights"].to(torch.float16))


def test_every_nibble_is_read_as_itself(path: str) -> None:
    """All sixteen values at all eight places of a word, one input at a time, exactly."""
    given = operands(32, 32, 32, 1, 1, groups=(32, 32), zeros=False, layout="none", dtype=torch.float32)
    given["x"], given["weights"], given["ids"] = torch.eye(32), torch.ones(32, 1), torch.zeros(32, 1, dtype=torch.int32)
    row, column = torch.arange(32)[:, None], torch.arange(32)[None, :]
    nibbles = (row + column) % 16
    given["w13"] = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)[None]
    identity = torch.where(row == column, 9, 8)
    given["w2"] = (identity[:, ::2] + 16 * identity[:, 1::2]).to(torch.uint8)[None]
    given["w13_scale"], given["w2_scale"] = torch.ones(1, 32, 1), torch.ones(1, 32, 1)
    y = experts_int4(**{name: on_device(value) for name, value in given.items()}, act="identity")
    assert torch.equal(y.cpu(), (nibbles - 8).t().float())


@pytest.mark.parametrize("hidden", [32, 160])
def test_sizes_that_no_block_divides(hidden: int, path: str) -> None:
    check(operands(2, hidden, 96, groups=(32, 32), biases=True, top_k=3))


def test_expert_with_most_tokens(path: str) -> None:
    """More rows than a tile has, beside an expert with one, and one with none."""
    given = operands(20, 32, 32, 3, 1, groups=(32, 32))
    given["ids"][:] = 2
    given["ids"][7] = 0
    check(given)


def test_no_tokens(path: str) -> None:
    y = check(operands(1), x=torch.empty(0, 128), weights=torch.empty(0, 2), ids=torch.empty(0, 2, dtype=torch.int32))
    assert y.shape == (0, 128)


def test_ids_that_are_no_expert(path: str) -> None:
    """They contribute nothing; a token may have none at all."""
    given = operands(biases=True)
    given["ids"] = torch.tensor([[-1, 1], [2**32, 2], [3, 2**40 + 1]])
    y = check(given)
    assert (y[2] == 0).all()


def test_strided_operands(path: str) -> None:
    given = operands()
    check(given, x=torch.cat([given["x"]] * 2, dim=1)[:, 127:255])
    check(given, x=given["x"].t().contiguous().t(), ids=given["ids"].t().contiguous().t())
    scales = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("w13_scale", "w2_zero")}
    wider = torch.cat([given["w13"]] * 2, dim=2)[:, :, :64]
    check(given, w13=wider, **scales)


def test_words_that_start_amid_a_word(path: str) -> None:
    """Activations of two bytes are read four at a time."""
    given = operands()
    odd = torch.empty(1 + given["x"].numel(), dtype=torch.bfloat16)[1:].view_as(given["x"]).copy_(given["x"])
    y = experts_int4(**{**{name: on_device(value) for name, value in given.items()}, "x": on_device(odd)})
    assert torch.equal(y, experts_int4(**{name: on_device(value) for name, value in given.items()}))


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not use these forms")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forms_for_ascend(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the NPU's compilers take computes the same; only few pairs are for it."""
    for name in ("gate_up_pairs_int4_kernel", "down_pairs_int4_kernel"):
        monkeypatch.setattr(launcher, name, AscendForm(getattr(launcher, name)))
    monkeypatch.setattr(
        launcher, "word_planes", lambda x, launch, dependent, first: (launcher.split_planes(x, 8, dependent), None)
    )
    given = operands(dtype=dtype, biases=True)
    given["ids"][0, 1], given["ids"][1, 0] = 3, -1
    with configs.forced({**BLOCKS, "experts_int4": {"PAIRS": 100}}):
        check(given)


def fixed_point(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of rows [n, K], put together from their bytes, by runs of 32; the runs' scales, and their sums."""
    n, width = x.shape
    planes, scales = launcher.word_planes(
        on_device(x), {"BLOCK_R": 4, "num_warps": 1}, dependent_launch(torch.device(DEVICE)), first=True
    )
    assert scales is not None
    parts = planes.cpu().contiguous().view(torch.int8).view(n, 4, width // 8, 4).int()
    numbers = torch.empty(n, width // 8, 8, dtype=torch.int32)
    for parity in range(2):
        numbers[:, :, parity::2] = 128 * parts[:, parity] + parts[:, 2 + parity]
    return numbers.view(n, width // 32, 32), *scales.cpu().unbind(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fixed_point_activations(dtype: torch.dtype) -> None:
    """Numbers and scales give back what went in to half a scale, whatever else a row holds; sums are exact."""
    x = torch.randn(5, 288).to(dtype)
    x[1, 40] = 3e4  # An outlier concerns its own run of 32 alone.
    x[2, 64:96] = 0
    x[3, 96:128] *= 1e-3
    x[4, 0] = -x[4, 1:32].abs().max() * 2
    numbers, scale, total = fixed_point(x)
    assert torch.equal(numbers.sum(-1).float(), total)
    assert numbers.abs().max() == 16256
    # Zeros have the least scale of all.
    torch.testing.assert_close(scale, x.view(5, 9, 32).abs().amax(-1).float() / 16256, rtol=1e-6, atol=1e-37)
    error = (numbers.double() * scale.double()[..., None] - x.view(5, 9, 32).double()).abs()
    assert (error <= 0.5001 * scale.double()[..., None]).all()


@pytest.mark.parametrize("exponent", [-112, -119, -126, -130, -133])
def test_the_smallest_activations_keep_their_signs(exponent: int) -> None:
    """Down to the last subnormal number: a scale too coarse to divide by would let bytes overflow."""
    x = (torch.tensor([1.0, -1.0, 0.0, 0.5] * 8) * 2.0**exponent).bfloat16()[None]
    numbers, scale, total = fixed_point(x)
    assert torch.equal(numbers.sum(-1).float(), total)
    error = (numbers.double() * scale.double()[..., None] - x.double()[:, None]).abs()
    assert (error <= 0.5001 * scale.double()[..., None]).all()
    assert scale.item() < 1e-37


@pytest.mark.parametrize("broken", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_activation_breaks_its_token_and_no_other(dtype: torch.dtype, broken: float, path: str) -> None:
    """Among finite neighbours it must not vanish in a maximum or a conversion to integers."""
    given = operands(dtype=dtype)
    given["x"][1, 37] = broken
    args = {name: on_device(value) for name, value in given.items()}
    y, wanted = experts_int4(**args), CANONICAL_OPS["experts_int4"].reference(**args)
    assert not wanted[1].isfinite().any() and not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], experts_int4(**{**args, "x": args["x"].nan_to_num(0, 0, 0)})[[0, 2]])
    assert y[[0, 2]].isfinite().all()


def test_broken_weights_of_pairs_without_an_expert_are_not_used(path: str) -> None:
    given = operands(biases=True)
    given["ids"][0, 1], given["ids"][1, 0] = 3, -1
    given["weights"][0, 1], given["weights"][1, 0] = math.nan, math.inf
    y = check(given)
    assert y.isfinite().all()


# --- What the kernels take, and with which parameters -----------------------------------------------------------------


def test_default_parameters_are_the_tunable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuner finds every kernel and parameter in the table, and each default among the values."""
    seen: dict[str, dict[str, int]] = {}
    lookup = configs.lookup

    def record(kernel: str, variant: str, tokens: int, defaults: dict[str, int], on: Any = None) -> dict[str, int]:
        for name, value in defaults.items():
            assert value in TUNABLE[kernel][name], (kernel, name, value)
        seen[kernel] = dict(defaults)
        return lookup(kernel, variant, tokens, {**defaults, **BLOCKS.get(kernel, {})}, on)

    monkeypatch.setattr(configs, "lookup", record)
    for tokens in (1, 257):
        check(operands(tokens, 32, 32, 1, 1, groups=(32, 32)))
    check(operands(257, 32, 32, 1, 1, groups=(32, 32), dtype=torch.float32))
    check(operands(1, 128, 128, 1, 1, groups=(128, 128)))
    assert {name: set(parameters) for name, parameters in seen.items()} == {
        name: set(parameters) for name, parameters in TUNABLE.items()
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dynamic_activations": True}, "W4A16 has"),
        ({"layout": "split"}, "layout = 'split'"),
        ({"act": "mish"}, "act = 'mish'"),
        ({"x": torch.zeros(3, 128, dtype=torch.float64)}, "x is torch.float64"),
        ({"b13": torch.zeros(3, 128, dtype=torch.float64)}, "b13 is torch.float64"),
        ({"w13": torch.zeros(3, 128, 64, dtype=torch.int8)}, "must be uint8"),
        ({"w13_zero": torch.zeros(3, 128, 2)}, "must be uint8"),
        ({"w2_scale": torch.zeros(3, 128, 2, dtype=torch.float64)}, "w2_scale is torch.float64"),
        ({"w2_scale": torch.zeros(3, 128, 4)}, "multiples of 32"),
        ({"w2_scale": torch.zeros(3, 128, 3)}, "multiples of 32"),
        ({"w13_zero": torch.zeros(3, 1, 2, dtype=torch.uint8)}, "w13_zero is [3, 1, 2], not [3, 128, 2]"),
        ({"w13": torch.zeros(3, 128, 32, dtype=torch.uint8)}, "w13 is [3, 128, 32], not [3, 128, 64]"),
        ({"b2": torch.zeros(3, 64)}, "b2 is [3, 64], not [3, 128]"),
        ({"w2": torch.zeros(3, 32, 128, dtype=torch.uint8).transpose(1, 2)}, "rows of w2"),
        ({"w2": torch.zeros(3, 128, 33, dtype=torch.uint8)[:, :, :32]}, "rows of w2"),
        ({"w2": torch.zeros(3, 128, 36, dtype=torch.uint8)[:, :, 1:33]}, "rows of w2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert experts_int4_refusal(**operands()) is None
    assert reason in str(experts_int4_refusal(**{**operands(), **changes}))


# --- On a GPU alone ---------------------------------------------------------------------------------------------------


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 1000])
@pytest.mark.parametrize("group", [32, 128])
def test_real_sizes_with_default_parameters(tokens: int, dtype: torch.dtype, group: int) -> None:
    check(operands(tokens, 2048, 768, 16, 4, groups=(group, group), zeros=group == 32, biases=True, dtype=dtype))


@gpu_only
@pytest.mark.parametrize("tokens", [2, 50])
def test_capture_in_a_cuda_graph(tokens: int) -> None:
    given = {name: on_device(value) for name, value in operands(tokens, 256, 128, 16, 4).items()}
    experts_int4(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts_int4(**given)
    given["ids"].copy_(given["ids"].flip(0))
    given["x"].normal_()
    graph.replay()
    torch.testing.assert_close(captured, experts_int4(**given), atol=0, rtol=0)
