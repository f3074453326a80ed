"""Single operators of ``npu:0``, run by PyTorch's CPU kernels over the same memory, and capture and replay of them.

While a capture is active each call is also recorded; replaying repeats the calls on the very same memory.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from host_cann.npu_ops import OPERATORS

# What is not worth replacing: torch_npu's own versions only move metadata or memory, which works as it is.
_KEEP = {
    "empty", "empty_strided", "empty_like", "_to_copy", "to", "set_", "as_strided", "view", "_reshape_alias",
    "resize_", "record_stream", "is_pinned", "pin_memory", "_pin_memory", "_copy_from", "_copy_from_and_resize",
    "_local_scalar_dense", "item", "is_set_to", "unfold", "view_as_real", "view_as_complex", "equal", "data",
    "new_empty", "new_empty_strided", "detach", "alias", "transpose", "t", "permute", "slice", "select", "expand",
    "unsqueeze", "squeeze", "lift", "lift_fresh", "_has_compatible_shallow_copy_type", "is_same_size", "isnan",
}  # fmt: skip
_CAPTURE_BEGIN, _CAPTURE_END, _REPLAY = 0, 1, 2
_ERROR = 507015  # CANN's "aicore exception".
_ON_CAPTURE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
_ON_LAUNCH = ctypes.CFUNCTYPE(None, _KERNEL, ctypes.c_void_p)
_ALLOCATION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint64))
_KEPT: list[Any] = []
_LIBRARIES: dict[str, torch.library.Library] = {}

Call = Callable[[], None]
# The calls of each captured graph; the list being recorded into; every capture event since the list was cleared.
GRAPHS: dict[int, list[Call]] = {}
EVENTS: list[int] = []
_RECORDING: list[list[Call]] = []


def install() -> None:
    """Replace torch_npu's kernels of ATen and of its own MoE operators."""
    from host_cann.preload import LIBRARY

    LIBRARY.host_cann_set_error.argtypes = [ctypes.c_char_p]

    def on_capture(event: int, graph: int) -> int:
        try:
            _on_capture(event, graph)
            return 0
        except BaseException as error:
            traceback.print_exc()
            LIBRARY.host_cann_set_error(str(error).encode())
            return _ERROR

    _KEPT[:] = [_ON_CAPTURE(on_capture), _ON_LAUNCH(_on_launch), _ALLOCATION(_allocation)]
    LIBRARY.host_cann_set_callbacks(*_KEPT)
    for schema in torch._C._jit_get_all_schemas():
        namespace, name = schema.name.split("::")
        skip = name in _KEEP or name.startswith("_foreach") or "backward" in name
        if namespace == "aten" and not skip and _has_npu_kernel(schema):
            packet = getattr(torch.ops.aten, name)
            _replace(getattr(packet, schema.overload_name or "default"))
    for name in ("npu_dtype_cast", "_npu_dtype_cast"):
        _replace(getattr(torch.ops.npu, name).default, lambda x, dtype: x.to(dtype))
    # On the stand-in a format says nothing about how memory lies.
    _replace(torch.ops.npu.npu_format_cast.default, lambda x, acl_format, **absent: x.clone())
    unpermute = OPERATORS["npu_moe_token_unpermute"]
    _replace(torch.ops.npu._npu_moe_token_unpermute.default, lambda rows, *args: (unpermute(rows, *args), rows.clone()))
    for name, function in OPERATORS.items():
        _replace(getattr(torch.ops.npu, name).default, function)
    # What a capture makes of this operator: a workspace and results that it allocates, and a call that fills them.
    attention = torch.ops.npu.npu_fused_infer_attention_score
    _replace(torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace.default, _attention_workspace)
    _replace(torch.ops.npu._npu_fused_infer_attention_score_infer_output.default, _attention_outputs)
    _replace(attention.out, _attention_out)


