"""The tests of the Ascend target run on ``npu:0`` of the CANN stand-in; elsewhere each file skips itself.

Those marked ``npu`` run on hardware too (`make test-npu`), where the stand-in is not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

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
