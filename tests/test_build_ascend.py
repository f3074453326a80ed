"""`moe-fx build-ascend` on machines that lack something: what it says. Builds are tested in tests/ascend."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from moe_fx import __version__, ascend_build, ascend_library, cli, doctor
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


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ("new/", "new/libmoe_fx_ascendc.so"),
        ("there", "there/libmoe_fx_ascendc.so"),
        ("new/kernels.so", "new/kernels.so"),
    ],
)
def test_where_the_library_is_written(
    output: str,
    written: str,
    cann: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CMake only seems to run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name, path: name)
    monkeypatch.setattr(ascend_build, "_run", lambda command, cann: None)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / ascend_library.FILE_NAME).write_bytes(b"built")
    (tmp_path / "there").mkdir()
    command = ["build-ascend", "--output", f"{tmp_path}/{output}", "--build-dir", str(tmp_path / "build"), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(tmp_path / written)}
    assert (tmp_path / written).read_bytes() == b"built"


def test_the_doctor_looks_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> doctor.Check:
        (target,) = (target for target in doctor.diagnose().targets if target.name == "ascend")
        (found,) = (check for check in target.checks if check.name == "Ascend C kernels")
        assert not found.required
        return found

    library = tmp_path / "kernels.so"
    monkeypatch.setenv(ascend_library.VARIABLE, str(library))
    assert "MOE_FX_ASCENDC_LIBRARY names" in check().found and not check().ok
    library.write_bytes(b"..." + identity() + b"...")
    assert check() == doctor.Check("Ascend C kernels", True, str(library), required=False)
    library.write_bytes(identity(digest="0" * 64))
    assert not check().ok and check().found == f"{library}: was built from other sources than this moe-fx has"
    assert check().remedy == f"build it anew with `moe-fx build-ascend --output {library}`, or remove it"
    monkeypatch.setattr(ascend_library, "_SOURCES", ())
    assert check().found.endswith("lacks the kernels' sources") and check().remedy == "reinstall it"
    monkeypatch.delenv(ascend_library.VARIABLE)
    monkeypatch.setattr(doctor, "default_path", lambda: tmp_path / "missing.so")
    assert "moe-fx build-ascend" in check().remedy


def identity(version: str = __version__, digest: str | None = None) -> bytes:
    digest = digest or ascend_library._digest(ascend_library.sources())
    return f"moe-fx {version} with kernel sources {digest}\0".encode()


def test_what_a_library_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(identity())
    assert ascend_library.misfit(library) == ""
    folder = tmp_path / "ascendc"
    shutil.copytree(ascend_library.sources(), folder)
    monkeypatch.setattr(ascend_library, "_SOURCES", (folder,))
    (folder / "README.md").write_text("other words")
    assert ascend_library.misfit(library) == ""
    with (folder / "kernels" / "vector_math.h").open("a") as header:
        header.write("// more\n")
    assert "other sources" in ascend_library.misfit(library)
    library.write_bytes(identity("0.0.1"))
    assert ascend_library.misfit(library).startswith(f"is of moe-fx 0.0.1, and this is {__version__}; build it anew")
    library.write_bytes(b"")
    assert ascend_library.misfit(library).startswith(f"was not built by moe-fx {__version__}; build it anew")
    monkeypatch.setattr(ascend_library, "default_path", lambda: library)
    assert "`moe-fx build-ascend`" in ascend_library.misfit(library), "which writes there without being told"
