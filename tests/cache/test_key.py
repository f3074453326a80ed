"""The key: equal for equal work, and each thing that a result depends on, changed alone, misses and is named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moe_blocks as blocks
import pytest
import torch
from compiling import compile_with_report
from moe_blocks import Block, H
from torch import nn

import moe_fx
from moe_fx import downstream
from moe_fx.cache import environment, key, sources
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_identity import tensor_bytes
from moe_fx.options import Options
from moe_fx.passes import PIPELINE, Pass

GIVEN = 3


class Model(nn.Module):
    """A MoE block and what a key must see besides: an attribute, a constant that is baked in."""

    def __init__(self, scale: float = 2.0, constant: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.block = Block(blocks.batched)
        self.block.weights.to(dtype)
        self.scale, self.constant = scale, constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.scale + torch.tensor(self.constant)


class Edited(Model):
    """The same model after an edit of the method's body."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.scale - torch.tensor(self.constant)


class Watch(Pass):
    """A user's pass that changes nothing."""

    name = "watch"

    def __init__(self, limit: int = 1) -> None:
        self.limit = limit

    def run(self, ctx: Any) -> None:
        """Do nothing."""


def outcome(model: nn.Module | None = None, tokens: int = 6, dynamic: bool = False, **options: Any) -> str:
    """What the cache says to a compilation that starts from nothing."""
    torch._dynamo.reset()
    compiled = compile_with_report(model or Model(), dynamic=dynamic, **options)
    compiled(torch.randn(tokens, H, dtype=(model or Model()).block.weights.gate.dtype))
    (report,) = compiled.reports
    return report.cache


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    assert outcome(cache_dir=str(folder)) == "miss: the cache is empty"
    return folder


