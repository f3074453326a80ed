"""What launchers ask of the device that a tensor lies on: its family, and how many programs fill it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Triton decides this when a kernel is decorated, so it is a constant of the process: kernels run in its interpreter, on
# CPU tensors, for tests without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Kernels with bf16 and 16-byte asynchronous copies in mind; Triton itself supports little that is older.
OLDEST_CAPABILITY = (8, 0)
# The first GPUs with programmatic dependent launch.
_DEPENDENT_LAUNCH_CAPABILITY = (9, 0)
# Programs of a looping kernel for each multiprocessor: enough warps to hide latency, few enough to start at once.
_PROGRAMS_PER_MULTIPROCESSOR = 8
_INTERPRETED_PROGRAMS = 3


def unavailable(device: torch.device) -> str | None:
    """Why no kernel can run on tensors of that device, or None.

    A fake tensor's device counts as real: a graph is lowered before it meets its inputs.
    """
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton interprets its kernels here (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    if torch.version.hip:
        return "the GPU is AMD's, for which these kernels were never compiled"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = _capability(_index(device))
    if capability < OLDEST_CAPABILITY:
        return "the GPU is of compute capability {}.{}; the kernels need {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return None


def family(device: torch.device) -> str:
    """The GPU family that tuned launch parameters are kept for: ``sm_90``, or ``interpreter``."""
    return "interpreter" if INTERPRETED else "sm_{}{}".format(*_capability(_index(device)))


def programs(tensor: torch.Tensor, each: int = _PROGRAMS_PER_MULTIPROCESSOR) -> int:
    """Programs of a kernel that loops over its work, on the device of ``tensor``: ``each`` to a multiprocessor."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return _multiprocessors(_index(tensor.device)) * each


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may start before the kernel ahead of it has ended; see ``dependent_launch.py``.

    {"PDL": true, "launch_pdl": true} where the GPU has programmatic dependent launch, else {"PDL": false}.
    """
    if INTERPRETED or _capability(_index(device)) < _DEPENDENT_LAUNCH_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher on the device of its first operand, whatever the current one is, on which Triton would launch."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor)), None)
        with torch.cuda.device(first.device) if first is not None and first.is_cuda else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return run


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
