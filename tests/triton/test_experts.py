"""The kernels of fused experts on dense weights, for few tokens and for many, against the canonical ``experts``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, AscendForm, assert_close_to_reference, gpu_only, on_device
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_fx.lowering.cuda import configs, expert_plan
from moe_fx.lowering.cuda import experts as launcher
from moe_fx.lowering.cuda.experts import TUNABLE, experts, experts_refusal
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.experts import LAYOUTS

PATHS = ("pairs", "grouped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Small enough for several blocks along every dimension, large enough for the interpreter.
BLOCKS = {
    "experts_gate_up_pairs": {"BLOCK_N": 16, "BLOCK_K": 32},
    "experts_down_rows_pairs": {"ROWS": 2, "AHEAD": 1},
    "experts_down_pairs": {"BLOCK_S": 2, "BLOCK_N": 32, "BLOCK_K": 32},
    "experts_tiles": {"BLOCK_M": 16},
    "experts_gate_up_tiles": {"BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2},
    "experts_down_tiles": {"BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on both paths, whatever the number of tokens."""
    with configs.forced({**BLOCKS, "experts": {"PAIRS": 10**6 if request.param == "pairs" else 0}}):
        yield request.param


def samples() -> list[Any]:
    found = []
    for dtype in DTYPES:
        for sample in CANONICAL_OPS["experts"].samples(dtype, torch.Generator().manual_seed(0)):
            # The activations are those of the other dtypes: once is enough for the slowest to interpret.
            if dtype == torch.bfloat16 or sample.args[0].shape[0] == 3:
                found.append(pytest.param(sample, id=f"{str(dtype)[6:]}-{sample.name}"))
    return found


@pytest.mark.parametrize("sample", samples())
def test_canonical_samples(sample: Any, path: str) -> None:
    with configs.forced({"experts_gate_up_pairs": {"BLOCK_N": 64, "BLOCK_K": 64}} if len(sample.args[0]) > 3 else {}):
        assert_close_to_reference("experts", experts, sample.args, sample.kwargs)


def operands(
    tokens: int = 5,
    hidden: int = 48,
    inter: int = 40,
    n_experts: int = 4,
    top_k: int = 2,
    *,
    layout: str = "gate_up",
    transposed: bool = False,
    biases: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    weights_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of ``experts`` by name."""
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * std).to(dtype)

    def matrix(n: int, k: int) -> torch.Tensor:
        return normal(n_experts, *((k, n) if transposed else (n, k)), std=k**-0.5)

    rows = inter if layout in ("split", "none") else 2 * inter
    ids = torch.stack([torch.randperm(n_experts, generator=rng)[:top_k] for _ in range(tokens)])
    return {
        "x": normal(tokens, hidden),
        "weights": torch.rand(tokens, top_k, generator=rng).to(weights_dtype),
        "ids": ids.to(torch.int32),
        "w13": matrix(rows, hidden),
        "w2": matrix(hidden, inter),
        "b13": normal(n_experts, rows) if biases else None,
        "b2": normal(n_experts, hidden) if biases else None,
        "w3": matrix(rows, hidden) if layout == "split" else None,
        "b3": normal(n_experts, rows) if biases and layout == "split" else None,
        "layout": layout,
        "transposed": transposed,
    }


def check(given: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Compare with the reference; the operands may be changed by name."""
    given = {**given, **kwargs}
    names = ("x", "weights", "ids", "w13", "w2", "b13", "b2", "w3", "b3")
    args = tuple(given.pop(name) for name in names)
    (y,) = assert_close_to_reference("experts", experts, args, given)
    return y


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, transposed: bool, biases: bool, path: str) -> None:
    act = {"gate_up": "gelu", "none": "sigmoid"}.get(layout, "silu")
    check(operands(layout=layout, transposed=transposed, biases=biases), act=act)


@pytest.mark.parametrize("alone", ["b13", "b2", "b3"])
def test_one_bias_of_several(alone: str, path: str) -> None:
    given = operands(layout="split", biases=True)
    check(given, **{name: None for name in ("b13", "b2", "b3") if name != alone})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_any_strides(layout: str, transposed: bool, path: str) -> None:
    """What matters is how weights lie in memory, not whether the model calls that transposed."""
    given = operands(layout=layout, transposed=transposed, dtype=torch.float32)
    for name in ("w13", "w2", "w3"):
        if given[name] is not None:
            given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_larger_weights(dtype: torch.dtype, path: str) -> None:
    given = operands(dtype=dtype)
    for name in ("w13", "w2"):
        wider = torch.cat([torch.full_like(given[name], float("nan"))] * 2 + [given[name]], dim=2)
        given[name] = wider[:, :, -given[name].shape[2] :]
    check(given)


