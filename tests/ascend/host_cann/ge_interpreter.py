"""Runs the GE graphs that torchair makes, op by op on the CPU; what each op computes is in ``ge_ops``."""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from typing import Any

import torch

from host_cann import custom_ops
from host_cann.ge_ops import DYNAMIC_INPUTS, IR, OPERATORS, PROTO_DTYPES, RUNTIME_CODES, RUNTIME_DTYPES, Op
from host_cann.host_tensor import HostTensor

# Graphs by id, and how often each op type ran since the counter was last cleared.
GRAPHS: dict[int, Any] = {}
OPTIONS: dict[int, dict[str, str]] = {}
COUNTS: Counter[str] = Counter()
# What went wrong in the last run, if anything: GE has only an error code to give.
LAST_ERROR: list[BaseException] = []


_ADD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(ctypes.c_char), ctypes.c_uint64, ctypes.c_char_p)
_TENSORS = ctypes.POINTER(HostTensor)
_RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_int, _TENSORS, ctypes.c_int, _TENSORS)
_KEPT: list[Any] = []


def install() -> None:
    """Make this the engine behind GE sessions."""
    from host_cann.preload import LIBRARY

    LIBRARY.host_cann_alloc.restype = ctypes.c_void_p
    LIBRARY.host_cann_alloc.argtypes = [ctypes.c_uint64]

    def add(graph_id: int, proto: Any, size: int, options: bytes) -> int:
        try:
            from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

            model = ModelDef()
            model.ParseFromString(ctypes.string_at(proto, size))
            GRAPHS[graph_id] = model.graph[0]
            OPTIONS[graph_id] = dict(line.split("=", 1) for line in options.decode().splitlines())
            return 0
        except BaseException:
            traceback.print_exc()
            return 1

    def run(graph_id: int, n_inputs: int, inputs: Any, n_outputs: int, outputs: Any) -> int:
        try:
            results = run_graph(GRAPHS[graph_id], [_as_torch(inputs[i]) for i in range(n_inputs)])
            for result, output in zip(results, (outputs[i] for i in range(n_outputs)), strict=True):
                _give(result.contiguous(), output, LIBRARY)
            return 0
        except BaseException as error:
            LAST_ERROR[:] = [error]
            traceback.print_exc()
            return 1

    for operator, description in IR.items():
        LIBRARY.host_cann_register_ir(operator.encode(), description.encode())
    _KEPT[:] = [_ADD(add), _RUN(run)]
    LIBRARY.host_cann_set_ge_callbacks(*_KEPT)


def run_graph(graph: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Execute a ``GraphDef``; its ops come in topological order.

    Raises:
        NotImplementedError: an op type that ``ge_ops`` does not know.
    """
    values: dict[str, torch.Tensor] = {}
    results: list[torch.Tensor] = []
    for op in graph.op:
        COUNTS[op.type] += 1
        if op.type == "NetOutput":
            results = [values[source] for source in op.input if not source.endswith(":-1")]
            continue
        if op.type in ("Data", "RefData"):
            outputs: Any = [inputs[op.attr["index"].i]]
        elif op.type == "Const":
            outputs = [_constant(op)]
        elif op.type in OPERATORS:
            outputs = OPERATORS[op.type](Op(op), **_named_inputs(op, values))
        else:
            outputs = custom_ops.run(op.type, list(_named_inputs(op, values).values()))
            if outputs is None:
                raise NotImplementedError(f"the GE interpreter does not know {op.type} ({op.name})")
        for index, output in enumerate([outputs] if isinstance(outputs, torch.Tensor) else outputs):
            values[f"{op.name}:{index}"] = output
    return results


def _named_inputs(op: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs by GE name; those of a dynamic input (``x0``, ``x1``...) as a list, absent optional ones as None."""
    named: dict[str, Any] = {}
    for source, description in zip(op.input, op.input_desc, strict=False):
        absent = source == "" or "_is_unfed_optional" in description.attr
        value = None if absent else values[source]
        base = description.name.rstrip("0123456789")
        if (op.type, base) in DYNAMIC_INPUTS:
            named.setdefault(base, []).append(value)
        else:
            named[description.name] = value
    return named


def _constant(op: Any) -> torch.Tensor:
    tensor = op.attr["value"].t
    dtype, shape, data = PROTO_DTYPES[tensor.desc.dtype], list(tensor.desc.shape.dim), bytes(tensor.data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _as_torch(tensor: HostTensor) -> torch.Tensor:
    dtype, shape = RUNTIME_DTYPES[tensor.dtype], list(tensor.dims[: tensor.ndim])
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(tensor.data)
    return torch.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


def _give(result: torch.Tensor, output: Any, library: ctypes.CDLL) -> None:
    size = result.numel() * result.element_size()
    if not output.data:
        output.dtype, output.ndim, output.nbytes = RUNTIME_CODES[result.dtype], result.dim(), max(size, 1)
        output.data = library.host_cann_alloc(output.nbytes)
        for axis, length in enumerate(result.shape):
            output.dims[axis] = length
    elif output.nbytes < size:
        raise ValueError(f"the graph gives {list(result.shape)}, {size} bytes, into {output.nbytes} bytes")
    elif RUNTIME_CODES[result.dtype] != output.dtype:
        raise ValueError(f"the graph gives {result.dtype} where {RUNTIME_DTYPES[output.dtype]} was declared")
    ctypes.memmove(output.data, result.data_ptr(), size)
