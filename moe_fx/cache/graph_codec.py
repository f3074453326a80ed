"""A lowered graph as plain JSON, and back.

torch's own ways were looked at first: ``GraphPickler`` unpickles, generated Python code must be executed, and
``torch.export``'s schema needs an ExportedProgram with a ShapeEnv of its own. A lowered graph is simpler than what they
are for: calls of registered ops and of arithmetic on sizes, with arguments of a dozen kinds. What lies outside that is
refused (:class:`Uncacheable`), never guessed. Reading an entry builds nodes and looks up ops by name; it runs no code.

Kept of a node's meta is the innermost source line, for the comments in generated code. FakeTensor values are not kept:
downstream compilers trace the graph again on the inputs that dynamo gave.
"""

from __future__ import annotations

import base64
import builtins
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_identity import tensor_bytes
from moe_fx.errors import CacheError

__all__ = ["decode", "decode_value", "encode", "encode_value"]

# Larger constants are weights that a lowering packed: they would fill the cache, and are the user's to keep.
_CONSTANT_LIMIT = 1 << 20
# The only Python functions that a lowered graph may call: arithmetic on sizes, and unpacking.
_OPERATORS = (
    "getitem add sub mul truediv floordiv mod pow neg pos abs index eq ne lt le gt ge and_ or_ xor not_ lshift rshift"
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "pow")},
    **{f"builtins.{name}": getattr(builtins, name) for name in ("max", "min", "round", "abs", "bool", "int", "float")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if re.fullmatch("_?sym_[a-z0-9]+", name)},
}
_NAME_OF_FUNCTION = {function: name for name, function in reversed(_FUNCTIONS.items())}
_NAMED_TYPES: tuple[type, ...] = (torch.dtype, torch.layout, torch.memory_format)
# The last `File "...", line ...` of a stack trace with the code under it.
_LAST_FRAME = re.compile(r'.*(^ *File "[^\n]*\n[^\n]*)', re.DOTALL | re.MULTILINE)


def encode(gm: fx.GraphModule, given: fx.GraphModule, target: str) -> dict[str, Any]:
    """The graph as JSON data.

    Args:
        gm: the lowered graph.
        given: dynamo's graph; constants that are its attributes are kept by name, others by value.
        target: the target that lowered it; its modules register the ops that the graph calls.

    Raises:
        Uncacheable: the graph holds something that cannot be kept; the message says what.
    """
    names_given = {id(value): name for name, value in _attributes(given).items()}
    constants: dict[str, Any] = {}
    nodes = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            constants[str(node.target)] = _encode_constant(_attribute(gm, str(node.target)), names_given)
        elif node.op not in ("placeholder", "call_function", "output"):
            raise Uncacheable(f"the lowered graph has a {node.op} node, {node.name}")
        target_name = _encode_target(node.target) if node.op == "call_function" else str(node.target)
        frame = _LAST_FRAME.match(node.meta.get("stack_trace") or "")
        data = [node.op, node.name, target_name, encode_value(list(node.args)), encode_value(dict(node.kwargs))]
        nodes.append([*data, frame[1] if frame else ""])
    prefix = f"moe_fx.lowering.{target}"
    modules = sorted(name for name in sys.modules if name == prefix or name.startswith(f"{prefix}."))
    return {"nodes": nodes, "constants": constants, "modules": modules}


