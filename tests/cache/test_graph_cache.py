"""The cache behind the backend: hits give what misses gave, reports stay right, no failure of it breaks a compile."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moe_blocks as blocks
import pytest
import torch
from compiling import Compiled, compile_with_report
from moe_blocks import Block, H
from moe_families import FAMILIES, token_ids
from torch import nn

import moe_fx
from moe_fx import backend, downstream
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_cache import GraphCache
from moe_fx.cache.guards import SizeGuards
from moe_fx.cache.store import Store, default_cache_dir
from moe_fx.errors import CacheError, MoeFxWarning, UnsupportedError
from moe_fx.explanation import Explanation
from moe_fx.passes import Pass


@pytest.fixture
def store(own_cache: None) -> Store:
    """The cache that the environment names."""
    return Store(os.environ["MOE_FX_CACHE_DIR"])


def start(model: nn.Module, *args: Any, dynamic: bool | None = False, **options: Any) -> tuple[Any, Compiled]:
    """The first call of a process: its result and what was compiled."""
    torch._dynamo.reset()
    compiled = compile_with_report(model, dynamic=dynamic, **options)
    return compiled(*args), compiled


def outcomes(compiled: Compiled) -> list[str]:
    return [report.cache for report in compiled.reports]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when a graph is exported, matched or lowered."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a step ran that a hit must skip")

    with monkeypatch.context() as patch:
        for name in ("export", "run_passes", "lower"):
            patch.setattr(backend, name, refuse)
        yield


@pytest.mark.parametrize(("family", "dynamic"), [("qwen3_moe", False), ("glm4_moe", True)])
def test_a_hit_gives_what_the_miss_gave_and_skips_the_work(
    family: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = FAMILIES[family].build()
    kwargs = {"use_cache": False}
    torch._dynamo.reset()
    cold = compile_with_report(model, dynamic=dynamic)
    expected = [cold(token_ids(*size), **kwargs).logits for size in ((2, 6), (3, 7))]
    torch._dynamo.reset()
    request.getfixturevalue("no_work")
    warm = compile_with_report(model, dynamic=dynamic)
    results = [warm(token_ids(*size), **kwargs).logits for size in ((2, 6), (3, 7))]
    assert all(outcome.startswith("miss: ") for outcome in outcomes(cold)) and set(outcomes(warm)) == {"hit"}
    assert len(warm.reports) == len(cold.reports) == (1 if dynamic else 2)
    assert all(torch.equal(*pair) for pair in zip(expected, results, strict=True))
    for hit, miss in zip(warm.reports, cold.reports, strict=True):
        assert hit.sites == miss.sites and len(hit.sites) > 5
        assert (hit.nodes_before, hit.nodes_after, hit.compile_id) == (
            miss.nodes_before,
            miss.nodes_after,
            miss.compile_id,
        )
        assert list(hit.pass_seconds) == list(miss.pass_seconds) and not any(hit.pass_seconds.values())
        assert hit.capture_seconds == 0 and hit.cache_seconds > 0 and hit.graph is None


def test_inputs_are_still_mutated_and_outputs_still_alias() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(blocks.batched)

        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.block(x)
            state.add_(y)
            return y, state

    model, x = Cached(), torch.randn(4, H)
    for expected in ("miss: the cache is empty", "hit"):
        state = torch.ones(4, H)
        (y, out), compiled = start(model, x, state)
        assert outcomes(compiled) == [expected]
        assert out is state and torch.equal(state, 1 + y)


def test_another_model_of_the_same_shape_hits_with_its_own_weights() -> None:
    x = torch.randn(5, H)
    one, other = Block(blocks.batched), Block(blocks.batched)
    start(one, x)
    y, compiled = start(other, x)
    assert outcomes(compiled) == ["hit"]
    torch.testing.assert_close(y, other(x))
    assert not torch.equal(y, one(x))


def test_a_cold_start_hands_over_what_a_warm_one_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[torch.fx.GraphModule] = []
    monkeypatch.setitem(
        downstream._COMPILERS,
        "eager",
        lambda gm, inputs, request: handed.append(gm) or gm.forward,  # type: ignore[func-returns-value]
    )
    model, x = Block(blocks.batched), torch.randn(5, H)
    for _ in range(2):
        start(model, x)
    cold, warm = handed
    assert cold.code == warm.code
    for one, other in zip(cold.graph.nodes, warm.graph.nodes, strict=True):
        assert one.meta.keys() == other.meta.keys() and one.name == other.name
        assert one.meta.get("stack_trace") == other.meta.get("stack_trace")
        if one.op == "placeholder":
            assert one._dynamo_source == other._dynamo_source and "val" in one.meta


# --- Guards ----------------------------------------------------------------------------------------------------------


def _tokens(ctx: Any) -> torch.SymInt:
    """The graph's symbolic input."""
    values = (node.meta["val"] for node in ctx.graph.find_nodes(op="placeholder"))
    return next(value for value in values if isinstance(value, torch.SymInt))


