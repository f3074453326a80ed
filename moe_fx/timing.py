"""Comparing callables by time: interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved_medians"]


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_seconds: float = 5.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, float]:
    """Median seconds per call of each candidate.

    Each round calls every candidate once, so drifts of clock and load fall on all of them. Rounds go on until the
    budget is spent, within the given numbers of rounds; one round before the first is not counted.
    """
    for call in candidates.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + budget_seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}