def decode(data: Mapping[str, Any], given: fx.GraphModule) -> fx.GraphModule:
    """The graph that :func:`encode` wrote, over the constants of dynamo's graph of this process.

    Raises:
        CacheError: the data names something that is not here; the entry must be replaced.
    """
    try:
        for name in data["modules"]:
            if not name.startswith("moe_fx.lowering."):
                raise ValueError(f"{name} is no module of moe_fx.lowering")
            importlib.import_module(name)
        attributes = {name: _decode_constant(value, given) for name, value in data["constants"].items()}
        graph = fx.Graph()
        env: dict[str, fx.Node] = {}
        for op, name, target, args, kwargs, frame in data["nodes"]:
            callee = _decode_target(target) if op == "call_function" else target
            operands = tuple(decode_value(args, env)), decode_value(kwargs, env)
            node = graph.create_node(op, callee, *operands, name=None if op == "output" else name)
            if frame:
                node.meta["stack_trace"] = frame
            env[name] = node
        return fx.GraphModule(attributes, graph)
    except (ImportError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CacheError(f"a cache entry does not fit this process ({error})") from error


# --- Arguments --------------------------------------------------------------------------------------------------------


def encode_value(value: Any) -> Any:
    """An argument as JSON data: plain values as they are, lists as lists, all else as ``{"kind": value}``."""
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return {"tuple": [encode_value(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode_value(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode_value(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, _NAMED_TYPES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": 0}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    raise Uncacheable(f"the lowered graph has an argument of type {type(value).__name__}, which is not kept")


def decode_value(data: Any, env: Mapping[str, fx.Node]) -> Any:
    """What :func:`encode_value` was given; nodes are looked up in ``env`` by name."""
    if isinstance(data, list):
        return [decode_value(item, env) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return env[value]
    if kind == "tuple":
        return tuple(decode_value(item, env) for item in value)
    if kind == "dict":
        return {key: decode_value(item, env) for key, item in value.items()}
    if kind == "slice":
        return slice(*(decode_value(item, env) for item in value))
    if kind == "torch":
        return _torch_constant(value)
    if kind == "device":
        return torch.device(value)
    if kind == "ellipsis":
        return Ellipsis
    if kind == "complex":
        return complex(*value)
    raise ValueError(f"unknown kind of argument {kind!r}")


def _torch_constant(name: str) -> Any:
    constant = getattr(torch, name)
    if not isinstance(constant, _NAMED_TYPES):
        raise ValueError(f"torch.{name} is no dtype, layout or memory format")
    return constant


# --- What nodes call --------------------------------------------------------------------------------------------------


def _encode_target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    try:
        return _NAME_OF_FUNCTION[target]
    except (KeyError, TypeError):
        name = getattr(target, "__qualname__", None) or str(target)
        raise Uncacheable(f"the lowered graph calls {name}, which is neither a registered op nor arithmetic") from None


def _decode_target(name: str) -> Callable[..., Any]:
    if not name.startswith("torch.ops."):
        return _FUNCTIONS[name]
    namespace, op, overload = name.removeprefix("torch.ops.").split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name} is no op")
    return found


# --- Constants --------------------------------------------------------------------------------------------------------


def _attributes(gm: fx.GraphModule) -> dict[str, Any]:
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    return {name: _attribute(gm, name) for name in names}


def _attribute(gm: fx.GraphModule, name: str) -> Any:
    return operator.attrgetter(name)(gm)


def _encode_constant(value: Any, names_given: Mapping[int, str]) -> Any:
    if id(value) in names_given:
        return {"given": names_given[id(value)]}
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized:
        raise Uncacheable(f"the lowered graph holds a constant of type {type(value).__name__}")
    if value.is_conj() or value.is_neg():
        raise Uncacheable("the lowered graph holds a constant that a mark conjugates or negates")
    if value.nbytes > _CONSTANT_LIMIT:
        size = f"{value.nbytes >> 10} KiB"
        raise Uncacheable(
            f"the lowered graph holds a constant of {size}, and none above {_CONSTANT_LIMIT >> 10} are kept"
        )
    return {
        "content": base64.b64encode(tensor_bytes(value)).decode(),
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "device": str(value.device),
    }


def _decode_constant(data: Mapping[str, Any], given: fx.GraphModule) -> Any:
    if "given" in data:
        return _attribute(given, data["given"])
    dtype, shape = _torch_constant(data["dtype"]), data["shape"]
    content = bytearray(base64.b64decode(data["content"], validate=True))
    plain = torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)
    return torch.empty_strided(shape, data["stride"], dtype=dtype, device=data["device"]).copy_(plain)