class AskParity(Pass):
    """Asks something about a symbolic size, as a shape rule may: the result then holds for such sizes alone."""

    name = "ask_parity"

    def run(self, ctx: Any) -> None:
        """Guard on whether the number of tokens is even; odd ones get another graph."""
        even = bool(_tokens(ctx) % 2 == 0)
        output = ctx.graph.output_node()
        (result,) = output.args[0]
        with ctx.graph.inserting_before(output):
            marked = ctx.graph.call_function(torch.ops.aten.add.Tensor, (result, 0 if even else 100))
            marked.meta = dict(result.meta)
        output.args = ((marked,),)


def test_guards_of_the_skipped_steps_come_back() -> None:
    model = Block(blocks.batched)

    def run(*sizes: int) -> list[str]:
        torch._dynamo.reset()
        compiled = compile_with_report(model, dynamic=True, extra_passes=[AskParity()])
        for size in sizes:
            x = torch.randn(size, H)
            torch.testing.assert_close(compiled(x), model(x) + (100 if size % 2 else 0))
        return outcomes(compiled)

    assert run(6) == ["miss: the cache is empty"]
    # An even size hits; an odd one must not run its graph, though dynamo's own graph is the same.
    first, second = run(8, 7)
    assert first == "hit" and second.startswith("miss: the entry holds for sizes with (L['t0'] % 2) == 0")
    # Both variants are kept, whichever comes first.
    assert run(9, 4, 11) == ["hit", "hit"]


def test_guards_on_a_size_that_became_a_number_come_back() -> None:
    class AskNumber(AskParity):
        name = "ask_number"

        def run(self, ctx: Any) -> None:
            int(_tokens(ctx))

    model = Block(blocks.batched)
    torch._dynamo.reset()
    compiled = compile_with_report(model, dynamic=True, extra_passes=[AskNumber()])
    compiled(torch.randn(6, H))
    torch._dynamo.reset()
    compiled = compile_with_report(model, dynamic=True, extra_passes=[AskNumber()])
    compiled(torch.randn(6, H))
    compiled(torch.randn(7, H))
    first, second = outcomes(compiled)
    assert first == "hit" and second.startswith("miss")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "torch.load('x')",
        "eval('1')",
        "[x for x in (1,)]",
        "L['t0'].__class__",
        "(lambda: 1)()",
        "math.floor.__self__",
        "math.factorial(9)",
        "math.acos(1)",
        "torch.sym_fresh_size()",
        "torch._sym_acos(1)",
        "torch.sym_max(*L)",
        "max(1, key=eval)",
        "not an expression",
        "L[__import__('os')]",
    ],
)
def test_guards_from_an_entry_can_only_compute(expression: str) -> None:
    guards = SizeGuards(torch.fx.GraphModule({}, torch.fx.Graph()))
    with pytest.raises(CacheError, match="guards"):
        guards.hold(expression)


def test_guards_with_the_functions_of_sizes_are_read() -> None:
    guards = SizeGuards(torch.fx.GraphModule({}, torch.fx.Graph()))
    assert not guards.hold("max(math.ceil(L['t0'] / 2), math.floor(3.5)) > 1 and torch.sym_float(L['t0']) > 0")


def test_guards_that_could_not_be_read_back_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    env = SimpleNamespace(guards=[], produce_guards_expression=lambda *args, **kwargs: "math.acos(L['t0']) > 1")
    guards = SizeGuards(torch.fx.GraphModule({}, torch.fx.Graph()))
    monkeypatch.setattr(guards, "_env", env)
    monkeypatch.setattr(guards, "_known", 0)
    env.guards.append(SimpleNamespace(expr=SimpleNamespace(free_symbols=set())))
    with pytest.raises(Uncacheable, match=r"holds under math.acos.*, which could not be read back"):
        guards.added()


# --- Entries that cannot be used -------------------------------------------------------------------------------------


def _spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _spoil_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def _spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def _spoil_open(path: Path) -> None:
    path.chmod(0o666)


def _spoil_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"moe-fx-cache 1 ", b"moe-fx-cache 0 ", 1))


