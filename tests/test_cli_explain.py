"""`moe-fx explain MODEL`: models of transformers by type and by configuration, and what it says of wrong names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_fx import cli

transformers = pytest.importorskip("transformers")


def explain_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_type_is_built_at_its_real_size(capsys: pytest.CaptureFixture[str]) -> None:
    data = explain_json(capsys, "gpt_oss")
    assert data["model"] == "GptOssForCausalLM"
    assert data["matched"]["router"] == data["matched"]["experts"] == 2
    assert data["notes"] == ["2 of 36 layers, from the configuration alone: no weights were loaded"]


def test_dense_layers_in_front_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    data = explain_json(capsys, "deepseek_v3")
    assert data["notes"][0].startswith("4 of 61 layers")
    assert data["matched"]["experts"] == 1
    assert {s["module"] for s in data["graphs"][0]["sites"] if s["kind"] == "router"} == {"model.layers.3.mlp.gate"}


@pytest.mark.parametrize("whole_path", [False, True])
def test_a_configuration_on_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path, whole_path: bool) -> None:
    transformers.Qwen3MoeConfig(num_hidden_layers=5, hidden_size=64, num_experts=16).save_pretrained(tmp_path)
    path = tmp_path / "config.json" if whole_path else tmp_path
    data = explain_json(capsys, str(path), "--layers", "3", "--experts-implementation", "batched_mm", "--no-dynamic")
    assert data["notes"][0].startswith("3 of 5 layers")
    forms = {site["form"] for site in data["graphs"][0]["sites"] if site["kind"] == "experts"}
    assert forms == {"batched_mm"}


def test_text_and_html(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    assert cli.main(["explain", "qwen3_moe", "--tokens", "4", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert "model.layers.{0..1}.mlp.experts" in captured.out
    assert "model.layers.{0..1}.mlp.experts" in page.read_text(encoding="utf-8")
    assert "Traceback" not in captured.err


def test_an_unknown_type_lists_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "qwen3-mo"]) == 2
    assert "did you mean qwen3_moe" in capsys.readouterr().err


def test_a_folder_without_a_configuration_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_a_broken_configuration_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: transformers finds no configuration for")


def test_a_model_that_cannot_be_built_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers.Qwen3MoeConfig(hidden_size=64, num_experts=4, num_experts_per_tok=9).save_pretrained(tmp_path)
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert "could not be built and traced without weights" in capsys.readouterr().err


def test_without_transformers_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["explain", "qwen3_moe"]) == 2
    assert "pip install 'moe-fx[models]'" in capsys.readouterr().err
