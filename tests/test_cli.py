"""The command `moe-fx`: its arguments, its exit status and how it reports errors."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_fx import cli, doctor, errors

FAKE_REPORT = {"sites": 2}


@dataclass
class FakeExplanation:
    def to_dict(self) -> dict[str, int]:
        return FAKE_REPORT

    def to_html(self) -> str:
        return "<p>é</p>"

    def __rich__(self) -> str:
        return "two sites"


def replace_explain(monkeypatch: pytest.MonkeyPatch, explain_pretrained: Callable[..., Any]) -> None:
    module = ModuleType("moe_fx.explain_model")
    module.explain_pretrained = explain_pretrained  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_fx.explain_model", module)


def test_installed_command_prints_its_version() -> None:
    script = Path(sysconfig.get_path("scripts"), "moe-fx")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "moe-fx 0.1.0\n"


def test_doctor_prints_the_diagnosis(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "cpu: ready" in capsys.readouterr().out


def test_doctor_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.diagnose().to_dict()


def test_doctor_fails_when_no_target_works(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = doctor.Check("torch", False, "not installed", "pip install torch")
    sick = doctor.Diagnosis("Linux", {}, None, (doctor.Target("cpu", (missing,)),))
    monkeypatch.setattr(doctor, "diagnose", lambda: sick)
    assert cli.main(["doctor"]) == 1


def test_explain_passes_every_argument_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def explain_pretrained(model: str, **settings: Any) -> FakeExplanation:
        calls.append((model, settings))
        return FakeExplanation()

    replace_explain(monkeypatch, explain_pretrained)

    assert cli.main(["explain", "some/model"]) == 0
    assert capsys.readouterr().out == "two sites\n"

    page = tmp_path / "report.html"
    flags = "--layers 2 --tokens 5 --dtype float32 --experts-implementation eager --no-dynamic --trust-remote-code"
    assert cli.main(["explain", "some/model", *flags.split(), "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out) == FAKE_REPORT
    assert page.read_text(encoding="utf-8") == "<p>é</p>"

    defaults = {
        "layers": None,
        "tokens": 16,
        "dtype": "bfloat16",
        "experts_implementation": None,
        "dynamic": None,
        "trust_remote_code": False,
    }
    given = {
        "layers": 2,
        "tokens": 5,
        "dtype": "float32",
        "experts_implementation": "eager",
        "dynamic": False,
        "trust_remote_code": True,
    }
    assert calls == [("some/model", defaults), ("some/model", given)]


@pytest.mark.parametrize(
    "kind",
    [
        errors.CaptureError,
        errors.CheckError,
        errors.MissingToolchainError,
        errors.MoeFxError,
        errors.OptionError,
        errors.UnsupportedError,
    ],
)
def test_a_known_error_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[errors.MoeFxError]
) -> None:
    message = "no model [here]; " + "look elsewhere " * 20 + "end"

    def explain_pretrained(model: str, **settings: Any) -> FakeExplanation:
        raise kind(message)

    replace_explain(monkeypatch, explain_pretrained)
    assert cli.main(["explain", "nowhere"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {message}\n"


def test_an_unknown_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain_pretrained(model: str, **settings: Any) -> FakeExplanation:
        raise ZeroDivisionError

    replace_explain(monkeypatch, explain_pretrained)
    with pytest.raises(ZeroDivisionError):
        cli.main(["explain", "nowhere"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["cure"], "invalid choice: 'cure'"),
        (["explain"], "MODEL"),
        (["explain", "m", "--layers", "0"], "'0' is not a whole number above zero"),
        (["explain", "m", "--tokens", "-3"], "'-3' is not a whole number above zero"),
        (["explain", "m", "--dtype", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_option_errors_are_value_errors() -> None:
    assert issubclass(errors.OptionError, ValueError)
