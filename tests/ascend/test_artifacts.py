"""A warm start takes converted GE graphs from the cache: in another process, with equal results, never a stale one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report
from npu_report import on_hardware
from torchair import npu_fx_compiler

from moe_fx import downstream, torchair_artifacts, torchair_handoff
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.store import Store
from moe_fx.errors import MoeFxWarning
from moe_fx.passes import Pass

PROGRAM = """
import json, sys
sys.path[:0] = PATHS
DEVICE
import torch
import moe_blocks as blocks
from compiling import compile_with_report
from torchair import npu_fx_compiler

sizes, options, lengths = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
converted = []
run = npu_fx_compiler._NpuGraphConverter.run
npu_fx_compiler._NpuGraphConverter.run = lambda self, *args: converted.append(1) or run(self, *args)
torch.manual_seed(0)
model = blocks.Block(blocks.batched)
xs = [torch.arange(n * blocks.H).view(n, blocks.H) / 100 for n in lengths]
with torch.no_grad():
    expected = [model(x) for x in xs]
fn = compile_with_report(
    model.npu(),
    dynamic=sizes == "dynamic",
    downstream="torchair",
    fullgraph=True,
    ascend_combine="token_unpermute",  # Its converter is moe-fx's.
    downstream_options=options,
)
results = [fn(x.npu()).cpu() for x in xs]
torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)
print(json.dumps({
    "why": [report.cache for report in fn.reports],
    "graphs": [report.cache.split(":")[0] for report in fn.reports],
    "artifacts": [outcome for report in fn.reports for outcome in report.artifacts],
    "sites": sum(len(report.matched) for report in fn.reports),
    "converted": len(converted),
    "results": [result.tolist() for result in results],
}))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    here = Path(__file__).parent
    path = tmp_path / "program.py"
    paths = repr([str(here), str(here.parent / "support")])
    device = "import torch_npu" if on_hardware() else "import host_cann.preload; host_cann.install()"
    path.write_text(PROGRAM.replace("PATHS", paths).replace("DEVICE", device))
    return path


@pytest.fixture
def store() -> Store:
    return Store(os.environ["MOE_FX_CACHE_DIR"])


