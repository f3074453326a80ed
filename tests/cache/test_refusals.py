"""What must not be taken for the same, or must not break a compile: aliased inputs, foreign ops, files, directories."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import Compiled, compile_with_report
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_fx.cache import sources
from moe_fx.cache.artifacts import Artifacts
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.store import Store, default_cache_dir
from moe_fx.errors import CacheError, MoeFxWarning


def started(function: Any, *args: torch.Tensor) -> tuple[Any, Compiled]:
    """The first call of a process: its result and what was compiled."""
    torch._dynamo.reset()
    compiled = compile_with_report(function)
    return compiled(*args), compiled


def written_to(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return (y * 2) @ w


def test_inputs_that_share_memory_are_another_graph() -> None:
    w, apart = torch.eye(4), torch.zeros(4, 4)
    _, cold = started(written_to, apart, torch.zeros(2, 4), w)
    _, warm = started(written_to, torch.zeros(4, 4), torch.zeros(2, 4), w)
    whole = torch.zeros(4, 4)
    with pytest.warns(MoeFxWarning, match="aliased inputs"):
        result, aliased = started(written_to, whole, whole[:2], w)
    assert [c.reports[0].cache.split(":")[0] for c in (cold, warm, aliased)] == ["miss", "hit", "miss"]
    assert torch.equal(result, torch.full((2, 4), 2.0))


def test_a_composite_op_called_by_its_name_alone_is_refused() -> None:
    library = torch.library.Library("moe_fx_test_cache", "DEF")
    library.define("half(Tensor(a) x) -> Tensor(a)")
    library.impl("half", lambda x: x[:2], "CompositeImplicitAutograd")
    _, compiled = started(lambda x: torch.ops.moe_fx_test_cache.half(x) @ x.t(), torch.ones(4, 2))
    assert "composite op whose Python code" in compiled.reports[0].cache


@pytest.fixture
def kept(tmp_path: Path) -> Artifacts:
    return Artifacts(Store(tmp_path / "kept"), {"versions": "1"})


def graph_of(*inputs: Any) -> fx.GraphModule:
    """A graph of these inputs."""
    graph = fx.Graph()
    for index, value in enumerate(inputs):
        graph.placeholder(f"x{index}").meta["val"] = value
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph)


def rows(count: int) -> torch.Tensor:
    """A tensor with a symbolic number of rows, as another process would have it."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.ones(count), symbolic_context=context, source=ConstantSource("x"))


def compile_bytes(kept: Artifacts, gm: fx.GraphModule, compile: Any = lambda: b"made") -> bytes:
    return kept.get_or_compile("test", gm, compile=compile, dump=bytes, load=bytes)


def test_a_form_for_some_sizes_serves_them_only(kept: Artifacts) -> None:
    def form(count: int) -> bytes:
        x = rows(count)
        made = compile_bytes(kept, graph_of(x.shape[0], x), lambda: b"large" if x.shape[0] > 7 else b"small")
        (guard,) = x.shape[0].node.shape_env.guards  # A hit puts it back.
        assert str(guard.expr.subs(x.shape[0].node.expr, count)) == "True"
        return made

    assert [form(count) for count in (9, 8, 5, 6, 90)] == [b"large", b"large", b"small", b"small", b"large"]
    assert kept.outcomes == ["miss", "hit", "miss: the entry holds for sizes with 8 <= L['t0']", "hit", "hit"]


def test_what_is_known_of_sizes_takes_part(kept: Artifacts) -> None:
    """What is known already is not asked for, and leaves no guard to keep."""

    def form(count: int) -> bytes:
        x = rows(count)
        known = bool(x.shape[0] > 7)
        return compile_bytes(kept, graph_of(x.shape[0], x), lambda: b"large" if known else b"small")

    assert [form(count) for count in (9, 5, 10, 4)] == [b"large", b"small", b"large", b"small"]
    assert kept.outcomes == ["miss", "miss", "hit", "hit"]


def test_a_form_for_sizes_that_are_no_inputs_is_not_kept(kept: Artifacts) -> None:
    x = rows(9)
    assert compile_bytes(kept, graph_of(x), lambda: b"large" if x.shape[0] > 7 else b"small") == b"large"
    (outcome,) = kept.outcomes
    assert outcome.startswith("off: the graph holds under") and outcome.endswith("sizes that are no inputs of it")


def test_a_store_that_fails_costs_no_compile(kept: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Store, "find", fail)
    monkeypatch.setattr(Store, "write", fail)
    with pytest.warns(MoeFxWarning, match="Stale file handle; the next start compiles again"):
        assert compile_bytes(kept, graph_of(torch.ones(2))) == b"made"


def test_what_cannot_be_dropped_stays(tmp_path: Path) -> None:
    small = Store(tmp_path, limit_bytes=1)
    (small.folder / "x.entry").mkdir()
    path = small.write("test", {"a": "1"}, b"body")
    assert small.read(path)[1] == b"body"


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_dir", homeless)
    with pytest.raises(CacheError, match=r"no home directory.*MOE_FX_CACHE_DIR"):
        default_cache_dir()
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(CacheError, match="no home directory"):
        Store("~/cache")


def squared(x: torch.Tensor) -> torch.Tensor:
    return x @ x + 1


def test_an_entry_of_no_use_is_replaced() -> None:
    x = torch.ones(2, 2)
    started(squared, x)
    kept = Store(os.environ["MOE_FX_CACHE_DIR"])
    (path,) = kept.files()
    header, body = kept.read(path)
    data = json.loads(body)
    del data["guards"]
    kept.write(header.kind, header.components, json.dumps(data).encode(), variant=header.variant)
    with pytest.warns(MoeFxWarning, match=r"KeyError.*compiled anew"):
        started(squared, x)
    _, third = started(squared, x)
    assert third.reports[0].cache == "hit"


def test_code_that_changed_under_the_process_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    began = sources._process_began()
    assert abs(time.time() - began) < 24 * 3600
    monkeypatch.setattr(sources, "_process_began", lambda: 0.0)
    with pytest.raises(Uncacheable, match="changed while this process runs"):
        sources.digest()
