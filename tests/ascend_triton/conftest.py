"""One compilation of every Ascend case for all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_cases import all_cases
from triton_compile import Result, ascend_compilers_missing, compile_ascend


@pytest.fixture(scope="session")
def ascend_compilers() -> None:
    """Skip where kernels cannot be compiled for Ascend."""
    if reason := ascend_compilers_missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Linalg and HIVM of every case lie; pytest keeps the folders of the last runs."""
    return tmp_path_factory.mktemp("ascend")


@pytest.fixture(scope="session")
def results(ascend_compilers: None, modules: Path) -> dict[str, Result]:
    """What the Ascend compilers made of every case that is not for CUDA alone, by name."""
    return compile_ascend([case for case in all_cases() if case.cuda_only is None], modules)
