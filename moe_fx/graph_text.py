"""Graphs as text for people: dumps, diffs and goldens. Node names are renumbered, so equal graphs print equal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def graph_text(graph: fx.Graph, *, module_comments: bool = False) -> str:
    """One line a node: ``%name: dtype[shape] = op(args)``; inputs come as one ``inputs`` line each.

    ``module_comments`` puts a line before each run of nodes that one module wrote.
    """
    from moe_fx.passes.graph import module_path

    names = _stable_names(graph)
    lines: list[str] = []
    module = ""
    for node in graph.nodes:
        if module_comments and node.op == "call_function" and module_path(node) != module:
            module = module_path(node)
            lines.append(f"# {module}")
        lines.append(_line(node, names))
    return "\n".join(lines) + "\n"


def _stable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    counts: Counter[str] = Counter()
    names = {}
    for node in graph.nodes:
        base = _base_name(node)
        names[node] = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1
    return names


def _base_name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "arg"
    if node.op == "get_attr":
        return "constant"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].strip("_")
    return getattr(node.target, "__name__", str(node.target))


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {_format(node.args[0], names)}"
    left = f"%{names[node]}: {type_text(node.meta.get('val'))}"
    if node.op == "placeholder":
        return left
    if node.op == "get_attr":
        return f"{left} = self.{node.target}"
    args = [_format(a, names) for a in node.args]
    args += [f"{k}={_format(v, names)}" for k, v in node.kwargs.items()]
    return f"{left} = {_target_text(node)}({', '.join(args)})"


def _target_text(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def type_text(value: Any) -> str:
    """A FakeTensor as ``bf16[2, s0, 64]``; tuples of them likewise."""
    if isinstance(value, torch.Tensor):
        dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    if isinstance(value, torch.SymInt):
        return f"Sym({value})"
    return type(value).__name__


def _format(arg: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return f"%{names[arg]}"
    if isinstance(arg, (tuple, list)):
        inner = ", ".join(_format(a, names) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg))
    if isinstance(arg, float):
        return f"{arg:g}" if float(f"{arg:g}") == arg else repr(arg)
    return repr(arg) if isinstance(arg, str) else str(arg)
