"""What a graph is, as text for a key: equal in another process for equal work, different for all that counts.

Named are every node with what it calls and with which arguments, where the model wrote it (reports quote that), the
inputs with shapes in symbolic form, strides, dtypes and devices, and the contents of constants. Node addresses, object
ids and dynamo's numbering of compilations stay out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_fx.cache.errors import Uncacheable
from moe_fx.passes.graph import module_class, module_path, source_line

__all__ = ["device_types", "graph_lines", "tensor_bytes"]

# Ops and functions of these are covered by the versions of torch and of moe-fx.
_KNOWN_NAMESPACES = ("aten", "prim", "prims", "_c10d_functional")
_OWN_NAMESPACES = ("moe_fx", "moe_fx_ascend", "moe_fx_cpu", "moe_fx_cuda", "moe_fx_prepare")
_LIBRARIES = ("torch", "math", "operator", "_operator", "builtins")
_PLAIN = (str, int, float, complex, bool, bytes, torch.dtype, torch.layout, torch.memory_format, torch.device)


def graph_lines(gm: fx.GraphModule) -> Iterator[str]:
    """The graph's identity, line by line.

    Raises:
        Uncacheable: the graph holds something whose changes the text could not show.
    """
    for node in gm.graph.nodes:
        yield f"{node.op} {node.name} {_callee(node)} {_text(node.args)} {_text(node.kwargs)}"
        yield f"at {source_line(node)} in {module_path(node)} ({module_class(node)})"
        # What ops of torch give for these inputs is known; other ops bring their own rules, which may change.
        if node.op == "placeholder" or _is_foreign_op(node.target):
            yield _value(node.meta.get("example_value", node.meta.get("val")))
        if node.op == "get_attr":
            yield from _constant(functools.reduce(getattr, str(node.target).split("."), gm))
    yield _aliasing(gm)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a strided tensor in row-major order; one that is conjugated or negated by a mark, as it reads."""
    plain = _row_major(tensor)
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""


def _digest(tensor: torch.Tensor) -> str:
    """A hash of ``tensor_bytes``, without the copy.

    Every constant is read at every start, whatever its size. Nothing cheaper tells it apart for certain: writes through
    ``.data`` leave address and version counter as they are, and another process has neither.
    """
    plain = _row_major(tensor)
    content = (ctypes.c_byte * plain.nbytes).from_address(plain.data_ptr()) if plain.nbytes else b""
    return hashlib.sha256(content).hexdigest()


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def device_types(gm: fx.GraphModule) -> list[str]:
    """The kinds of devices that the graph's inputs lie on."""
    values = (n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.find_nodes(op="placeholder"))
    return sorted({value.device.type for value in values if isinstance(value, torch.Tensor)})


def _aliasing(gm: fx.GraphModule) -> str:
    """Which inputs share memory: the lowered graph of a model that writes to its inputs holds for that alone."""
    numbers: dict[int, int] = {}
    shared = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            shared.append(numbers.setdefault(value.untyped_storage()._cdata, len(numbers)))
    return f"memory {shared}"


def _callee(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        if node.op == "call_module":
            raise Uncacheable(f"the graph calls the module {target} as a whole")
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _op(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return " ".join(_op(getattr(target, name)) for name in sorted(target.overloads()))
    if isinstance(target, torch._ops.HigherOrderOperator):
        if "triton" in target.name():
            raise Uncacheable(f"the graph calls a Triton kernel of the model through {target.name()}")
        return f"higher order {target.name()}"
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", "")
    name = getattr(target, "__qualname__", "") or getattr(target, "__name__", "")
    # Built-in methods of torch's function table (torch.topk) have no module, only what they are bound to.
    if not module and type(target).__name__ in ("builtin_function_or_method", "method_descriptor"):
        module = "torch"
    if not name or str(module).split(".")[0] not in _LIBRARIES:
        raise Uncacheable(f"the graph calls {module}.{name or target}, whose source the key does not cover")
    return f"{module}.{name}"


def _op(op: torch._ops.OpOverload) -> str:
    if _is_foreign_op(op) and _may_be_traced_into(op):
        raise Uncacheable(f"the graph calls {op}, a composite op whose Python code becomes part of the graph")
    return f"{op} {op._schema}"


def _is_foreign_op(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace = target._qualified_op_name.split("::")[0]
    elif isinstance(target, torch._ops.OpOverload):
        namespace = target.namespace
    else:
        return False
    return namespace not in (*_KNOWN_NAMESPACES, *_OWN_NAMESPACES)


def _may_be_traced_into(op: torch._ops.OpOverload) -> bool:
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _text(value: Any) -> str:
    """An argument as text; unlike ``repr``, sure to say all and nothing that is the process's own."""
    if value is None or value is Ellipsis or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"{'[' if isinstance(value, list) else '('}{', '.join(map(_text, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value.node.expr)
    if isinstance(value, type) and value.__module__.split(".")[0] in _LIBRARIES:
        return f"{value.__module__}.{value.__qualname__}"
    raise Uncacheable(f"the graph has an argument of type {type(value).__name__}")


def _value(value: Any) -> str:
    """A FakeTensor, or what else stands for an input."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            raise Uncacheable(f"an input is a {type(value).__name__}, a tensor made of others")
        layout = (value.dtype, value.device, value.layout)
        strided = value.layout == torch.strided
        placed = (_text(value.stride()), _text(value.storage_offset())) if strided else ()
        flags = (value.requires_grad, value.is_conj(), value.is_neg(), isinstance(value, torch.nn.Parameter))
        return f"tensor {_text(tuple(value.shape))} {placed} {layout} {flags}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_value, value))})"
    return _text(value)


def _constant(value: Any) -> Iterator[str]:
    if isinstance(value, fx.GraphModule):
        yield "graph"
        yield from graph_lines(value)
        yield "end"
    elif isinstance(value, torch.Tensor):
        yield _value(value)
        if value.device.type == "meta":
            return
        yield _digest(value)
    else:
        yield _text(value)