@pytest.mark.parametrize(("hidden", "inter"), [(37, 23), (16, 1), (1, 16), (130, 3)])
@pytest.mark.parametrize("layout", ["gate_up", "interleaved", "none"])
def test_odd_sizes(hidden: int, inter: int, layout: str, path: str) -> None:
    check(operands(3, hidden, inter, layout=layout, transposed=layout == "interleaved", biases=True))


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_top_k(top_k: int, path: str) -> None:
    check(operands(n_experts=6, top_k=top_k))


def test_one_expert(path: str) -> None:
    check(operands(n_experts=1, top_k=1))


def test_expert_with_most_tokens(path: str) -> None:
    """More rows than a tile has, beside an expert with one."""
    given = operands(40, 16, 16, 3, 1)
    given["ids"][:] = 2
    given["ids"][7] = 0
    check(given)


def test_no_tokens(path: str) -> None:
    y = check(operands(1), x=torch.empty(0, 48), weights=torch.empty(0, 2), ids=torch.empty(0, 2, dtype=torch.int32))
    assert y.shape == (0, 48)


def test_one_expert_twice_for_a_token(path: str) -> None:
    given = operands()
    given["ids"][2] = 1
    check(given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_are_no_expert(dtype: torch.dtype, transposed: bool, path: str) -> None:
    """They contribute nothing, not even a weight of NaN; a token may have none at all."""
    given = operands(transposed=transposed, biases=True)
    ids = given["ids"].to(dtype)
    ids[0, 0], ids[1, 1], ids[4] = -1, 4, -(2**31)
    if dtype == torch.int64:
        # Of the low 32 bits these are experts.
        ids[3, 0], ids[3, 1] = 2**32, 2**40 + 1
    given["ids"] = ids
    want = CANONICAL_OPS["experts"].reference(**{**given, "act": "silu"})
    invalid = (ids < 0) | (ids >= 4)
    given["weights"][invalid] = float("nan")
    y = experts(**{name: on_device(value) for name, value in given.items()})
    torch.testing.assert_close(y.cpu(), want, atol=5e-2, rtol=5e-2)
    assert (y[4] == 0).all()


def test_int64_ids(path: str) -> None:
    given = operands()
    check(given, ids=given["ids"].to(torch.int64))


def test_nan_stays_with_its_token(path: str) -> None:
    given = operands()
    given["x"][3, 5] = float("nan")
    y = check(given)
    assert torch.isnan(y[3]).all() and torch.isfinite(y[[0, 1, 2, 4]]).all()


def test_strided_activations(path: str) -> None:
    given = operands()
    check(given, x=torch.stack([given["x"]] * 2, dim=2)[:, :, 0])
    check(given, x=torch.cat([given["x"]] * 2, dim=1)[:, 48:])
    check(given, x=given["x"].t().contiguous().t())
    check(given, weights=given["weights"].t().contiguous().t(), ids=given["ids"].t().contiguous().t())


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_weights_and_result(
    weights_dtype: torch.dtype, out_dtype: torch.dtype | None, weight_on: str, path: str
) -> None:
    check(operands(3, weights_dtype=weights_dtype), weight_on=weight_on, out_dtype=out_dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rounded_where_the_reference_rounds(transposed: bool, path: str) -> None:
    """Without an activation to approximate, both give the same bits: sums of small whole numbers are exact."""
    given = operands(3, 16, 16, layout="none", transposed=transposed, biases=True)
    rng = torch.Generator().manual_seed(2)
    for name in ("x", "w13", "w2", "b13", "b2"):
        given[name] = torch.randint(-40, 41, given[name].shape, generator=rng).to(torch.bfloat16)
    given["weights"] = (torch.randint(1, 9, given["weights"].shape, generator=rng) / 8).to(torch.bfloat16)
    want = CANONICAL_OPS["experts"].reference(**given, act="relu")
    y = experts(**{name: on_device(value) for name, value in given.items()}, act="relu")
    assert torch.equal(y.cpu(), want)


@pytest.mark.parametrize(("rows", "ahead"), [(1, 1), (2, 2), (4, 3), (8, 6), (16, 9)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_whole_rows_of_the_down_projection(top_k: int, rows: int, ahead: int) -> None:
    """Several steps to a row, the last in part; rows beyond the last one, slots beyond k, ids of no expert."""
    given = operands(3, hidden=45, inter=300, top_k=top_k, biases=True, weights_dtype=torch.bfloat16)
    given["ids"][0, 0], given["ids"][2] = -1, 4
    forced = {
        "experts": {"PAIRS": 10**6},
        "experts_gate_up_pairs": {"BLOCK_N": 64, "BLOCK_K": 64},
        "experts_down_rows_pairs": {"ROWS": rows, "AHEAD": ahead},
    }
    with configs.forced(forced), configs.recorded() as used:
        check(given)
    assert "experts_down_rows_pairs" in used


@pytest.mark.parametrize(("inter", "whole"), [(768, True), (1536, True), (1600, False)])
def test_long_rows_are_read_in_blocks(inter: int, whole: bool) -> None:
    given = operands(1, hidden=3, inter=inter, n_experts=9, top_k=8)
    pairs = {"experts": {"PAIRS": 10**6}, "experts_gate_up_pairs": {"BLOCK_N": 512, "BLOCK_K": 16}}
    with configs.forced(pairs), configs.recorded() as used:
        check(given)
    assert ("experts_down_rows_pairs" in used, "experts_down_pairs" in used) == (whole, not whole)


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not use these forms")
@pytest.mark.parametrize("layout", ["gate_up", "interleaved"])
def test_forms_for_ascend(layout: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the NPU's compilers take computes the same; its ids are int32, and some are no expert."""
    for module, names in (
        (launcher, ("gate_up_pairs_kernel", "down_pairs_kernel", "gate_up_tiles_kernel", "down_tiles_kernel")),
        (expert_plan, ("place_pairs_kernel", "count_pairs_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, AscendForm(getattr(module, name)))
    monkeypatch.setattr(launcher, "_ROW_REGISTERS", 0)
    monkeypatch.setattr(expert_plan, "COUNTED_AT_ONCE", 8 if layout == "gate_up" else 10**6)
    given = operands(hidden=40, layout=layout, transposed=layout == "interleaved", biases=True)
    given["ids"][0, 1], given["ids"][3, 0] = 4, -1
    check(given)
    check(given, weight_on="input")


# --- Sorting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted_at_once", [0, 10**6])
@pytest.mark.parametrize(("n_pairs", "n_experts", "block_m"), [(1, 1, 16), (33, 5, 4), (300, 7, 16), (64, 512, 16)])
def test_sort_pairs(
    n_pairs: int, n_experts: int, block_m: int, counted_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_plan, "COUNTED_AT_ONCE", counted_at_once)
    ids = torch.randint(-2, n_experts + 2, (n_pairs, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with configs.forced({"expert_tiles": {"BLOCK_P": 64}}):
        sorted_ = expert_plan.sort_pairs(ids.to(DEVICE), n_experts, block_m)
    order, tiles = sorted_.order.cpu(), sorted_.tiles.cpu()
    n_tiles = int(tiles[0])
    assert n_tiles <= sorted_.max_tiles
    expert, first, end = tiles[1:].view(3, sorted_.max_tiles)[:, :n_tiles]

    valid = ((ids >= 0) & (ids < n_experts)).flatten()
    pairs = torch.arange(n_pairs)[valid]
    by_expert, place = torch.sort(ids.flatten()[valid], stable=True)
    assert torch.equal(order[: len(pairs)].long(), pairs[place])
    rows = [(int(e), row) for e, a, b in zip(expert, first, end, strict=True) for row in range(a, b)]
    assert rows == [(int(e), row) for row, e in enumerate(by_expert)]
    assert ((end - first > 0) & (end - first <= block_m)).all()
    full = [int(b - a) == block_m for a, b in zip(first, end, strict=True)]
    same = [expert[i] == expert[i + 1] for i in range(n_tiles - 1)]
    assert all(full[i] for i, goes_on in enumerate(same) if goes_on)


def test_number_of_tiles_has_room_for_the_worst_ids() -> None:
    """One pair in each expert but the first, which has all others: the most tiles there can be."""
    ids = torch.tensor([*range(1, 8), *[0] * 33], dtype=torch.int32).view(-1, 1)
    tiles = expert_plan.sort_pairs(ids.to(DEVICE), 8, 16)
    assert int(tiles.tiles[0]) == 10 == tiles.max_tiles


def test_many_pairs_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_plan, "COUNTED_AT_ONCE", 8)
    with configs.forced({**BLOCKS, "experts": {"PAIRS": 0}}):
        check(operands(9))


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
    for tokens in (2, 33, 120):
        check(operands(tokens, 16, 16, 2, 1, transposed=tokens == 2))
    for tokens in (2, 33):
        check(operands(tokens, 16, 16, 2, 1, dtype=torch.float32))
    assert {name: set(parameters) for name, parameters in seen.items()} == {
        name: set(parameters) for name, parameters in TUNABLE.items()
    }


def test_few_pairs_take_the_path_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(expert_plan, "sort_pairs", unexpected)
    with configs.forced(BLOCKS):
        check(operands(4))
        with pytest.raises(AssertionError, match="sorted"):
            check(operands(17))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": "other"}, "layout = 'other'"),
        ({"weight_on": "both"}, "weight_on = 'both'"),
        ({"act": "mish"}, "act = 'mish'"),
        ({"act": "silu_then_clamp"}, "needs a limit"),
        ({"act": "swiglu_oai", "layout": "none"}, "'swiglu_oai' has no kernel without an up projection"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64"),
        ({"x": torch.zeros(5, 48, dtype=torch.float64)}, "w13 is torch.bfloat16, but x is torch.float64"),
        ({"weights": torch.zeros(5, 2, dtype=torch.float64)}, "weights is torch.float64"),
        ({"ids": torch.zeros(5, 2, dtype=torch.int16)}, "ids are torch.int16"),
        ({"b2": torch.zeros(4, 48)}, "b2 is torch.float32"),
        ({"layout": "split"}, "'split' and w3"),
        ({"ids": torch.zeros(5, 40, dtype=torch.int32)}, "k = 40 is not between 1 and 32"),
        ({"w13": torch.zeros(1).bfloat16().expand(513, 80, 48)}, "513 experts are more than 512"),
        ({"w2": torch.empty_strided((4, 48, 40), (1, 2**26, 1), dtype=torch.bfloat16, device="meta")}, "of w2 spans"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    given = {"act": "silu", **operands(), **changes}
    assert reason in str(experts_refusal(**given))


def test_a_case_with_symbolic_tokens_is_taken_without_guards() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    from torch._dynamo.source import ConstantSource

    given = operands()
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor):
            dims = [
                DimDynamic.DUCK if name in ("x", "weights", "ids") and i == 0 else DimDynamic.STATIC
                for i in range(tensor.dim())
            ]
            context = StatelessSymbolicContext(dynamic_sizes=dims)
            given[name] = mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))
    assert experts_refusal(**given) is None
    assert env.guards == []


# --- On a GPU alone ---------------------------------------------------------------------------------------------------


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 1000])
@pytest.mark.parametrize(("layout", "transposed"), [("gate_up", False), ("interleaved", True)])
def test_real_sizes_with_default_parameters(tokens: int, dtype: torch.dtype, layout: str, transposed: bool) -> None:
    check(operands(tokens, 2880, 768, 16, 4, layout=layout, transposed=transposed, biases=True, dtype=dtype))


@gpu_only
def test_more_elements_than_32_bits_count() -> None:
    given = operands(40000, 256, 256, 8, 8)
    x = on_device(given["x"]).expand(-1, -1)
    wide = torch.zeros(40000, 2**16, dtype=torch.bfloat16, device=DEVICE)
    wide[:, -256:] = x
    check(given, x=wide[:, -256:])


@gpu_only
@pytest.mark.parametrize("tokens", [2, 50])
def test_capture_in_a_cuda_graph(tokens: int) -> None:
    given = {name: on_device(value) for name, value in operands(tokens, 256, 128, 16, 4).items()}
    experts(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(**given)
    given["ids"].copy_(given["ids"].flip(0))
    given["x"].normal_()
    graph.replay()
    torch.testing.assert_close(captured, experts(**given), atol=0, rtol=0)
