"""The tests of the Ascend target run on ``npu:0`` of the CANN stand-in; elsewhere each file skips itself.

Those marked ``npu`` run on hardware too (`make test-npu`), where the stand-in is not loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def installed() -> None:
    import host_cann
    from npu_report import on_hardware

    if not on_hardware():
        host_cann.install()


@pytest.fixture(autouse=True)
def stand_in(installed: None) -> Iterator[None]:
    """An interpreter that has counted nothing and met no error."""
    from host_cann import ge_interpreter

    ge_interpreter.COUNTS.clear()
    ge_interpreter.LAST_ERROR.clear()
    yield


@pytest.fixture(scope="session")
def built_kernels() -> Path | None:
    """The library of Ascend C kernels for the host model; None on hardware."""
    from npu_report import on_hardware

    if on_hardware():
        return None
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake; Debian: apt-get install cmake")
    from host_cann import kernels

    return kernels.library()


@pytest.fixture
def kernels(built_kernels: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library, loaded as a user's would be; on hardware, the user's."""
    from moe_fx.ascend_library import VARIABLE
    from moe_fx.lowering.ascend import kernel_library

    if built_kernels is not None:
        monkeypatch.setenv(VARIABLE, str(built_kernels))
    kernel_library.loaded.cache_clear()
    library = kernel_library.loaded()
    if library is None:
        pytest.skip("needs the Ascend C kernels; run: moe-fx build-ascend")
    yield library
    kernel_library.loaded.cache_clear()
