"""Where the library of Ascend C kernels lies, where its sources do, and whether it was built from them.

What is in it is `moe_fx.lowering.ascend.kernel_library`'s business.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from moe_fx import __version__
from moe_fx.errors import MissingToolchainError

__all__ = ["FILE_NAME", "VARIABLE", "default_path", "misfit", "named_path", "sources"]

FILE_NAME = "libmoe_fx_ascendc.so"
VARIABLE = "MOE_FX_ASCENDC_LIBRARY"
"""The environment variable that names a library outside the package."""

_PACKAGE = Path(__file__).parent
# In the package, and in the repository, which an editable install runs from.
_SOURCES = (_PACKAGE / "ascendc", _PACKAGE.parent / "csrc" / "ascendc")
# The folders of what it is built from; the others are for tests.
_BUILT = ("ge", "kernels", "launch", "tiling", "torch")
# As csrc/ascendc/torch/identity.cpp has it.
_IDENTITY = re.compile(rb"moe-fx (\S+) with kernel sources ([0-9a-f]{64})\0")


def default_path() -> Path:
    """The place in the package, where `moe-fx build-ascend` puts it."""
    return _PACKAGE / FILE_NAME


def named_path() -> Path | None:
    """What the environment names; None where it names nothing."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def sources() -> Path:
    """The folder of the sources.

    Raises:
        MissingToolchainError: there is none.
    """
    for folder in _SOURCES:
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise MissingToolchainError("this installation of moe-fx lacks the kernels' sources; reinstall it")


def misfit(library: Path) -> str:
    """Why this moe-fx does not use a library, with the way out; empty where it does. The library is not loaded.

    Raises:
        MissingToolchainError: the sources are missing.
    """
    found = _IDENTITY.search(library.read_bytes())
    if found is None:
        reason = f"was not built by moe-fx {__version__}"
    elif (version := found[1].decode()) != __version__:
        reason = f"is of moe-fx {version}, and this is {__version__}"
    elif found[2].decode() != _digest(sources()):
        reason = "was built from other sources than this moe-fx has"
    else:
        return ""
    output = "" if library == default_path() else f" --output {library}"
    return f"{reason}; build it anew with `moe-fx build-ascend{output}`, or remove it"


def _digest(folder: Path) -> str:
    """What csrc/ascendc/CMakeLists.txt makes of the files that it builds from."""
    found = [path for name in _BUILT for path in (folder / name).iterdir() if path.suffix in (".asc", ".cpp", ".h")]
    names = sorted(path.relative_to(folder).as_posix() for path in [folder / "CMakeLists.txt", *found])
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
