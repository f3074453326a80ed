"""`python -m moe_fx.demo`, on a tiny model: what it reports, and that it fails when something is not as it must be."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from moe_fx import demo
from moe_fx.demo_model import ModelShape
from moe_fx.timing import interleaved_medians

pytest.importorskip("transformers")

TINY = ModelShape(
    layers=1, hidden=64, expert_hidden=32, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=16, vocabulary=128
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ModelShape", lambda layers: TINY)
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda shape, **how: run(shape, **how, seconds_per_timing=0.01))


@pytest.mark.slow
def test_report_of_a_tiny_model(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--layers", "1", "--tokens", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["explanation"]["matched"] == {"router": 1, "experts": 1, "norm": 3, "qk_norm_rope": 1}
    assert report["accuracy"]["moe_ascend"]["rel_l2"] < demo.LOGITS_BOUND
    assert report["experts_equal"] is True
    assert {count: set(times) for count, times in report["seconds_per_call"].items()} == {
        "1": {"eager", "inductor", "moe_ascend"},
        "5": {"eager", "inductor", "moe_ascend"},
    }


@pytest.mark.slow
def test_what_is_not_fused_fails_the_demo(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_FX_PASSES", "experts=off")
    assert demo.main(["--tokens", "5"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "✗ 0 of 1 layers had their experts matched" in out


def test_errors_out_of_bounds_are_a_problem() -> None:
    report = demo.DemoReport(TINY, tokens=5, explanation=demo.Explanation([]))
    report.accuracy = {
        "inductor": demo.Accuracy(0.0, 0.001, 1.0),
        "moe_ascend": demo.Accuracy(0.0, float("nan"), 1.0),
    }
    assert any("relative L2 error" in problem for problem in demo._problems(report))


def test_rendering_shows_ratios() -> None:
    report = demo.DemoReport(TINY, tokens=5)
    report.seconds = {"1": {"eager": 0.3, "inductor": 0.2, "moe_ascend": 0.1}}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.render(report))
    text = console.export_text()
    assert "3.00×" in text
    assert "2.00×" in text


def test_timing_is_interleaved() -> None:
    calls: list[str] = []

    def caller(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    medians = interleaved_medians({"a": caller("a"), "b": caller("b")}, budget_seconds=0, min_rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(medians) == {"a", "b"}
