"""Kernels that are interpreted treat bf16 as a GPU does, in every test here."""

import pytest
from interpreted_bf16 import bf16_as_on_a_gpu  # noqa: F401


@pytest.fixture(autouse=True)
def _bf16_as_on_a_gpu(bf16_as_on_a_gpu: None) -> None:  # noqa: F811
    pass
