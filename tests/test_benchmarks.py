"""benchmarks/cpu_experts.py at tiny sizes: what it runs is right, what goes wrong is reported. Nothing about speed."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import moe_fx.lowering.ops  # noqa: F401  (registers the canonical ops)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cpu_experts  # noqa: E402
from catalog import Candidate  # noqa: E402
from cpu_experts import Bench, Cell, Result, Row  # noqa: E402
from layer import FORMATS, Shape, Weights, random_weights, reference, relative_error, routed  # noqa: E402

TINY = Shape("tiny", hidden=128, intermediate=128, experts=8, top_k=2, group=64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu_experts.SHAPES, "qwen3", TINY)
    monkeypatch.setattr(cpu_experts, "_last_level_cache", lambda: 1)


def _canonical(weights: Weights, tokens: int) -> torch.Tensor:
    call = routed(TINY, tokens, 0)
    operands = (call.x.float(), call.weights, call.ids)
    if weights.form == "bf16":
        return torch.ops.moe_fx.experts(*operands, weights.w13.float(), weights.w2.float())
    op = torch.ops.moe_fx.experts_int8 if weights.w13.dtype == torch.int8 else torch.ops.moe_fx.experts_int4
    return op(*operands, weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)


@pytest.mark.parametrize("form", FORMATS)
def test_reference_agrees_with_the_canonical_op(form: str) -> None:
    weights = random_weights(TINY, form, seed=0)
    torch.testing.assert_close(reference(weights, routed(TINY, 5, 0)), _canonical(weights, 5), rtol=1e-4, atol=1e-5)


def test_routing_is_repeatable_and_distinct() -> None:
    call, again, other = routed(TINY, 6, 1), routed(TINY, 6, 1), routed(TINY, 6, 2)
    assert torch.equal(call.ids, again.ids) and torch.equal(call.x, again.x)
    assert not torch.equal(call.ids, other.ids)
    assert all(row.unique().numel() == TINY.top_k for row in call.ids)
    assert call.experts_hit == call.ids.unique().numel()


def test_relative_error_sees_a_swapped_expert() -> None:
    weights = random_weights(TINY, "bf16", seed=0)
    swapped = Weights("bf16", weights.w13.roll(1, dims=0), weights.w2)
    call = routed(TINY, 5, 0)
    assert relative_error(weights, call, lambda operands: reference(weights, operands)) == 0
    assert relative_error(weights, call, lambda operands: reference(swapped, operands)) > cpu_experts.ERROR_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_the_engine_is_measured(
    tiny: None, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layer", "qwen3", "--formats", form, "--tokens", "1", "70", "--threads", "1", "--seconds", "0"]
    arguments += ["--patience", "0"]
    monkeypatch.setattr(sys, "argv", ["cpu_experts.py", *arguments, "--json"])
    assert cpu_experts.main() == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["unavailable"] == {}
    assert result["errors"]["moe-fx"] < (0.03 if "a8" in form else 0.01)
    assert [row["tokens"] for row in result["rows"]] == [1, 70]
    for row in result["rows"]:
        assert row["left_out"] == {}
        assert row["cells"]["moe-fx"]["seconds"] > 0
        assert row["stream_gb_per_s"] > 0


SERVER = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS / "peers")!r})
from layer import reference
from serving import Form, Layer, Unavailable, serve

def prepare(weights, shape, threads):
    return Layer(lambda call: reference(weights, call) * FACTOR, shape.expert_bytes(weights.form))

def refuse(weights, shape, threads):
    print("noise on standard output")
    raise Unavailable("needs another CPU")

def die(weights, shape, threads):
    sys.exit("no such library")

serve({{"bf16": Form("reference", PREPARE, MAX_TOKENS)}})
"""


def _candidate(folder: Path, prepare: str, factor: float = 1.0, max_tokens: int | None = None) -> Candidate:
    script = folder / f"{prepare}_{factor}.py"
    constants = f"FACTOR, MAX_TOKENS = {factor}, {max_tokens}\n"
    script.write_text(constants + SERVER.replace("PREPARE", prepare))
    return Candidate(script.stem, str(script), ("bf16",))


