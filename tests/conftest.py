"""Every test starts with an empty dynamo, quiet libraries and fixed random numbers; Triton interprets without a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is imported and when a kernel is decorated: before any test module can do either.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile cache of its own, so that no test finds what another one kept."""
    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path_factory.mktemp("moe_fx_cache")))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # transformers caches version checks, which dynamo remarks on at every trace.
        warnings.filterwarnings("ignore", message=".*lru_cache.*")
        yield
    torch._dynamo.reset()
