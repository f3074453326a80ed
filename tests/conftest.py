"""Every test starts with an empty dynamo, quiet libraries and fixed random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # transformers caches version checks, which dynamo remarks on at every trace.
        warnings.filterwarnings("ignore", message=".*lru_cache.*")
        yield
    torch._dynamo.reset()