@pytest.mark.parametrize("spoil", [_spoil_truncated, _spoil_flipped, _spoil_empty, _spoil_open, _spoil_version])
def test_a_spoilt_entry_is_one_message_and_is_replaced(store: Store, spoil: Any) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    expected, _ = start(model, x)
    (path,) = store.files()
    spoil(path)
    with pytest.warns(MoeFxWarning) as said:
        y, compiled = start(model, x)
    (message,) = [str(item.message) for item in said if issubclass(item.category, MoeFxWarning)]
    assert f"cache entry {path.name}" in message and "compiled anew and the entry replaced" in message
    assert outcomes(compiled)[0].startswith(f"miss: cache entry {path.name}")
    assert torch.equal(y, expected)
    y, compiled = start(model, x)
    assert outcomes(compiled) == ["hit"] and torch.equal(y, expected)
    assert store.files() == [path]


def test_an_entry_of_another_user_is_replaced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    (path,) = store.files()
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        if status.st_ino != foreign:
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])

    foreign = path.stat().st_ino
    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.warns(MoeFxWarning, match="belongs to user .*, not to you, and is not trusted"):
        start(model, x)
    assert path.stat().st_ino != foreign
    assert outcomes(start(model, x)[1]) == ["hit"]


def test_an_entry_for_ops_that_are_gone_is_replaced(store: Store) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    (path,) = store.files()
    header, body = store.read(path)
    data = json.loads(body)
    data["graph"]["nodes"][-2][2] = "torch.ops.moe_fx.no_longer_there.default"
    store.write("graph", header.components, json.dumps(data).encode())
    with pytest.warns(MoeFxWarning, match="does not fit this process"):
        start(model, x)
    assert outcomes(start(model, x)[1]) == ["hit"]


