"""The library of Ascend C kernels for the stand-in: ``moe-fx build-ascend`` with ``toolkit`` in place of CANN's.

Kernels and their launches are the sources that CANN would compile; here g++ does, and they run on the host model.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

from host_cann.build import HERE, ROOT

SOURCES = ROOT / "csrc" / "ascendc"
TOOLKIT = HERE / "toolkit"


@functools.cache
def library() -> Path:
    """The library, built where it is not there yet: once per version of torch, torch_npu and all sources."""
    from moe_fx import ascend_build
    from moe_fx.ascend_library import FILE_NAME

    digest = hashlib.sha256(f"{version('torch')} {version('torch_npu')}".encode())
    own = (HERE / "host_cann.h", Path(str(ascend_build.__file__)))
    for path in (*sorted(SOURCES.rglob("*")), *sorted(TOOLKIT.rglob("*")), *own):
        if path.is_file() and "tests" not in path.relative_to(ROOT).parts[2:-1]:
            digest.update(path.read_bytes())
    folder = ROOT / "build" / "host_ascendc"
    built = folder / digest.hexdigest()[:16] / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            with mock.patch.dict(os.environ, ASCEND_HOME_PATH=str(TOOLKIT)):
                ascend_build.build(built, folder / "objects")
    return built


if __name__ == "__main__":
    import host_cann.preload  # noqa: F401  The import of torch loads torch_npu.

    sys.stdout.write(
        f"{library() if shutil.which('cmake') else 'no cmake: tests of the Ascend C kernels are skipped'}\n"
    )