def run(program: Path, sizes: str, lengths: tuple[int, ...] = (6, 9), **options: Any) -> dict[str, Any]:
    """What one process that starts afresh does."""
    command = [sys.executable, str(program), sizes, json.dumps(options), json.dumps(lengths)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def artifact_files(store: Store) -> list[Path]:
    return [path for path in store.files() if store.header(path).kind == torchair_artifacts.KIND]


@pytest.mark.npu
def test_the_second_process_converts_nothing(program: Path) -> None:
    cold, warm = run(program, "dynamic"), run(program, "dynamic")
    assert (cold["graphs"], cold["artifacts"], cold["converted"]) == (["miss"], ["miss"], 1)
    assert (warm["graphs"], warm["artifacts"], warm["converted"]) == (["hit"], ["hit"], 0), warm["why"]
    assert warm["results"] == cold["results"] and warm["sites"] == cold["sites"] >= 2


@pytest.mark.npu
def test_fixed_sizes_options_and_lost_artifacts(program: Path, store: Store) -> None:
    cold = run(program, "static", (6, 9))
    assert (cold["graphs"], cold["artifacts"], cold["converted"]) == (["miss"] * 2, ["miss"] * 2, 2)

    # torchair numbers the graphs of a process, so that a kept graph and a new one can have the same number.
    warm = run(program, "static", (6, 9, 12))
    assert (warm["graphs"], warm["artifacts"]) == (["hit", "hit", "miss"], ["hit", "hit", "miss"])
    assert warm["converted"] == 1 and warm["results"][:2] == cold["results"]

    changed = run(program, "static", (6,), **{"experimental_config.tiling_schedule_optimize": True})
    assert (changed["graphs"], changed["artifacts"], changed["converted"]) == (["miss"], ["miss"], 1)

    # Lowering, which a kept graph skips, is not alone in giving torchair moe-fx's converters.
    for path in artifact_files(store):
        path.unlink()
    again = run(program, "static", (6,))
    assert (again["graphs"], again["artifacts"], again["converted"]) == (["hit"], ["miss"], 1)
    assert again["results"] == cold["results"][:1]


@pytest.mark.parametrize("mode", torchair_handoff.MODES)
def test_the_benchmark_tells_what_a_warm_start_skips(mode: str) -> None:
    root = Path(__file__).parents[2]
    arguments = ["--downstream", "torchair", "--mode", mode, "--layers", "1", "--dynamic", "--json"]
    command = [sys.executable, str(root / "benchmarks" / "cache_start.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root / "tests" / "ascend")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    starts = json.loads(done.stdout[done.stdout.index("{") :])
    converted = {"ge": ["miss", "hit"], "npugraph_ex": ["", ""]}[mode]
    assert [starts[name]["artifacts"] for name in ("cold", "warm")] == converted
    assert starts["warm"]["cache"] == "hit" and starts["warm"]["matched"] == starts["cold"]["matched"] == 6
    assert starts["warm"]["conversion"] == 0 < starts["cold"]["moe_fx"]


# --- In one process --------------------------------------------------------------------------------------------------


def layer(x: torch.Tensor, w: torch.Tensor) -> Any:
    weights, ids = torch.softmax((x @ w).float(), -1).topk(2, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def start(fn: Any = layer, dynamic: bool = False, tokens: int = 4, **options: Any) -> tuple[list[str], list[str], Any]:
    """The first call after a start: what came of the graph and of its artifact, and the outputs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = compile_with_report(fn, dynamic=dynamic, fullgraph=True, downstream="torchair", **options)
    x, w = torch.randn(tokens, 8), torch.randn(8, 16)
    outputs = compiled(x.npu(), w.npu())
    for got, want in zip(outputs, fn(x, w), strict=True):
        torch.testing.assert_close(got.cpu() if isinstance(got, torch.Tensor) else got, want, check_dtype=False)
    return [r.cache.split(":")[0] for r in compiled.reports], compiled.reports[0].artifacts, outputs


def test_the_entry_is_text_that_only_its_owner_can_read(store: Store) -> None:
    start()
    (path,) = artifact_files(store)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"def kernel(" in store.read(path)[1]


@pytest.mark.parametrize("damage", ["bytes", "mode", "code"])
def test_a_damaged_artifact_is_a_miss_and_is_replaced(store: Store, damage: str) -> None:
    start()
    (path,) = artifact_files(store)
    header, body = store.read(path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes().replace(b"def kernel(", b"def Kernel("))
    elif damage == "mode":
        path.chmod(0o666)
    else:
        store.write(header.kind, header.components, b"raise ValueError('of another torchair')")
    with pytest.warns(MoeFxWarning, match="it is made anew"):
        graphs, artifacts, _ = start()
    assert graphs == ["hit"] and artifacts[0].startswith("miss: ")
    assert store.read(path)[1].startswith(body[:200])
    assert start()[1] == ["hit"]


def test_a_foreign_entry_is_never_executed(store: Store, tmp_path: Path) -> None:
    start()
    (path,) = artifact_files(store)
    header, _ = store.read(path)
    witness = tmp_path / "ran"
    store.write(header.kind, header.components, f"open({str(witness)!r}, 'w')".encode())
    path.chmod(0o644)
    with pytest.warns(MoeFxWarning, match="is open to others"):
        start()
    assert not witness.exists()


def test_sizes_among_the_outputs() -> None:
    def with_sizes(x: torch.Tensor, w: torch.Tensor) -> Any:
        return x @ w, x.shape[0] * 2 + 1, x.reshape(-1, 2)

    outcomes = [start(with_sizes, dynamic=True)[1] for _ in range(2)]
    assert outcomes == [["miss"], ["hit"]]


class Asks(Pass):
    """A pass that asks about a size, which leaves a guard."""

    name = "asks"

    def run(self, ctx: Any) -> None:
        """Ask."""
        sizes = [n.meta["val"] for n in ctx.graph.find_nodes(op="placeholder")]
        assert bool(next(size for size in sizes if isinstance(size, torch.SymInt)) < 1000)


class Fixes(Asks):
    """One that also makes the size a number, from which the answer follows."""

    def run(self, ctx: Any) -> None:
        """Ask for bounds, then for the number."""
        super().run(ctx)
        sizes = [n.meta["val"] for n in ctx.graph.find_nodes(op="placeholder")]
        assert int(next(size for size in sizes if isinstance(size, torch.SymInt)))


def test_a_size_that_became_a_number_is_known_however_it_did() -> None:
    assert [start(dynamic=True, extra_passes=[Fixes()])[1] for _ in range(2)] == [["miss"], ["hit"]]


@pytest.mark.parametrize("passes", [[], [Asks()]], ids=["", "guarded before"])
def test_a_conversion_that_looks_at_sizes_is_kept_for_them(passes: list[Pass], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchair's does in attention, for as many tokens as heads."""
    run = npu_fx_compiler._NpuGraphConverter.run

    def asking(self: Any, *args: Any) -> Any:
        assert bool(next(size for size in args if isinstance(size, torch.SymInt)) > 4) in (True, False)
        return run(self, *args)

    monkeypatch.setattr(npu_fx_compiler._NpuGraphConverter, "run", asking)
    outcomes = [start(dynamic=True, tokens=n, extra_passes=passes)[1] for n in (4, 5, 6, 4)]
    assert outcomes[1][0].startswith("miss: the entry holds for sizes with") and "L['t0'] <= 4" in outcomes[1][0]
    assert [outcomes[0], *outcomes[2:]] == [["miss"], ["hit"], ["hit"]]


def test_code_that_does_not_stand_alone_is_not_kept() -> None:
    with pytest.raises(Uncacheable, match="stand alone: Max"):
        torchair_artifacts._check_names("def kernel(*args):\n    return Max(1, args[0])\n")
    with pytest.raises(Uncacheable, match="no valid Python"):
        torchair_artifacts._check_names("x = ")


def test_options_that_ask_for_files_convert_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        _, artifacts, _ = start(downstream_options={"debug.graph_dump.type": "py"})
        assert artifacts == ["off: the torchair option 'debug.graph_dump.type' asks for what only a conversion gives"]
    assert len(list(tmp_path.glob("**/*.py"))) >= 2


def test_marks_on_inputs_are_part_of_the_key() -> None:
    plain, marked = torch.ones(2), torch.ones(2)
    marked._torchair_is_parameter = True
    gm = torch.fx.symbolic_trace(lambda x: x)
    assert torchair_artifacts._more_components(gm, [plain]) != torchair_artifacts._more_components(gm, [marked])


# Each alone: [what changes, to what, whether the lowered graph is another too].
CHANGES = {
    "level of determinism": ("torch_npu.npu._get_deterministic_level", lambda: 2, False),
    "CANN": ("torch_npu.npu.utils.get_cann_version", lambda *args: "9.9.0", True),
    "SoC": ("torch_npu.npu.get_device_name", lambda *args: "Ascend910_9391", True),
    "torch_npu": ("moe_fx.cache.environment._release", lambda name: "99.0", True),
    "decompositions": ("torchair._utils.get_npu_default_decompositions", lambda: {"aten.mul": torch.mul}, True),
    "ranks": ("moe_fx.cache.environment.world", lambda: ["hccl", 2, 1], True),
    "sources": ("moe_fx.cache.sources.file_digests", lambda: {"moe_fx.lowering/ascend/ge_converters.py": "1"}, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_converts_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, value, lowers_anew = CHANGES[name]
    start()
    assert start()[:2] == (["hit"], ["hit"])
    monkeypatch.setattr(place, value)
    assert start()[:2] == (["miss" if lowers_anew else "hit"], ["miss"])
    assert start()[:2] == (["hit"], ["hit"])


@pytest.mark.parametrize("of", ["matmul", "conv"])
def test_a_switch_of_hf32_converts_anew(of: str) -> None:
    switch = getattr(torch.npu, of)
    before = switch.allow_hf32
    start()
    switch.allow_hf32 = not before
    try:
        assert start()[:2] == (["hit"], ["miss"])
    finally:
        switch.allow_hf32 = before
    assert start()[:2] == (["hit"], ["hit"])


def test_gears_are_kept(store: Store) -> None:
    options = {"downstream_options": {"gears": {"x": {0: [2, 4, 8]}}}}
    assert [start(dynamic=True, **options)[1] for _ in range(2)] == [["miss"], ["hit"]]
    other = {"downstream_options": {"gears": {"x": {0: [2, 4]}}}}
    assert start(dynamic=True, **other)[1] == ["miss"]


def test_a_users_converter_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    softmax = torch.ops.npu.npu_moe_gating_top_k_softmax.default
    start()
    original = softmax._ge_converter
    mine.require_meta = original.require_meta
    monkeypatch.setattr(softmax, "_ge_converter", mine)
    assert start()[1] == [
        "off: the GE converter of npu.npu_moe_gating_top_k_softmax.default is neither torchair's nor moe-fx's"
    ]


def test_npugraph_ex_keeps_nothing() -> None:
    options = {"downstream_options": {"mode": "npugraph_ex"}}
    assert [start(**options)[:2] for _ in range(2)] == [(["miss"], []), (["hit"], [])]


def test_the_decomposition_table_is_torchairs() -> None:
    assert downstream.decompositions("torchair")


def test_a_users_pattern_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchair.patterns.pattern_pass_manager import _pattern_manager

    start()  # torchair registers its own.
    patterns = _pattern_manager().pass_dict.patterns
    assert patterns
    torchair_artifacts._check_patterns()
    monkeypatch.setitem(patterns, "mine", [SimpleNamespace(extra_check=lambda match: True)])
    with pytest.raises(Uncacheable, match="patterns are registered with torchair"):
        torchair_artifacts._check_patterns()


def test_random_numbers_are_not_kept() -> None:
    compiled = compile_with_report(lambda x: torch.nn.functional.dropout(x, 0.5), downstream="torchair")
    with pytest.raises(RuntimeError):  # The stand-in draws none.
        compiled(torch.ones(64, 64).npu())
    assert compiled.reports[0].artifacts[0].startswith("off: torchair cannot write the graph as code")
