"""The cache across processes: the second one skips the work, equal work finds it, edits miss, and crowds do no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from moe_fx.cache.store import Store

SCRIPT = """
import json, sys
sys.path.insert(0, SUPPORT)
import torch
import moe_blocks as blocks
from compiling import compile_with_report
from moe_blocks import Block, H
from torch._dynamo.utils import counters


class Model(Block):
    def forward(self, x):
        return super().forward(x) * FACTOR


def main(dynamic, downstream):
    torch.manual_seed(0)
    model = Model(blocks.batched)
    compiled = compile_with_report(model, dynamic=dynamic, downstream=downstream)
    sums = []
    for tokens in (6, 9):
        x = torch.arange(tokens * H).view(tokens, H) / 100
        y = compiled(x)
        with torch.no_grad():
            torch.testing.assert_close(y, model(x))
        sums.append(y.double().sum().item())
    print(json.dumps({
        "outcomes": [report.cache for report in compiled.reports],
        "sites": [[s.kind, s.form, s.kernel, s.module, s.source] for r in compiled.reports for s in r.sites],
        "sums": sums,
        "inductor": dict(counters["inductor"]),
        "aot": dict(counters["aot_autograd"]),
    }))


if __name__ == "__main__":
    main(sys.argv[1] == "dynamic", sys.argv[2])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return _write(tmp_path / "program.py", 2)


def _write(path: Path, factor: int) -> Path:
    support = str(Path(__file__).parents[1] / "support")
    path.write_text(textwrap.dedent(SCRIPT).replace("SUPPORT", repr(support)).replace("FACTOR", str(factor)))
    return path


def _begin(script: Path, *arguments: str, seed: str = "random") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), *(arguments or ("static", "eager"))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _run(script: Path, *arguments: str, **options: str) -> dict[str, Any]:
    return _result(_begin(script, *arguments, **options))


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_the_second_process_hits_and_agrees(script: Path, sizes: str) -> None:
    cold = _run(script, sizes, "eager", seed="1")
    warm = _run(script, sizes, "eager", seed="2")
    assert cold["outcomes"][0] == "miss: the cache is empty" and set(warm["outcomes"]) == {"hit"}
    assert len(warm["outcomes"]) == (1 if sizes == "dynamic" else 2)
    assert warm["sums"] == cold["sums"] and warm["sites"] == cold["sites"] and len(cold["sites"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_inductors_own_cache_hits_behind_ours(
    script: Path, sizes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    cold, warm = _run(script, sizes, "inductor"), _run(script, sizes, "inductor")
    assert set(warm["outcomes"]) == {"hit"} and "hit" not in cold["outcomes"]
    graphs = len(warm["outcomes"])
    assert warm["aot"].get("autograd_cache_hit") == graphs and "autograd_cache_miss" not in warm["aot"]
    assert warm["sums"] == pytest.approx(cold["sums"])


def test_an_edited_method_misses_and_its_old_form_still_hits(script: Path) -> None:
    first = _run(script)
    _write(script, 3)
    edited = _run(script)
    assert edited["outcomes"][0] == "miss: no entry for this graph"
    assert edited["sums"] == pytest.approx([1.5 * value for value in first["sums"]])
    _write(script, 2)
    assert set(_run(script)["outcomes"]) == {"hit"}


def test_processes_that_start_together_do_no_harm(script: Path) -> None:
    processes = [_begin(script) for _ in range(3)]
    results = [_result(process) for process in processes]
    assert all(result["sums"] == results[0]["sums"] for result in results)
    store = Store(os.environ["MOE_FX_CACHE_DIR"])
    assert len(store.files()) == 2 and all(problem == "" for _, problem in store.verify())
    assert set(_run(script)["outcomes"]) == {"hit"}
