"""`moe-fx build-ascend` on machines that lack something: what it says. Builds are tested in tests/ascend."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from moe_fx import ascend_build, ascend_library, cli, doctor
from moe_fx.errors import MissingToolchainError


@pytest.fixture
def cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like a CANN toolkit."""
    home = tmp_path / "cann"
    (home / "compiler" / "tikcpp" / "ascendc_kernel_cmake").mkdir(parents=True)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    return home


def test_without_cann(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    assert cli.main(["build-ascend"]) == 2
    assert "source its set_env.sh" in capsys.readouterr().err


def test_cann_by_either_variable(cann: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ascend_build.cann_home() == cann
    monkeypatch.delenv("ASCEND_HOME_PATH")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(cann))
    assert ascend_build.cann_home() == cann


def test_a_folder_that_is_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(MissingToolchainError, match="not the runtime alone"):
        ascend_build.cann_home()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    with pytest.raises(MissingToolchainError, match=r"ASCEND_HOME_PATH names .*gone, which is not a folder"):
        ascend_build.cann_home()


def test_without_cmake(cann: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(MissingToolchainError, match="cmake is not found"):
        ascend_build.build()


def test_cmake_of_an_environment_that_is_not_activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "cmake").touch(mode=0o755)
    assert ascend_build._cmake() == str(tmp_path / "cmake")


def test_without_torch_npu(cann: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_npu" else find_spec(name))
    with pytest.raises(MissingToolchainError, match="torch_npu is not installed"):
        ascend_build.build()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_build_that_fails_shows_its_end(cann: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(MissingToolchainError, match=r"do not fit:\n(?s:.*)ASC"):  # This CANN has no language ASC.
        ascend_build.build(tmp_path)
    assert not (tmp_path / ascend_library.FILE_NAME).exists()


def test_the_doctor_looks_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> doctor.Check:
        (target,) = (target for target in doctor.diagnose().targets if target.name == "ascend")
        (found,) = (check for check in target.checks if check.name == "Ascend C kernels")
        assert not found.required
        return found

    library = tmp_path / "kernels.so"
    monkeypatch.setenv(ascend_library.VARIABLE, str(library))
    assert "MOE_FX_ASCENDC_LIBRARY names" in check().found and not check().ok
    library.touch()
    assert check() == doctor.Check("Ascend C kernels", True, str(library), required=False)
    monkeypatch.delenv(ascend_library.VARIABLE)
    monkeypatch.setattr(doctor, "default_path", lambda: tmp_path / "missing.so")
    assert "moe-fx build-ascend" in check().remedy
