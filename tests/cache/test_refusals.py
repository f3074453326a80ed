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


def graph_of(size: Any) -> fx.GraphModule:
    """A graph of one input with ``size`` rows."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = size
    graph.output(x)
    return fx.GraphModule(torch.nn.Module(), graph)


def compile_bytes(kept: Artifacts, gm: fx.GraphModule, compile: Any = lambda: b"made") -> bytes:
    return kept.get_or_compile("test", gm, compile=compile, dump=bytes, load=bytes)


def test_a_form_for_some_sizes_only_is_not_kept(kept: Artifacts) -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    x = mode.from_tensor(torch.ones(9), symbolic_context=context, source=torch._dynamo.source.ConstantSource("x"))
    gm = graph_of(x)
    assert compile_bytes(kept, gm, lambda: b"large" if x.shape[0] > 7 else b"small") == b"large"
    assert kept.outcomes == ["off: the compiled form holds for some sizes only"]
    compile_bytes(kept, gm)
    compile_bytes(kept, gm)
    assert kept.outcomes[1:] == ["miss", "hit"]


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