def test_a_directory_that_cannot_be_used_costs_the_cache_not_the_model(store: Store) -> None:
    store.folder.chmod(0o777)
    model, x = Block(blocks.batched), torch.randn(5, H)
    with pytest.warns(MoeFxWarning, match="others may write to the cache directory .*compiled without the cache"):
        y, compiled = start(model, x)
    assert outcomes(compiled)[0].startswith("off: others may write") and compiled.counts == dict(router=1, experts=1)
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("place", ["restore", "keep", "components"])
def test_a_bug_in_the_cache_costs_the_cache_not_the_model(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    target = {"restore": "_restore", "keep": "_with_metadata"}.get(place)
    if target:
        monkeypatch.setattr(GraphCache, target, crash)
    else:
        monkeypatch.setattr("moe_fx.cache.graph_cache.compile_components", crash)
    model, x = Block(blocks.batched), torch.randn(5, H)
    with pytest.warns(MoeFxWarning, match=r"the compile cache failed \(ZeroDivisionError: a bug\)"):
        y, compiled = start(model, x)
    assert compiled.counts == dict(router=1, experts=1)
    assert outcomes(compiled) == ["off: ZeroDivisionError: a bug"]
    torch.testing.assert_close(y, model(x))


# --- Graphs and options to which it does not apply -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(cache=False), "off: cache=False"),
        (dict(check=True), "off: check=True compares with the unfused graph"),
        (dict(dump_dir="dump"), "off: dump_dir is set, and dumps are written by the passes as they run"),
    ],
)
def test_what_needs_the_steps_does_without(
    options: dict[str, Any], reason: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    before = store.files()
    _, compiled = start(model, x, **options)
    assert outcomes(compiled) == [reason] and store.files() == before


def test_logs_of_each_pass_do_without(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    with caplog.at_level("DEBUG", logger="moe_fx.graphs"):
        _, compiled = start(model, x)
    assert outcomes(compiled) == ["off: TORCH_LOGS asks for what each pass changes"]
    assert "experts" in caplog.text


def test_a_function_that_the_key_cannot_cover_is_compiled_and_not_kept(store: Store) -> None:
    @torch.compiler.allow_in_graph
    def helper(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class WithHelper(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return helper(super().forward(x))

    model, x = WithHelper(blocks.batched), torch.randn(5, H)
    y, compiled = start(model, x)
    (said,) = outcomes(compiled)
    assert said.startswith("off: the graph calls ") and "helper, whose source the key does not cover" in said
    assert store.files() == [] and compiled.counts == dict(router=1, experts=1)
    torch.testing.assert_close(y, model(x))


def test_a_nested_graph_is_compiled_and_not_kept(store: Store) -> None:
    class Branching(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (super().forward(x),))

    _, compiled = start(Branching(blocks.batched), torch.randn(5, H))
    assert outcomes(compiled)[0].startswith("off: ") and store.files() == []


def test_unfused_graphs_are_not_kept(store: Store) -> None:
    class Crash(Pass):
        name = "crash"

        def run(self, ctx: Any) -> None:
            raise ZeroDivisionError

    with pytest.warns(MoeFxWarning, match="runs unfused"):
        start(Block(blocks.batched), torch.randn(5, H), extra_passes=[Crash()])
    assert store.files() == []


# --- What a warm start still says ------------------------------------------------------------------------------------


def odd_router(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.topk((x @ m.gate.t()).cos(), blocks.K)
    return weights.sqrt(), ids


def test_strict_raises_on_a_hit_too() -> None:
    model, x = Block(blocks.batched, odd_router), torch.randn(5, H)
    for _ in range(2):
        with pytest.raises(Exception, match="strict: these sites were not fused") as raised:
            start(model, x, strict=True)
        assert isinstance(raised.value.__cause__ or raised.value, Exception)
        assert UnsupportedError.__name__ in repr(raised.getrepr())


def test_nothing_matched_is_a_warning_on_a_hit_too() -> None:
    model, x = nn.Linear(H, H), torch.randn(5, H)
    for expected in ("miss", "hit"):
        with pytest.warns(MoeFxWarning, match="nothing in graph .* was fused"):
            _, compiled = start(model, x)
        assert outcomes(compiled)[0].startswith(expected)


def test_a_report_of_a_hit_prints_like_any_other() -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    _, cold = start(model, x)
    _, warm = start(model, x)
    texts = [Explanation(compiled.reports).to_text() for compiled in (cold, warm)]
    assert "compile cache: miss: the cache is empty" in texts[0] and "compile cache: hit" in texts[1]
    rows = [[line for line in text.splitlines() if "✓" in line or "✗" in line] for text in texts]
    assert rows[0] == rows[1] and rows[0]
    (graph,) = Explanation(warm.reports).to_dict()["graphs"]
    assert graph["cache"] == "hit" and graph["cache_seconds"] > 0


def test_explain_matches_anew_and_says_so(store: Store) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    before = store.files()
    (graph,) = moe_fx.explain(model, x).graphs
    assert graph.cache == "off: an explanation always matches anew" and graph.graph is not None
    assert store.files() == before


def test_the_default_directory_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_FX_CACHE_DIR")
    assert default_cache_dir().name == "moe_fx"
    start(Block(blocks.batched), torch.randn(5, H))
    assert len(Store(default_cache_dir()).files()) == 1


def test_a_hit_is_the_last_to_be_evicted(store: Store) -> None:
    model = Block(blocks.batched)
    start(model, torch.randn(5, H))
    (first,) = store.files()
    start(model, torch.randn(6, H))
    for path in store.files():
        os.utime(path, (1, 1 if path == first else 2))
    assert store.files()[0] != first
    start(model, torch.randn(5, H))
    assert store.files()[0] == first


# --- Artifacts of a downstream compiler ------------------------------------------------------------------------------


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A downstream compiler that keeps its results: the graph's code as text. What it does is listed."""
    events: list[str] = []

    def compile_kept(gm: torch.fx.GraphModule, inputs: list[Any], request: downstream.Request) -> Any:
        def load(data: bytes) -> Any:
            if data != b"compiled":
                raise ValueError("this artifact is of no use")
            events.append("load")
            return gm.forward

        def compile() -> Any:
            events.append("compile")
            return gm.forward

        assert request.artifacts is not None
        return request.artifacts.get_or_compile(
            "recorder", gm, compile=compile, dump=lambda compiled: b"compiled", load=load
        )

    monkeypatch.setitem(downstream._COMPILERS, "eager", compile_kept)
    return events


def test_a_downstream_compiler_gets_its_artifact_back(recorder: list[str], store: Store) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    for _ in range(2):
        torch.testing.assert_close(start(model, x)[0], model(x))
    assert recorder == ["compile", "load"]
    assert sorted(store.header(path).kind for path in store.files()) == ["graph", "recorder"]
    start(model, torch.randn(6, H))
    start(model, x, level="bitwise")
    assert recorder == ["compile", "load", "compile", "compile"]


def test_an_artifact_that_does_not_load_is_made_anew(recorder: list[str], store: Store) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    start(model, x)
    (path,) = [path for path in store.files() if store.header(path).kind == "recorder"]
    header, _ = store.read(path)
    store.write("recorder", header.components, b"of another make")
    with pytest.warns(MoeFxWarning, match="this artifact is of no use; it is made anew"):
        start(model, x)
    start(model, x)
    assert recorder == ["compile", "compile", "load"]


def test_without_a_cache_artifacts_are_compiled(recorder: list[str], store: Store) -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    for _ in range(2):
        start(model, x, cache=False)
    assert recorder == ["compile", "compile"] and store.files() == []


def test_no_warning_in_ordinary_use() -> None:
    model, x = Block(blocks.batched), torch.randn(5, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoeFxWarning)
        for _ in range(2):
            start(model, x)
