"""The verdicts of `moe_fx.doctor`: this machine's, and those of machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from moe_fx import doctor


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Let the doctor see these versions (None: not installed) and the real ones of all other packages."""
    real = importlib.metadata.version

    def version(distribution: str) -> str:
        found = versions[distribution] if distribution in versions else real(distribution)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def look(target: str, check: str) -> doctor.Check:
    """One check of a fresh diagnosis."""
    (found,) = (t for t in doctor.diagnose().targets if t.name == target)
    (named,) = (c for c in found.checks if c.name == check)
    return named


def test_this_machine_serves_the_cpu_target() -> None:
    diagnosis = doctor.diagnose()
    ready = {target.name: target.ready for target in diagnosis.targets}
    assert list(ready) == ["cpu", "cuda", "ascend"]
    assert ready["cpu"], diagnosis.targets[0]
    assert diagnosis.cpu is not None


def test_every_failed_check_names_a_way_out() -> None:
    for target in doctor.diagnose().targets:
        for check in target.checks:
            assert check.found
            assert check.ok or check.remedy, check


def test_to_dict_survives_json() -> None:
    data = doctor.diagnose().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["targets"]["cpu"]["ready"] is True
    assert data["software"]["moe-fx"] == importlib.metadata.version("moe-fx")


def test_optional_packages_are_not_imported() -> None:
    doctor.diagnose()
    assert "torch_npu" not in sys.modules


def test_supported_torch_is_what_the_package_declares() -> None:
    (low, high) = (".".join(map(str, bound)) for bound in doctor.SUPPORTED_TORCH)
    requirements = importlib.metadata.requires("moe-fx") or []
    (declared,) = (line for line in requirements if line.startswith("torch") and "extra" not in line)
    assert set(declared.removeprefix("torch").replace(" ", "").split(",")) == {f">={low}", f"<{high}"}


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("2.13.1.dev20260101", True), ("2.14.0", False)],
)
def test_torch_outside_the_range_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    pretend_installed(monkeypatch, {"torch": version})
    check = look("cpu", "torch")
    assert check.ok is ok
    assert version in check.found
    if not ok:
        assert check.remedy == "pip install 'torch>=2.10,<2.14'"


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    check = look("cpu", "Inductor")
    assert (check.ok, check.found) == (False, "no g++ found")
    assert "install g++" in check.remedy

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert look("cpu", "Inductor").found == "CXX names 'no-such-compiler', which is not there"


def test_inductor_needs_the_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    check = look("cpu", "Inductor")
    assert not check.ok
    assert "Python.h" in check.found


def test_a_missing_extension_leaves_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_fx

    monkeypatch.setitem(sys.modules, "moe_fx._C", None)
    monkeypatch.delattr(moe_fx, "_C", raising=False)
    diagnosis = doctor.diagnose()
    assert diagnosis.cpu is None
    assert not diagnosis.targets[0].ready
    assert "pip install" in look("cpu", "moe_fx._C").remedy


def test_cuda_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert look("cuda", "CUDA device").remedy == "install a CUDA build of torch"

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look("cuda", "CUDA device").found == "torch sees no device"

    devices = [SimpleNamespace(name="A", major=9, minor=0), SimpleNamespace(name="B", major=8, minor=6)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    assert look("cuda", "CUDA device") == doctor.Check("CUDA device", True, "A (sm_90), B (sm_86), CUDA 13.0")


@pytest.mark.parametrize(
    ("torch_npu", "ok", "found"),
    [
        (None, False, "not installed"),
        ("2.12.0", False, "2.12.0 does not fit torch 2.13.0"),
        ("2.13.0.post1", True, "2.13.0.post1"),
    ],
)
def test_torch_npu_must_be_of_torchs_release(
    monkeypatch: pytest.MonkeyPatch, torch_npu: str | None, ok: bool, found: str
) -> None:
    pretend_installed(monkeypatch, {"torch": "2.13.0", "torch-npu": torch_npu})
    check = look("ascend", "torch_npu")
    assert (check.ok, check.found) == (ok, found)
    if not ok:
        assert check.remedy == "pip install 'torch-npu==2.13.*'"


def test_cann_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert look("ascend", "CANN").found == "ASCEND_HOME_PATH is not set"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    assert not look("ascend", "CANN").ok
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert look("ascend", "CANN") == doctor.Check("CANN", True, str(tmp_path))


def test_a_target_is_ready_without_what_it_does_not_require() -> None:
    needed = doctor.Check("needed", True, "here")
    missing = doctor.Check("wanted", False, "not here", "get it", required=False)
    assert doctor.Target("t", (needed, missing)).ready
    assert not doctor.Target("t", (needed, doctor.Check("needed too", False, "not here", "get it"))).ready


def test_render_shows_the_verdict_and_the_way_out() -> None:
    checks = (doctor.Check("compiler", True, "[cc]"), doctor.Check("driver", False, "no driver", "install [it]"))
    diagnosis = doctor.Diagnosis("Linux", {"torch": "2.13.0", "triton": None}, None, (doctor.Target("cuda", checks),))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(doctor.render(diagnosis))
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["cuda:", "not", "ready"] in lines
    assert ["✓", "compiler", "[cc]"] in lines
    assert ["✗", "driver", "no", "driver"] in lines
    assert ["→", "install", "[it]"] in lines
    assert ["triton", "not", "installed"] in lines


def test_render_describes_the_host() -> None:
    diagnosis = doctor.diagnose()
    assert diagnosis.cpu is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(doctor.render(diagnosis))
    text = capture.get()
    assert f"{diagnosis.cpu['logical_cpus']} threads" in text
    assert "NUMA node" in text
    assert "cpu: ready" in text
