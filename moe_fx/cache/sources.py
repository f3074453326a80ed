"""A digest over moe-fx's own code: passes, canonical ops, lowerings, kernels, tuned tables and compiled libraries."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

from moe_fx.ascend_library import named_path
from moe_fx.cache.errors import Uncacheable

__all__ = ["digest", "file_digests", "files", "require_unchanged"]

# By name: in an editable install the last two lie outside the folder of moe_fx.
_PACKAGES = ("moe_fx", "moe_fx.passes", "moe_fx.lowering")


def files() -> Iterator[tuple[str, Path]]:
    """Every file that takes part, with a name that does not depend on where the package lies."""
    for package in _PACKAGES:
        # Not __path__, which in an editable install also has the repository's root.
        root = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(root).as_posix()}", path
    extension = importlib.util.find_spec("moe_fx._C")
    if extension is not None and extension.origin:
        yield "moe_fx._C", Path(extension.origin)
    library = named_path()
    if library is not None and library.is_file():
        yield library.name, library


@functools.cache
def _process_began() -> float:
    """Seconds since the epoch; where the system does not tell, when this was asked first."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


@functools.cache
def file_digests() -> dict[str, str]:
    """The digest of each file, taken once per process: its code does not change while it runs."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files()}


def require_unchanged(name: str, path: Path) -> None:
    """Refuse a file of code that is not what this process runs.

    Raises:
        Uncacheable: it changed since the process began, so that what runs may not be there any more.
    """
    status = path.stat()
    if max(status.st_mtime, status.st_ctime) > _process_began():
        raise Uncacheable(f"{name} changed while this process runs")


def digest() -> str:
    """The digest over all of them.

    Raises:
        Uncacheable: see :func:`require_unchanged`.
    """
    for name, path in files():
        require_unchanged(f"{name} of moe-fx", path)
    return hashlib.sha256(repr(sorted(file_digests().items())).encode()).hexdigest()
