"""``experts`` on the CPU target: the engine's ops, and Inductor's forms where there is no engine, in lowered graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import moe_fx.lowering.cpu as cpu
from moe_fx import _C
from moe_fx.capture import capture
from moe_fx.lowering.cpu import TARGET, engine, experts
from moe_fx.lowering.cpu.packing import PackedSpec, Packer
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.spec import Sample
from moe_fx.lowering.targets import canonical_name

OP = CANONICAL_OPS["experts"]
HALF = (torch.bfloat16, torch.float16)


def samples(dtype: torch.dtype, name: str = "experts") -> list[Sample]:
    return list(CANONICAL_OPS[name].samples(dtype, torch.Generator().manual_seed(0)))


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if moe_fx._C could not be imported."""
    monkeypatch.setattr(cpu, "load_engine", lambda: None)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("strangers", [False, True], ids=["", "ids out of range"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(experts.gathered, torch.bfloat16), (experts.gathered, torch.float32), (experts.grouped, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_form_equals_the_reference(form: Callable[..., torch.Tensor], dtype: torch.dtype, strangers: bool) -> None:
    for sample in samples(dtype):
        x, weights, ids, *projections = sample.args
        if strangers:
            ids = ids.clone()
            ids[0, 0], ids[-1, -1] = 99, -1
            ids[0, -1] = 1
        want = OP.reference(x, weights, ids, *projections, **sample.kwargs)
        got = form(x, weights, ids, *projections, **sample.kwargs)
        assert relative_error(got, want) < OP.tolerance[dtype].rel_l2, sample.name


def lowered(
    tokens: int,
    *,
    dynamic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    downstream: str = "inductor",
    transposed: bool = False,
) -> tuple[fx.GraphModule, str, float]:
    """An ``experts`` node of 8 experts and k = 2, lowered: the graph, its kernel's name and its error."""
    rng = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(*shape, generator=rng).to(dtype) * 0.1 for shape in ((8, 96, 64), (8, 64, 48)))
    if transposed:
        w13, w2 = (w.transpose(1, 2).contiguous() for w in (w13, w2))
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = capture(gm, inputs)
        (node,) = [n for n in graph.graph.nodes if canonical_name(n) == "experts"]
        kernel = TARGET.kernel_for(node, downstream)
        TARGET.lower(graph, downstream)
        found.extend((graph, kernel))
        return graph.forward

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.moe_fx.experts(x, weights, ids, w13, w2, transposed=transposed)

    x = torch.randn(tokens, 64, generator=rng).to(dtype)
    ids = torch.stack([torch.randperm(8, generator=rng)[:2] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, 2, generator=rng)
    with torch.no_grad():
        got = torch.compile(call, backend=backend, dynamic=dynamic)(x, weights, ids)
    return (*found, relative_error(got, call(x, weights, ids)))


@pytest.mark.parametrize(
    ("tokens", "dynamic", "kernel"),
    [(4, False, "inductor (gathered)"), (5, False, "inductor (grouped)"), (4, True, "inductor (grouped)")],
)
def test_without_the_engine_the_number_of_tokens_decides(
    tokens: int, dynamic: bool, kernel: str, no_engine: None
) -> None:
    graph, name, error = lowered(tokens, dynamic=dynamic)
    assert name == kernel
    assert not any(canonical_name(node) for node in graph.graph.nodes)
    assert error < OP.tolerance[torch.bfloat16].rel_l2


def test_what_grouped_mm_does_not_take_runs_the_reference() -> None:
    graph, name, error = lowered(40, dtype=torch.float32)
    assert name == "reference"
    assert any(canonical_name(node) == "experts" for node in graph.graph.nodes)
    assert error == 0


def test_without_the_engine_other_compilers_get_the_reference(no_engine: None) -> None:
    _, name, error = lowered(4, downstream="eager")
    assert (name, error) == ("reference", 0)


# --- The engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downstream", ["inductor", "eager"])
@pytest.mark.parametrize(("tokens", "dynamic"), [(4, False), (40, False), (4, True)])
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_half_precision_goes_to_the_engine(tokens: int, dynamic: bool, dtype: torch.dtype, downstream: str) -> None:
    graph, name, error = lowered(tokens, dynamic=dynamic, dtype=dtype, downstream=downstream)
    isa, threads = _C.engine_info()["isa"], torch.get_num_threads()
    assert name == f"engine ({'bf16' if dtype == torch.bfloat16 else 'fp16'}, {isa}, {threads} threads)"
    assert [n for n in graph.graph.nodes if n.target is torch.ops.moe_fx_cpu.experts.default]
    assert not any(canonical_name(node) for node in graph.graph.nodes)
    assert error < OP.tolerance[dtype].rel_l2


@pytest.mark.parametrize("difference", [{"dtype": torch.float32}, {"transposed": True}], ids=["fp32", "transposed"])
def test_what_the_engine_does_not_take_keeps_inductors_form(difference: dict[str, Any]) -> None:
    graph, name, _ = lowered(4, **difference)
    assert name == "inductor (gathered)"
    assert not any("moe_fx_cpu" in str(node.target) for node in graph.graph.nodes)
    assert lowered(4, downstream="eager", **difference)[1] == "reference"


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_engine_equals_the_reference(dtype: torch.dtype) -> None:
    for sample in samples(dtype):
        kwargs = dict(sample.kwargs)
        if kwargs.pop("transposed", False):
            continue
        got = torch.ops.moe_fx_cpu.experts(*sample.args, **kwargs)
        want = OP.reference(*sample.args, **sample.kwargs)
        assert relative_error(got, want) < OP.tolerance[dtype].rel_l2, sample.name


def test_engine_takes_biases_odd_strides_and_wide_ids() -> None:
    """Interleaved rows with biases, weights that are parts of larger tensors, x with gaps, int64 ids out of range."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * 0.2).bfloat16()

    x, weights = normal(5, 2, 64)[:, 0], torch.rand(5, 3, generator=rng).double()
    ids = torch.tensor([[0, 5, 2], [-1, 3, 8], [4, 1, 0], [2, 2**40, 3], [5, 4, 1]])
    w13, w2, b13, b2 = normal(6, 100, 80)[:, 2:98, 8:72], normal(6, 64, 56)[..., :48], normal(6, 96), normal(6, 64)
    attributes: dict[str, Any] = dict(layout="interleaved", act="swiglu_oai", limit=0.3, out_dtype=torch.float32)
    got = torch.ops.moe_fx_cpu.experts(x, weights, ids, w13, w2, b13, b2, **attributes)
    want = OP.reference(x, weights, ids, w13, w2, b13, b2, **attributes)
    assert relative_error(got, want) < OP.tolerance[torch.bfloat16].rel_l2


def test_engine_refuses_inputs_that_are_not_contiguous() -> None:
    x, weights, ids, w13, w2, *_ = samples(torch.bfloat16)[0].args
    with pytest.raises(ValueError, match="rows of contiguous inputs"):
        torch.ops.moe_fx_cpu.experts(x, weights, ids, w13.transpose(1, 2).contiguous().transpose(1, 2), w2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(w2=a["w2"][:, :, :40]), "w13 must be"),
        (lambda a: a.update(x=a["x"][:, :32]), "w13 must be"),
        (lambda a: a.update(ids=a["ids"][:2]), "one shape"),
        (lambda a: a.update(b2=torch.zeros(8, 60).bfloat16()), "b2 must be"),
        (lambda a: a.update(b13=torch.zeros(8, 96)), "b13 is torch.float32"),
    ],
    ids=["inter", "hidden", "tokens", "bias", "bias dtype"],
)
def test_engine_refuses_operands_that_do_not_fit(change: Callable[[dict[str, Any]], None], message: str) -> None:
    """It is given addresses: a size that is wrong would read beyond a tensor."""
    sample = next(s for s in samples(torch.bfloat16) if s.name == "silu-T3")
    operands = dict(zip(("x", "weights", "ids", "w13", "w2"), sample.args, strict=False))
    change(operands)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe_fx_cpu.experts(**operands)


def test_packed_experts_refuse_rows_of_another_width() -> None:
    packer = Packer(PackedSpec("int8", 2, 64, 32, True))
    weights, ids = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    assert torch.ops.moe_fx_cpu.experts_packed(torch.ones(3, 64), weights, ids, packer.packed).count_nonzero() == 0
    with pytest.raises(ValueError, match=r"x must be \[T, 64\] for these packed experts"):
        torch.ops.moe_fx_cpu.experts_packed(torch.ones(3, 32), weights, ids, packer.packed)
    with pytest.raises(ValueError):
        torch.ops.moe_fx_cpu.experts_packed(torch.ones(3, 64), weights, ids, torch.zeros(8192, dtype=torch.uint8))


def test_no_tokens_give_no_rows() -> None:
    x, weights, ids, w13, w2, *_ = samples(torch.bfloat16)[0].args
    assert torch.ops.moe_fx_cpu.experts(x[:0], weights[:0], ids[:0], w13, w2).shape == (0, 64)


@pytest.mark.parametrize("name", ["experts", "experts_int8", "experts_int4"])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.moe_fx_cpu, name).default
    for sample in samples(torch.bfloat16, name):
        if not sample.kwargs.get("transposed"):
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(op, sample.args, dict(sample.kwargs), test_utils=tests)


def test_a_model_weight_is_made_huge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(_C, "make_huge", lambda address, size: made.append(address) or True)
    x, weights, ids = torch.randn(2, 1024).bfloat16(), torch.rand(2, 1), torch.tensor([[0], [1]])
    w13, w2 = torch.randn(2, 768, 1024).bfloat16(), torch.randn(2, 1024, 384).bfloat16()
    copies = w13.clone(), w2.clone()
    for _ in range(3):
        torch.ops.moe_fx_cpu.experts(x, weights, ids, w13, w2)
    # w2 is smaller than a huge page.
    assert made == [w13.data_ptr()]
    assert torch.equal(w13, copies[0]) and torch.equal(w2, copies[1])
    monkeypatch.setenv("MOE_FX_HUGE_PAGES", "0")
    torch.ops.moe_fx_cpu.experts(x, weights, ids, *copies)
    assert len(made) == 1


def test_the_openmp_runtime_is_torchs() -> None:
    path = engine.openmp_library()
    assert path is not None and "omp" in path


# --- Quantised weights as plain tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["experts_int8", "experts_int4"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_quantised_ops_equal_their_references(name: str, dtype: torch.dtype) -> None:
    op = CANONICAL_OPS[name]
    for sample in samples(dtype, name):
        got = getattr(torch.ops.moe_fx_cpu, name)(*sample.args, **sample.kwargs)
        want = op.reference(*sample.args, **sample.kwargs)
        assert relative_error(got, want) < op.tolerance[dtype].rel_l2, sample.name


@pytest.mark.parametrize("layout", ["up_gate", "interleaved", "none"])
@pytest.mark.parametrize("name", ["experts_int8", "experts_int4"])
def test_quantised_ops_know_the_layouts(name: str, layout: str) -> None:
    op = CANONICAL_OPS[name]
    sample = next(s for s in samples(torch.float32, name) if not s.kwargs["dynamic_activations"])
    args: list[Any] = list(sample.args)
    if layout == "none":
        args[3], args[4] = args[3][:, :32], args[4][:, :32]
    rows = args[3].shape[1]
    biases = torch.randn(6, rows), torch.randn(6, 64)
    args += [None] * (9 - len(args)) if name == "experts_int4" else []
    args += biases
    want = op.reference(*args, layout=layout, act="relu")
    assert relative_error(getattr(torch.ops.moe_fx_cpu, name)(*args, layout=layout, act="relu"), want) < 1e-2
    # The same tensors read in another way are packed anew.
    if layout != "none":
        want = op.reference(*args, act="relu")
        assert relative_error(getattr(torch.ops.moe_fx_cpu, name)(*args, act="relu"), want) < 1e-2


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The packings that were made, weakly."""
    made: list[Any] = []
    pack = engine._pack

    def counting(*args: Any) -> torch.Tensor:
        packed = pack(*args)
        made.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(engine, "_pack", counting)
    return made


def test_weights_are_packed_once_and_freed_with_them(packings: list[Any]) -> None:
    args = list(samples(torch.float32, "experts_int8")[0].args)
    run = torch.ops.moe_fx_cpu.experts_int8
    first = run(*args)
    assert torch.equal(run(*args), first) and len(packings) == 1
    args[4] = args[4] * 2  # another scale
    assert not torch.equal(run(*args), first) and len(packings) == 2
    args[5].zero_()  # the down projection, written in place
    assert run(*args).count_nonzero() == 0 and len(packings) == 3
    del args
    gc.collect()
    assert [packed() for packed in packings] == [None] * 3


def lowered_int8(call: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[str, list[str]]:
    """Kernel of the one ``experts_int8`` that ``call`` makes, and the targets of the lowered graph."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = capture(gm, inputs)
        (node,) = [n for n in graph.graph.nodes if canonical_name(n) == "experts_int8"]
        found.append(TARGET.kernel_for(node, "eager"))
        TARGET.lower(graph, "eager")
        found.append([str(n.target) for n in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, backend=backend)(*tensors), call(*tensors), rtol=0.1, atol=0.02)
    return found[0], found[1]


def test_quantised_nodes_go_to_the_engine() -> None:
    sample = next(s for s in samples(torch.bfloat16, "experts_int8") if s.kwargs["dynamic_activations"])
    kernel, targets = lowered_int8(lambda *a: torch.ops.moe_fx.experts_int8(*a, dynamic_activations=True), *sample.args)
    isa, threads = _C.engine_info()["isa"], torch.get_num_threads()
    assert kernel == f"engine (int8, int8 activations, {isa}, {threads} threads)"
    assert "moe_fx_cpu.experts_int8.default" in targets


def test_weights_that_the_graph_computes_are_not_packed() -> None:
    """They would be packed in every call."""
    x, weights, ids, w13, *rest = samples(torch.bfloat16, "experts_int8")[0].args
    kernel, targets = lowered_int8(
        lambda x, weights, ids, w13, *rest: torch.ops.moe_fx.experts_int8(x, weights, ids, w13 // 2, *rest),
        x, weights, ids, w13, *rest,
    )  # fmt: skip
    assert kernel == "reference"
    assert not any("moe_fx_cpu" in target for target in targets)


# --- Inductor's forms -------------------------------------------------------------------------------------------------


def test_inductor_never_stores_gathered_weights() -> None:
    """The point of the gathered form: weights are read in place inside one reduction."""
    from torch._inductor.utils import run_and_get_code

    sample = next(s for s in samples(torch.bfloat16) if s.name == "silu-T3")
    compiled = torch.compile(lambda *args: experts.gathered(*args), dynamic=False)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *sample.args)
    assert "bmm" not in code
    pairs, inter, hidden = 6, 48, 64
    assert f"({pairs}, {2 * inter}, {hidden})" not in code
    assert f"({pairs}, {hidden}, {inter})" not in code
