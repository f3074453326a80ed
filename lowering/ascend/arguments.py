"""Arguments of a canonical node by their schema names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_fx.passes.graph import module_path

# Schemas hold a dtype's default as PyTorch's number for it.
_DTYPE_DEFAULTS = {6: torch.float32}


def bound(node: fx.Node) -> dict[str, Any]:
    """Nodes, attributes and defaults of a call, by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            default: Any = argument.default_value
            is_dtype = str(argument.real_type) == "ScalarType" and isinstance(default, int)
            values[argument.name] = _DTYPE_DEFAULTS[default] if is_dtype else default
    return values


def layer_of(node: fx.Node) -> str:
    """The path of the layer around a node's module, up to its number; empty for a block on its own."""
    parts = module_path(node).split(".")
    for end, part in enumerate(parts, 1):
        if part.isdecimal():
            return ".".join(parts[:end])
    return ""


def value(node: Any) -> Any:
    """The FakeTensor of a node; None of None."""
    return None if node is None else node.meta["val"]
