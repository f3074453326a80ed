"""`moe-fx cache` and what `moe-fx doctor` says of the cache."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from moe_fx import doctor
from moe_fx.cache.store import Store
from moe_fx.cli import main


@pytest.fixture
def store(own_cache: None) -> Store:
    store = Store(os.environ["MOE_FX_CACHE_DIR"])
    store.write("graph", {"graph": "a"}, b"x" * 3000, about={"target": "cpu", "matched": {"experts": 48}})
    store.write("graph", {"graph": "b"}, b"y")
    return store


def test_list(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["graph", "graph"]
    assert {row["what"] for row in rows} == {"cpu (48 experts)", ""} and {row["KiB"] for row in rows} == {4, 1}
    assert main(["cache", "list"]) == 0
    assert "cpu (48 experts)" in capsys.readouterr().out


def test_verify_ends_with_one_when_an_entry_is_damaged(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify"]) == 0
    path = store.files()[0]
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["cache", "verify", "--json"]) == 1
    verdicts = {row["entry"]: row["verdict"] for row in json.loads(capsys.readouterr().out)}
    assert "truncated or damaged" in verdicts.pop(path.name) and list(verdicts.values()) == ["good"]


def test_clear(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 2 entries from {store.folder}\n"
    assert store.files() == []
    assert main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": 0}


def test_another_directory(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", "--json", "--dir", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == [] and not (tmp_path / "none").exists()


def test_a_directory_that_others_may_write_to_is_an_error(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.folder.chmod(0o777)
    assert main(["cache", "list"]) == 2
    assert "run: chmod 700" in capsys.readouterr().err.replace("\n", " ")


def _said(width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(doctor.render(doctor.diagnose()))
    return console.export_text()


def test_doctor_tells_where_the_cache_is_and_what_it_holds(store: Store) -> None:
    check = doctor.diagnose().cache
    expected = rf"{re.escape(str(store.folder))}: 2 entries, 3\.\d+ KiB of 1024 MiB"
    assert check.ok and re.fullmatch(expected, check.found)
    assert check.found in _said()
    assert doctor.diagnose().to_dict()["cache"]["found"] == check.found


def test_doctor_tells_of_damaged_entries(store: Store) -> None:
    store.files()[0].write_bytes(b"")
    check = doctor.diagnose().cache
    assert not check.ok and check.found.endswith("1 of them cannot be used") and "moe-fx cache verify" in check.remedy
    assert check.remedy in _said()


@pytest.mark.parametrize(
    ("variable", "value", "found", "remedy"),
    [
        ("MOE_FX_CACHE", "off", "switched off by MOE_FX_CACHE", "unset MOE_FX_CACHE"),
        ("MOE_FX_CACHE_MAX_MIB", "much", "MOE_FX_CACHE_MAX_MIB is 'much'", "give a whole number of MiB"),
    ],
)
def test_doctor_tells_why_it_is_off(
    variable: str, value: str, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    check = doctor.diagnose().cache
    assert not check.ok and check.found.startswith(found) and check.remedy.startswith(remedy)


def test_doctor_tells_of_a_directory_that_cannot_be_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.diagnose().cache.found == f"{store.folder} cannot be written to"
    store.folder.chmod(0o777)
    check = doctor.diagnose().cache
    assert check.found.startswith("others may write") and check.remedy.startswith("run: chmod 700")