def add_kernel(operator: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Give ``npu:0`` a kernel for an operator of the project's own."""
    _replace(operator, function)


def cpu_alias(tensor: Any) -> Any:
    """A CPU tensor over an npu tensor's memory; anything else as it is."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "npu":
        return tensor
    size = tensor.untyped_storage().nbytes()
    if size == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_byte * size).from_address(tensor.untyped_storage().data_ptr())
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    result = torch.empty(0, dtype=tensor.dtype)
    return result.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _attention_workspace(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(32, dtype=torch.uint8)


def _attention_outputs(
    query: torch.Tensor, value: torch.Tensor, *, input_layout: str = "BSH", **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, width = query.shape
    shape = (batch, queries, heads, width) if input_layout == "BNSD_BSND" else (batch, heads, queries, width)
    return query.new_empty(shape), torch.zeros(1)


def _attention_out(*args: Any, workspace: torch.Tensor, out: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    for place, result in zip(out, OPERATORS["npu_fused_infer_attention_score"](*args, **kwargs), strict=True):
        place.copy_(result)
    return out


def _has_npu_kernel(schema: Any) -> bool:
    qualified = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "PrivateUse1")
    except RuntimeError:
        return False


def _replace(operator: torch._ops.OpOverload, function: Callable[..., Any] | None = None) -> None:
    namespace, name = operator._schema.name.split("::")
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
    overload = "" if operator._overloadname == "default" else f".{operator._overloadname}"
    library.impl(f"{name}{overload}", _kernel(operator, function or operator), "PrivateUse1", allow_override=True)


def _kernel(operator: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    arguments = operator._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if written:
        function = _reading_first(function, written[0])

    def kernel(*args: Any, **kwargs: Any) -> Any:
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        on_cpu, named_on_cpu = tree_map(cpu_alias, (list(args), kwargs))
        try:
            result = function(*on_cpu, **named_on_cpu)
        except (IndexError, RuntimeError, ValueError):
            if not _RECORDING:
                raise
            # Nothing runs while a device captures, and the inputs' buffers are still empty: only shapes matter.
            result = function(*tree_map(_zero_index, on_cpu), **tree_map(_zero_index, named_on_cpu))
        if written and len(operator._schema.returns) <= 1:
            if _RECORDING:
                _RECORDING[0].append(lambda: function(*on_cpu, **named_on_cpu))
            index = written[0]
            return args[index] if index < len(args) else kwargs[arguments[index].name]
        outputs = tree_map(_to_npu, result)
        if _RECORDING:
            targets = [cpu_alias(t) for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor)]

            def again() -> None:
                fresh = tree_flatten(function(*on_cpu, **named_on_cpu))[0]
                for target, value in zip(targets, [t for t in fresh if isinstance(t, torch.Tensor)], strict=True):
                    target.copy_(value)

            _RECORDING[0].append(again)
        return outputs

    return kernel


def _reading_first(function: Callable[..., Any], written: int) -> Callable[..., Any]:
    """An in-place kernel that reads its other operands before it writes.

    torchair's in-place pass makes ``x[1:] - x[:-1]`` write into ``x[1:]``, on top of its other operand.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        others = [a if i == written or not isinstance(a, torch.Tensor) else a.clone() for i, a in enumerate(args)]
        return function(*others, **kwargs)

    return call


def _zero_index(value: Any) -> Any:
    is_index = isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
    return torch.zeros_like(value) if is_index else value


def _to_npu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    result = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="npu")
    cpu_alias(result).copy_(value)
    return result


def _on_capture(event: int, graph: int) -> None:
    EVENTS.append(event)
    if event == _CAPTURE_BEGIN:
        _RECORDING[:] = [GRAPHS.setdefault(graph, [])]
    elif event == _CAPTURE_END:
        _RECORDING.clear()
    elif event == _REPLAY:
        for call in GRAPHS[graph]:
            call()
    else:
        GRAPHS.pop(graph, None)


def _allocation(address: int, base: Any, size: Any) -> None:
    """The allocation that an address lies in."""
    for segment in torch.npu.memory_snapshot():
        for block in segment["blocks"]:
            if block["address"] <= address < block["address"] + block["size"]:
                base[0], size[0] = block["address"], block["requested_size"]


def _on_launch(kernel: Any, arguments: int) -> None:
    """A launch of a library's kernel on a stream that is captured."""

    def call() -> None:
        message = kernel(arguments)
        if message:
            raise RuntimeError(message.decode())

    _RECORDING[0].append(call)