@pytest.mark.slow
def test_what_fails_is_reported_and_the_rest_runs(tiny: None, tmp_path: Path) -> None:
    candidates = [
        _candidate(tmp_path, "prepare", max_tokens=4),
        _candidate(tmp_path, "prepare", factor=2.0),
        _candidate(tmp_path, "refuse"),
        _candidate(tmp_path, "die"),
        Candidate("other", "none.py", ("w8a8",)),
        Candidate("absent", "none.py", ("bf16",), (("nothing",),)),
    ]
    bench = Bench(TINY, "bf16", 1, 0.0, 0.0, lambda threads: 10.0, Console(file=io.StringIO()))
    result = bench.run(candidates, [1, 8])
    assert list(result.columns) == ["prepare_1.0"]
    assert result.unavailable["prepare_2.0"] == "wrong: relative error 1"
    assert result.unavailable["refuse_1.0"] == "needs another CPU"
    assert result.unavailable["die_1.0"] == "ended with 1: no such library"
    assert result.unavailable["other"] == "has no bf16 kernel"
    assert "--install-peers" in result.unavailable["absent"]
    one, eight = result.rows
    assert one.cells["prepare_1.0"].gb_per_s > 0
    assert eight.left_out == {"prepare_1.0": "at most 4 tokens"} and not eight.cells


class _Fake:
    """Calls of 1 s that hit 4 experts of 1 GB."""

    name, settle_seconds, expert_bytes, pid = "fake", 0.0, 1e9, 0

    def ask(self, calls: int, **request: object) -> dict[str, list[float]]:
        return {"seconds": [1.0] * calls, "experts": [4.0] * calls}


def test_rates_count_the_experts_hit_against_the_reads_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_experts, "_busy_seconds", lambda: 0.0)
    reads = itertools.cycle([6.0, 10.0])
    bench = Bench(TINY, "bf16", 1, 0.0, 0.0, lambda threads: next(reads), Console(file=io.StringIO()))
    row = bench._row([_Fake()], tokens=4)  # type: ignore[list-item]
    cell = row.cells["fake"]
    assert (cell.seconds, cell.gb_per_s, cell.fraction, row.stream_gb_per_s, row.quiet) == (1.0, 4.0, 0.5, 8.0, True)
    assert cell.gflop_per_s == pytest.approx(2 * 4 * TINY.top_k * 3 * 128 * 128 / 1e9)


def test_busy_rounds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = itertools.count(0.0, 1000.0)
    monkeypatch.setattr(cpu_experts, "_busy_seconds", lambda: next(busy))
    bench = Bench(TINY, "bf16", 1, 0.0, 0.0, lambda threads: 8.0, Console(file=io.StringIO()))
    row = bench._row([_Fake()], tokens=4)  # type: ignore[list-item]
    assert not row.quiet and row.cells["fake"].calls == cpu_experts.MIN_ROUNDS


def test_tables_show_every_format_or_every_candidate() -> None:
    def result(form: str, unavailable: dict[str, str]) -> Result:
        cell = Cell(seconds=123e-6, fast_seconds=1e-4, gb_per_s=27.06, fraction=0.934, gflop_per_s=321, calls=9)
        rows = [Row(1, 29.0, True, {"moe-fx": cell}), Row(64, 29.0, False, {"moe-fx": cell})]
        return Result(TINY, form, 2, {"moe-fx": "an_op"}, {"moe-fx": 0.01}, unavailable, rows)

    console = Console(width=120, record=True, file=io.StringIO())
    for table, notes in cpu_experts.tables([result("bf16", {}), result("w8a8", {})]):
        console.print(table)
        console.print(notes)
    text = console.export_text()
    assert "int8 W8A8" in text and "27.1 GB/s, 0.93" in text and "~123 µs" in text
    assert text.count("321 GFLOP/s") == 2
    tables = cpu_experts.tables([result("bf16", {"vllm": "not installed"}), result("w8a8", {})])
    assert len(tables) == 2
    assert "an_op, relative error 0.01" in tables[0][1] and "vllm: not installed" in tables[0][1]
