"""Device time of a call as serving sees it: replayed from a CUDA graph, with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from moe_fx.lowering.cuda.device import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
# Read between two replays, to leave nothing of the weights in the level-2 cache (50 MB on an H100 or H200).
_FLUSHED_BYTES = 256 << 20
_WARM_UP = 3


def graph_microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """The median time of one replay of ``call``'s CUDA graph on the current device, in microseconds.

    ``call`` takes no arguments, keeps its operands alive and can be captured. Before each replay a buffer larger than
    the level-2 cache is read: reading, unlike writing, leaves no lines to be written back during the timed replay.
    """
    graph = capture(call)
    flushed = torch.zeros(_FLUSHED_BYTES // 4, dtype=torch.float32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flushed.max()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` as a CUDA graph, captured after warm-up calls on a side stream (which compile what must be compiled)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def copy_bandwidth(size: int = 1 << 30, repeats: int = 20) -> float:
    """Bytes a second that a copy of ``size`` bytes moves, read and written ones added up, best of ``repeats``."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * size / min(times)
