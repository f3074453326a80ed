"""`moe-fx build-ascend`: build the library of Ascend C kernels for this machine's CANN, PyTorch and torch_npu.

The sources come with the package. A machine without CANN never needs the library: the Ascend target then takes
torch_npu's own operators.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_fx import __version__
from moe_fx.ascend_library import FILE_NAME, default_path, sources
from moe_fx.errors import MissingToolchainError

__all__ = ["build", "cann_home"]

_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
# Ascend C in CMake, as CANN has it in its folders; what `find_package(ASC)` reads is there from CANN 8.5 on.
_KERNEL_CMAKE = "*/tikcpp/ascendc_kernel_cmake"
_ASC_CONFIGS = ("asc-config.cmake", "ASCConfig.cmake")
_SHOWN_LINES = 40


def build(
    output: str | Path | None = None,
    build_dir: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Build the library and return its path.

    Args:
        output: the file to write, or a folder to write it into, which exists or ends in a separator; default its place
            in the package.
        build_dir: keeps what the build makes, for a faster next one; default a temporary folder.
        log: is told each step.

    Raises:
        MissingToolchainError: something that the build needs is not there, or the build failed; the message says what.
    """
    if not sys.platform.startswith("linux"):
        raise MissingToolchainError(f"CANN runs on Linux only; this is {sys.platform}")
    cann, cmake, source = cann_home(), _cmake(), sources()
    for package, remedy in (("torch", "torch>=2.10"), ("torch_npu", "torch-npu, in the release of your torch")):
        if importlib.util.find_spec(package) is None:
            raise MissingToolchainError(f"{package} is not installed in this environment; pip install {remedy}")
    target = _target(output)
    if not os.access(_nearest(target.parent), os.W_OK):
        raise MissingToolchainError(f"{target.parent} cannot be written to; name another place with --output")
    with tempfile.TemporaryDirectory(prefix="moe_fx_ascendc_") as temporary:
        folder = build_dir or Path(temporary)
        log(f"CANN {cann}")
        log(f"building {source} in {folder}")
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMOE_FX_VERSION={__version__}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if (config := _asc_config(cann)) is not None:
            options.append(f"-DASC_DIR={config.parent}")
        _run([cmake, "-S", str(source), "-B", str(folder), *options], cann)
        _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], cann)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Put in place as a whole: another process may be loading the one before.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(folder / FILE_NAME, partial)
        partial.replace(target)
    log(f"wrote {target}")
    return target


def cann_home() -> Path:
    """The folder of CANN.

    Raises:
        MissingToolchainError: there is none, or one too old to build for.
    """
    name, home = next(((name, os.environ[name]) for name in _HOMES if os.environ.get(name)), ("", ""))
    if not home:
        raise MissingToolchainError(
            f"CANN is not found: neither {' nor '.join(_HOMES)} is set; install the CANN toolkit (8.5 or later) and "
            "source its set_env.sh"
        )
    if not Path(home).is_dir():
        raise MissingToolchainError(f"{name} names {home}, which is not a folder; source the set_env.sh of your CANN")
    if not any(Path(home).glob(_KERNEL_CMAKE)):
        raise MissingToolchainError(
            f"{home} is no CANN toolkit that compiles Ascend C (it has no {_KERNEL_CMAKE}); install the CANN toolkit, "
            "8.5 or later, not the runtime alone"
        )
    return Path(home)


def _asc_config(cann: Path) -> Path | None:
    """The file by which CMake knows the language ASC; None where CANN tells CMake in its own ways."""
    places = (f"{_KERNEL_CMAKE}{folder}/{name}" for name in _ASC_CONFIGS for folder in ("", "/*"))
    return next((path for place in places for path in sorted(cann.glob(place))), None)


def _target(output: str | Path | None) -> Path:
    """The file to write."""
    if output is None:
        return default_path()
    # A path does not keep a separator at its end, by which a folder is named that is not there yet.
    is_folder = str(output).endswith(os.sep) or Path(output).is_dir()
    return Path(output) / FILE_NAME if is_folder else Path(output)


def _cmake() -> str:
    # Beside Python too: an environment need not be activated to be used.
    places = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    cmake = shutil.which("cmake", path=os.pathsep.join(places))
    if cmake is None:
        raise MissingToolchainError("cmake is not found; pip install cmake (3.21 or later)")
    return cmake


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _run(command: list[str], cann: Path) -> None:
    environment = {**os.environ, "ASCEND_HOME_PATH": str(cann)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
        raise MissingToolchainError(f"{' '.join(command[:2])} ... failed; CANN, cmake or compiler do not fit:\n{tail}")
