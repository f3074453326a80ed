"""GE operators of the project's own, which a library brings: GE runs them by calling them, on device memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from host_cann.ge_ops import RUNTIME_CODES, RUNTIME_DTYPES
from host_cann.host_tensor import HostTensor

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint64)
_UNKNOWN = -1


def run(operator: str, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The operator's one output; None where no library brings it.

    Raises:
        RuntimeError: the operator failed, or did not make what its inference says.
    """
    from host_cann.preload import LIBRARY

    LIBRARY.aclGetRecentErrMsg.restype = ctypes.c_char_p
    given = (HostTensor * len(inputs))()
    on_device = [operand if operand is None else operand.contiguous().npu() for operand in inputs]
    for place, operand in zip(given, on_device, strict=True):
        if operand is not None:
            place.dtype, place.ndim, place.data = RUNTIME_CODES[operand.dtype], operand.dim(), operand.data_ptr()
            place.dims[: operand.dim()] = operand.shape
    memory: dict[int, torch.Tensor] = {}

    def allocate(size: int) -> int:
        block = torch.empty(max(size, 1), dtype=torch.uint8, device="npu")
        memory[block.data_ptr()] = block
        return block.data_ptr()

    made = HostTensor()
    status = LIBRARY.host_cann_run_custom_op(
        operator.encode(), len(given), given, ctypes.byref(made), _ALLOCATE(allocate)
    )
    if status == _UNKNOWN:
        return None
    if status:
        why: Any = LIBRARY.aclGetRecentErrMsg() if status == 1 else b"the output is not what its inference says"
        raise RuntimeError(f"{operator}: {why.decode()}")
    dtype, sizes = RUNTIME_DTYPES[made.dtype], made.dims[: made.ndim]
    # Of none, one byte was allocated.
    return memory[made.data].cpu()[: math.prod(sizes) * dtype.itemsize].view(dtype).reshape(sizes)