@pytest.fixture
def warm(cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a cache with the entry of ``Model()``, which the environment names."""
    shutil.copytree(cold, tmp_path / "cache")
    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_equal_work_hits(warm: Path) -> None:
    assert outcome() == "hit"
    assert outcome(Model()) == "hit"


def test_what_is_not_part_of_the_result_does_not_miss(warm: Path, tmp_path: Path) -> None:
    assert outcome(check_dir=str(tmp_path), cache_max_mib=7) == "hit"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Edited(), id="edited method"),
        pytest.param(lambda: Model(scale=3.0), id="attribute"),
        pytest.param(lambda: Model(constant=2.0), id="constant"),
        pytest.param(lambda: Model(dtype=torch.float64), id="dtype"),
    ],
)
def test_another_model_misses(warm: Path, model: Callable[[], nn.Module]) -> None:
    assert outcome(model()) == "miss: no entry for this graph"
    assert outcome(model()) == "hit"
    assert outcome() == "hit"


def test_another_size_misses(warm: Path) -> None:
    assert outcome(tokens=7) == "miss: no entry for this graph"


def test_symbolic_sizes_miss_and_then_serve_all_sizes(warm: Path) -> None:
    assert outcome(dynamic=True) == "miss: no entry for this graph"
    assert outcome(dynamic=True, tokens=9) == "hit"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(level="bitwise"), "options"),
        (dict(strict=True), "options"),
        (dict(passes={"swiglu": True}), "options"),
        (dict(passes={"swiglu": False}), "options, plan"),
        (dict(target="cpu"), "options"),
        (dict(downstream="aot_eager"), "options, target"),
        (dict(extra_passes=[Watch()]), "extra passes"),
    ],
    ids=str,
)
def test_another_option_misses(warm: Path, options: dict[str, Any], named: str) -> None:
    assert outcome(**options) == f"miss: {named} changed"
    assert outcome(**options) == "hit"


# --- One row for each thing outside the graph and the options. Each is (component that is named, change). ------------


@contextlib.contextmanager
def _set(function: Callable[[Any], None], before: Any, after: Any) -> Iterator[None]:
    function(after)
    try:
        yield
    finally:
        function(before)


def _patch(target: Any, name: str, value: Any) -> Callable[[], Any]:
    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            yield

    return change


def _edited_source(name: str) -> Callable[[], Any]:
    """One file of moe-fx with other contents, as another process would find it."""
    assert name in sources.file_digests()
    edited = {**sources.file_digests(), name: "edited"}
    return _patch(sources, "file_digests", lambda: edited)


def _release(distribution: str) -> Callable[[], Any]:
    real = importlib.metadata.version
    return _patch(importlib.metadata, "version", lambda name: "99.0" if name == distribution else real(name))


def _variable(name: str, value: str) -> Callable[[], Any]:
    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            yield

    return change


def _ranks(size: int, rank: int) -> Callable[[], Any]:
    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_backend", lambda: "gloo")
            patch.setattr(torch.distributed, "get_world_size", lambda: size)
            patch.setattr(torch.distributed, "get_rank", lambda: rank)
            yield

    return change


def _gpu(name: str) -> Callable[[], Any]:
    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(key, "device_types", lambda gm: ["cpu", "cuda"])
            patch.setattr(environment, "_gpus", lambda: [[name, 9, 0]])
            yield

    return change


CHANGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "source of a pass": ("sources", _edited_source("moe_fx.passes/match/router.py")),
    "source of a helper of passes": ("sources", _edited_source("moe_fx.passes/graph.py")),
    "source of a canonical op": ("sources", _edited_source("moe_fx.lowering/ops/route.py")),
    "source of a lowering": ("sources", _edited_source("moe_fx.lowering/cpu/experts.py")),
    "source of the pipeline": ("sources", _edited_source("moe_fx/pipeline.py")),
    "compiled kernels": ("sources", _edited_source("moe_fx._C")),
    "plan": ("plan", _patch(PIPELINE[2], "identity", lambda self: "another")),
    "decomposition": ("decompositions", _patch(downstream, "decompositions", lambda name: {"aten.mul": torch.mul})),
    "torch": ("versions", _patch(torch, "__version__", "2.99.0")),
    "torch's commit": ("versions", _patch(torch.version, "git_version", "another")),
    "moe-fx": ("versions", _patch(environment, "__version__", "99.0")),
    "triton": ("versions", _release("triton")),
    "triton-ascend": ("versions", _release("triton-ascend")),
    "torch_npu": ("versions", _release("torch-npu")),
    "Python": ("versions", _patch(environment.platform, "python_version", lambda: "3.99.0")),
    "CUDA": ("versions", _patch(torch.version, "cuda", "99.0")),
    "CPU capability": ("hardware", _patch(torch.backends.cpu, "get_cpu_capability", lambda: "another")),
    "engine": ("hardware", _patch(environment, "_engine", lambda: {"isa": "another"})),
    "threads": ("hardware", _patch(torch, "get_num_threads", lambda: 63)),
    "GPU": ("hardware", _gpu("another GPU")),
    "machine": ("hardware", _patch(environment.platform, "machine", lambda: "another")),
    "world": ("ranks", _ranks(2, 0)),
    "kernels' variable": ("variables", _variable("MOE_FX_SOMETHING", "1")),
    "Triton's interpreter": ("variables", _variable("TRITON_INTERPRET", "another")),
    "default dtype": ("modes", lambda: _set(torch.set_default_dtype, torch.float32, torch.float64)),
    "deterministic": ("modes", lambda: _set(torch.use_deterministic_algorithms, False, True)),
    "matmul precision": ("modes", lambda: _set(torch.set_float32_matmul_precision, "highest", "high")),
    "export's settings": ("modes", lambda: torch._functorch.config.patch(debug_assert=True)),
    "autocast": ("modes", lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "autocast's dtype": ("modes", lambda: torch.autocast("cpu", dtype=torch.float16)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_misses_and_is_named(warm: Path, name: str) -> None:
    component, change = CHANGES[name]
    with change():
        assert outcome() == f"miss: {component} changed"
        assert outcome() == "hit"


def test_the_two_autocast_dtypes_and_the_two_ranks_do_not_meet(warm: Path) -> None:
    for component, first, second in (
        ("modes", CHANGES["autocast"][1], CHANGES["autocast's dtype"][1]),
        ("ranks", _ranks(2, 0), _ranks(2, 1)),
        ("ranks", _ranks(2, 0), _ranks(4, 0)),
        ("hardware", _gpu("one"), _gpu("another")),
    ):
        with first():
            outcome()
        with second():
            assert outcome() == f"miss: {component} changed"


def test_an_own_pass_is_known_by_source_and_state(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(extra_passes=[Watch(1)]) == "miss: extra passes changed"
    assert outcome(extra_passes=[Watch(2)]) == "miss: extra passes changed"
    assert outcome(extra_passes=[Watch(1)]) == "hit"
    monkeypatch.setattr(Watch, "identity", lambda self: "edited")
    assert outcome(extra_passes=[Watch(1)]) == "miss: extra passes changed"


class Slotted(Pass):
    """A user's pass with its setting outside ``__dict__``."""

    name = "watch"
    __slots__ = ("limit",)

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def run(self, ctx: Any) -> None:
        """Do nothing."""


def _enclosing(limit: int) -> Pass:
    class Enclosing(Watch):
        def run(self, ctx: Any) -> None:
            assert limit

    return Enclosing()


def _with_class_attribute(limit: int) -> Pass:
    Watch.default = limit  # type: ignore[attr-defined]
    return Watch()


def _with_a_patched_method(limit: int) -> Pass:
    one, two = (lambda self, ctx: 1), (lambda self, ctx: 2)
    Watch.run = (one, two)[limit - 1]  # type: ignore[method-assign]
    return Watch()


@pytest.mark.parametrize(
    "make", [Slotted, _enclosing, _with_class_attribute, _with_a_patched_method], ids=lambda make: make.__name__
)
def test_what_an_own_pass_holds_besides_its_source_takes_part(
    warm: Path, make: Callable[[int], Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "run", Watch.run)
    monkeypatch.setattr(Watch, "default", 0, raising=False)
    assert outcome(extra_passes=[make(1)]) == "miss: extra passes changed"
    assert outcome(extra_passes=[make(1)]) == "hit"
    assert outcome(extra_passes=[make(2)]) == "miss: extra passes changed"


def test_an_own_pass_that_was_edited_under_the_process_is_not_cached(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "moe_fx_edited_pass.py"
    path.write_text("from moe_fx import Pass\nclass Mine(Pass):\n    name = 'mine'\n    def run(self, ctx): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module(path.stem).Mine()
    said = "off: moe_fx_edited_pass, the module of the pass 'mine', changed while this process runs"
    assert outcome(extra_passes=[mine]) == said


def test_a_pass_with_state_that_cannot_be_compared_is_not_cached(warm: Path) -> None:
    stateful = Watch(limit=lambda: 3)  # type: ignore[arg-type]
    assert (
        outcome(extra_passes=[stateful])
        == "off: limit of the pass 'watch' is a function, whose changes the key would not show"
    )


def test_a_pass_without_source_is_not_cached(warm: Path) -> None:
    namespace: dict[str, Any] = {"Pass": Pass, "__name__": "no_such_module"}
    exec("class Typed(Pass):\n    name = 'typed'\n    def run(self, ctx):\n        pass\n", namespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "no_such_module", SimpleNamespace())
        said = outcome(extra_passes=[namespace["Typed"]()])
    assert said == "off: the pass 'typed' has no source file; override its identity()"


# --- What the table above cannot reach with a graph on the CPU --------------------------------------------------------


def _graph(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> torch.fx.GraphModule:
    found = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=keep, dynamic=dynamic)(*args)
    return found[0]


def _components(**changes: Any) -> dict[str, str]:
    given: dict[str, Any] = dict(
        target="cpu", downstream="inductor", mode=None, sizes="", decompositions={}, passes=[], options=Options()
    )
    given.update(changes)
    gm = given.pop("gm", None) or _graph(lambda x: x + 1, torch.ones(2))
    return key.compile_components(gm, given.pop("options"), **given)


def _different(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def test_mode_sizes_and_downstream_options_take_part() -> None:
    plain = _components()
    assert _different(plain, _components()) == []
    assert _different(plain, _components(mode="max-autotune")) == ["target"]
    assert _different(plain, _components(sizes="s0 in [2, 8]")) == ["sizes"]
    patched = Options.from_user({"downstream_options": {"max_autotune": True}})
    assert _different(plain, _components(options=patched)) == ["options"]
    with pytest.raises(Uncacheable, match="post_grad_custom_pre_pass is a function, whose changes"):
        _components(options=Options.from_user({"downstream_options": {"post_grad_custom_pre_pass": _graph}}))


def test_every_option_takes_part_or_is_known_not_to() -> None:
    others: dict[str, Any] = {
        "target": "cuda",
        "downstream": "eager",
        "passes": {"router": False},
        "level": "bitwise",
        "strict": True,
        "check": True,
        "extra_passes": [Watch()],
        "downstream_options": {"a": 1},
    }
    plain = _components()
    for name in (f.name for f in Options.__dataclass_fields__.values()):
        default = getattr(Options(), name)
        if name in key._NOT_IN_KEY:
            continue
        if name in others:
            other = others[name]
        else:
            choices = [c for c in Options.__dataclass_fields__[name].metadata["choices"] if c != default]
            is_count = isinstance(default, int) and not isinstance(default, bool)
            other = choices[0] if choices else default + 1 if is_count else (not default)
        changed = _different(plain, _components(options=Options.from_user({name: other})))
        assert changed == (["extra passes"] if name == "extra_passes" else ["options"]), name


def test_cann_and_npu_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(get_cann_version=lambda: "9.1")
    npu = SimpleNamespace(utils=utils, get_device_name=lambda: "Ascend910B")
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu))
    versions, hardware = environment.versions("ascend"), environment.hardware("ascend", ["npu"])
    utils.get_cann_version = lambda: "9.2"
    assert environment.versions("ascend") != versions
    assert environment.hardware("ascend", ["npu"]) == hardware
    npu.get_device_name = lambda: "Ascend310P"
    assert environment.hardware("ascend", ["npu"]) != hardware


def test_a_kernel_library_of_its_own_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libkernels.so"
    library.write_bytes(b"one")
    monkeypatch.setenv("MOE_FX_ASCENDC_LIBRARY", str(library))
    assert dict(sources.files())["libkernels.so"] == library


def test_an_edit_of_a_source_file_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pass.py"
    monkeypatch.setattr(sources, "files", lambda: iter([("pass.py", path)]))
    path.write_text("one")
    before = sources.file_digests.__wrapped__()
    path.write_text("two")
    after = sources.file_digests.__wrapped__()
    assert list(before) == list(after) == ["pass.py"] and before != after


def test_gpus_are_known_by_model_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    seen = [environment.hardware("cuda", ["cuda"])["cuda"]]
    for name, other in (("name", "H200"), ("minor", 1), ("multi_processor_count", 114), ("total_memory", 96 << 30)):
        setattr(gpu, name, other)
        seen.append(environment.hardware("cuda", ["cuda"])["cuda"])
    assert len({str(item) for item in seen}) == len(seen)


def test_a_decomposition_counts_by_op_function_and_source() -> None:
    def one(x: Any) -> Any:
        return x

    def two(x: Any) -> Any:
        return x + 1

    two.__qualname__ = one.__qualname__
    tables = [{}, {"a": one}, {"b": one}, {"a": two}, {"a": one, "b": one}]
    assert len({environment.decompositions(table) for table in tables}) == 5
    assert environment.decompositions({"a": one, "b": two}) == environment.decompositions({"b": two, "a": one})


def test_a_decomposition_counts_by_what_it_holds() -> None:
    def times(factor: int) -> Callable[[Any], Any]:
        return lambda x: x * factor

    def decorated(factor: int) -> Callable[[Any], Any]:
        inner, kind = times(factor), torch.Tensor

        @functools.wraps(inner)
        def wrapper(x: Any) -> Any:
            return inner(x) if isinstance(x, kind) else wrapper(torch.tensor(x))

        return wrapper

    def given(x: Any, factor: int = GIVEN) -> Any:
        return x * factor

    def beside(x: Any) -> Any:
        return x * GIVEN

    def typed(text: str) -> Callable[..., Any]:
        namespace: dict[str, Any] = {}
        exec(f"def function(x):\n    return {text}", namespace)
        function: Callable[..., Any] = namespace["function"]
        return function

    def digest(function: Any) -> str:
        return environment.decompositions({"a": function})

    pairs = [
        (typed("x + 1"), typed("x + 2")),
        (typed("[y + 1 for y in x]"), typed("[y + 2 for y in x]")),
        (typed("x in {'a', 'b'}"), typed("x in {'a', 'c'}")),
        (typed("x.sin()"), typed("x.cos()")),
        (times(1), times(2)),
        (decorated(1), decorated(2)),
        (functools.partial(given, factor=1), functools.partial(given, factor=2)),
        (functools.partial(torch.add, 1), functools.partial(torch.add, 2)),
        (functools.partial(torch.add, 1), functools.partial(torch.mul, 1)),
    ]
    assert all(digest(one) != digest(other) for one, other in pairs)
    assert all(digest(typed(text)) == digest(typed(text)) for text in ("x + 1", "x in {'a', 'b'}", "[y for y in x]"))
    for make in (times, decorated):
        assert digest(make(1)) == digest(make(1))
    before = digest(given), digest(beside)
    given.__defaults__ = (4,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "GIVEN", 4)
        assert digest(given) != before[0] and digest(beside) != before[1]


def test_a_decomposition_that_cannot_be_compared_is_refused() -> None:
    class Called:
        def __call__(self, x: Any) -> Any:
            return x

    held, append = Called(), [1].append
    for function, message in (
        (held, "the decomposition of a is a Called"),
        (functools.partial(held), "the decomposition of a is a Called"),
        (functools.partial(torch.add, held), "the decomposition of a is a Called"),
        (lambda x: held(x), "held is a Called"),
        (lambda x: append(x), "append is a builtin_function_or_method"),
        (functools.wraps(torch.nn.functional.silu)(lambda x: held(x)), "held is a Called"),
    ):
        with pytest.raises(Uncacheable, match=message):
            environment.decompositions({"a": function})


def test_the_tables_of_torch_can_be_told() -> None:
    assert environment.decompositions(downstream.decompositions("inductor"))


def test_every_source_of_the_package_takes_part() -> None:
    names = dict(sources.files())
    assert {"moe_fx/backend.py", "moe_fx/cache/key.py", "moe_fx.passes/core.py", "moe_fx.lowering/targets.py"} <= set(
        names
    )
    assert not [name for name in names if "__pycache__" in name or name.startswith("moe_fx/tests")]
    for package in (moe_fx, moe_fx.passes, moe_fx.lowering):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            assert path in names.values()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x[0], lambda x: x[1]),
        (lambda x: x[0:2], lambda x: x[0:3]),
        (lambda x: torch.topk(x, 2), lambda x: torch.topk(x, 2, sorted=False)),
        (lambda x: torch.cos(x), lambda x: torch.sin(x)),
        (lambda x: x.to(torch.float64), lambda x: x.to(torch.float16)),
        (lambda x: torch.ops.aten.sum.default(x), lambda x: torch.ops.aten.sum.dim_IntList(x, [0])),
    ],
)
def test_graphs_that_differ_have_other_digests(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    # On one line and in one function each, so that nothing but the graph tells them apart.
    x = torch.ones(4, 4)
    first, second, again = _graph(one, x), _graph(other, x), _graph(one, x)
    for gm in (first, second, again):
        for node in gm.graph.nodes:
            node.meta.pop("stack_trace", None)
    assert key.graph_digest(first) == key.graph_digest(again) != key.graph_digest(second)


def test_contents_of_constants_take_part() -> None:
    def digest(constant: Any) -> str:
        graph = torch.fx.Graph()
        graph.output(graph.get_attr("constant"))
        return key.graph_digest(torch.fx.GraphModule({"constant": constant}, graph))

    ones, other = torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    assert digest(ones) == digest(ones.clone())
    assert len({digest(ones), digest(other), digest(ones.double()), digest(ones.view(3, 1)), digest(ones[:0])}) == 5
    # Marks on a tensor change what it reads as, not its memory.
    turned = torch.complex(ones, other)
    assert len({digest(turned), digest(turned.conj()), digest(turned.conj().resolve_conj())}) == 3
    negative = torch._neg_view(ones)
    assert negative.is_neg() and len({digest(ones), digest(negative), digest(negative.resolve_neg())}) == 3
    assert tensor_bytes(turned.conj()) == tensor_bytes(turned.conj().resolve_conj())
    assert tensor_bytes(negative) == tensor_bytes(-ones)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4, 4).t(),
        torch.ones(4, 4, requires_grad=True),
        torch.ones(4, 4, dtype=torch.float64),
        torch.ones(5, 4),
        torch.ones(4, 8)[:, ::2],
        nn.Parameter(torch.ones(4, 4), requires_grad=False),
    ],
    ids=["strides", "requires_grad", "dtype", "shape", "gaps", "parameter"],
)
def test_inputs_that_differ_have_other_digests(other: torch.Tensor) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    digest = key.graph_digest(_graph(fn, torch.rand(4, 4)))
    assert key.graph_digest(_graph(fn, torch.rand(4, 4))) == digest
    assert key.graph_digest(_graph(fn, other)) != digest
