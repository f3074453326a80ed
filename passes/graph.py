"""Reading ATen graphs: arguments by name, peeling of no-ops, slices, constants, symbolic equality, source locations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
_TORCH_FOLDER = str(Path(torch.__file__).parent)

# Ops that change how elements are laid out or named, never their values.
RESHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten)
ALIASES = (aten.alias, aten.detach, aten.clone, aten.contiguous, aten.lift_fresh, aten.lift_fresh_copy)
UNIT_DIMS = (aten.squeeze, aten.unsqueeze)
VIEWS = (*RESHAPES, *ALIASES, *UNIT_DIMS)
CASTS = (aten._to_copy, aten.to, aten.type_as)


def is_op(node: Any, *packets: Any) -> bool:
    """Whether ``node`` calls one of the given op packets (any overload) or overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target in packets or target.overloadpacket in packets
    return target in packets


def is_call(node: Any) -> bool:
    """Whether ``node`` computes something (as opposed to a graph input or constant)."""
    return isinstance(node, fx.Node) and node.op == "call_function"


def is_collective(node: Any) -> bool:
    """Whether ``node`` is a functional collective (all-reduce, all-gather, ...) or the wait for one."""
    # By name: builds of PyTorch without torch.distributed have no such ops.
    target = node.target if isinstance(node, fx.Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional"


def bind(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by their schema names, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload), node.format_node()
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def arg(node: fx.Node, index: int) -> Any:
    """Positional argument ``index``, or its schema default."""
    if index < len(node.args):
        return node.args[index]
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    argument = target._schema.arguments[index]
    return node.kwargs.get(argument.name, argument.default_value)


def value(node: Any) -> Any:
    """The node's FakeTensor (or symbolic number)."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape(node: Any) -> torch.Size:
    """Shape of the node's tensor; symbolic sizes stay symbolic."""
    return value(node).shape


def rank(node: Any) -> int:
    """Number of dimensions; -1 for what is not a tensor."""
    fake = value(node)
    return fake.dim() if isinstance(fake, torch.Tensor) else -1


def dtype(node: Any) -> torch.dtype:
    """Dtype of the node's tensor."""
    return value(node).dtype


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding guards."""
    a, b = value(a), value(b)
    return statically_known_true(a == b) if _is_number(a) and _is_number(b) else False


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    left, right = list(a), list(b)
    return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right, strict=True))


def numel_is(node: Any, size: Any) -> bool:
    """Whether the node's tensor is known to have ``size`` elements."""
    fake = value(node)
    return isinstance(fake, torch.Tensor) and statically_known_true(fake.numel() == size)


def normalize_dim(dim: int, n: int) -> int:
    """A dimension counted from the front."""
    return dim if dim >= 0 else dim + n


def is_last_dim(dim: Any, node: Any) -> bool:
    """Whether ``dim`` (an int or a list of one) names the node's last dimension."""
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return False
        dim = dim[0]
    return isinstance(dim, int) and normalize_dim(dim, rank(node)) == rank(node) - 1


def number(x: Any) -> float | None:
    """``x`` as a Python number: a constant, or a node that fills a tensor with one."""
    if isinstance(x, (bool, int, float)):
        return float(x)
    if is_op(x, aten.full):
        return number(arg(x, 1))
    if is_op(x, aten.scalar_tensor):
        return number(arg(x, 0))
    if is_op(x, *ALIASES, *CASTS, *UNIT_DIMS, aten.expand):
        return number(x.args[0])
    if isinstance(x, fx.Node) and x.op == "get_attr" and rank(x) == 0:
        constant = getattr(x.graph.owning_module, str(x.target), None)
        if isinstance(constant, torch.Tensor) and not isinstance(constant, torch._subclasses.FakeTensor):
            return float(constant)
    return None


def peel(node: Any, *packets: Any) -> Any:
    """The first ancestor along argument 0 that is none of ``packets`` (default: pure views)."""
    packets = packets or VIEWS
    while is_op(node, *packets):
        node = node.args[0]
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def getitems(node: fx.Node) -> dict[int, fx.Node]:
    """The unpackings of a node with several results, by index."""
    found: dict[Any, fx.Node] = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    return found


@dataclass(frozen=True)
class Slice:
    """A strided slice of one dimension of ``source``: elements ``start:stop:step``; sizes may be symbolic."""

    source: fx.Node
    dim: int
    start: Any
    stop: Any
    step: int


def as_slice(node: Any) -> Slice | None:
    """Read slice, narrow, select-free chunk, split and split_with_sizes results alike."""
    if is_op(node, aten.slice):
        bound = bind(node)
        source = bound["self"]
        dim = normalize_dim(bound["dim"], rank(source))
        size = shape(source)[dim]
        start = _clip(bound["start"] if bound["start"] is not None else 0, size)
        stop = _clip(bound["end"] if bound["end"] is not None else size, size)
        return Slice(source, dim, start, stop, bound["step"])
    if is_op(node, aten.narrow):
        source, dim, start, length = (arg(node, i) for i in range(4))
        return Slice(source, normalize_dim(dim, rank(source)), start, start + length, 1)
    if is_op(node, operator.getitem) and is_op(node.args[0], aten.split, aten.split_with_sizes, aten.chunk):
        pieces, index = node.args
        source = pieces.args[0]
        dim = normalize_dim(bind(pieces)["dim"], rank(source))
        start = sum((value(pieces)[i].shape[dim] for i in range(index)), 0)
        return Slice(source, dim, start, start + value(node).shape[dim], 1)
    return None


def as_half(node: Any) -> tuple[fx.Node, str] | None:
    """``(source, which)`` when node is one half of source's last dimension.

    ``which`` is ``first``, ``second``, ``even`` or ``odd``.
    """
    node = peel(node, *ALIASES)
    cut = as_slice(node)
    if cut is not None and cut.dim == rank(cut.source) - 1:
        size = shape(cut.source)[-1]
        if cut.step == 1 and same(cut.start, 0) and same(cut.stop * 2, size):
            return cut.source, "first"
        if cut.step == 1 and same(cut.start * 2, size) and same(cut.stop, size):
            return cut.source, "second"
        if cut.step == 2 and same(cut.stop, size) and cut.start in (0, 1):
            return cut.source, ("even", "odd")[cut.start]
    return _as_unbound_half(node)


def _as_unbound_half(node: Any) -> tuple[fx.Node, str] | None:
    """Halves written as ``x.view(..., 2, n)`` or ``x.view(..., n, 2)`` and then select or unbind."""
    if is_op(node, aten.select):
        source, dim, index = (arg(node, i) for i in range(3))
    elif is_op(node, operator.getitem) and is_op(node.args[0], aten.unbind):
        source, dim, index = node.args[0].args[0], arg(node.args[0], 1), node.args[1]
    else:
        return None
    n = rank(source)
    dim = normalize_dim(dim, n)
    if not same(shape(source)[dim], 2) or not is_op(source, *RESHAPES):
        return None
    whole = source.args[0]
    if rank(whole) != n - 1 or not same_shape(shape(whole)[:-1], shape(source)[: n - 2]):
        return None
    index = index % 2
    if dim == n - 1:
        return whole, ("even", "odd")[index]
    if dim == n - 2:
        return whole, ("first", "second")[index]
    return None


def sources(node: fx.Node, stop: Callable[[fx.Node], bool], limit: int = 200) -> Iterator[fx.Node]:
    """Ancestors of ``node`` breadth first, not beyond nodes for which ``stop`` holds (these are yielded)."""
    seen, queue = {node}, [node]
    while queue and limit:
        current = queue.pop(0)
        limit -= 1
        if current is not node:
            yield current
            if stop(current):
                continue
        for parent in current.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)


def reaches(node: fx.Node, goal: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool], limit: int) -> bool:
    """Whether some descendant satisfies ``goal``, walking only through nodes that satisfy ``through``."""
    seen, queue = {node}, [node]
    while queue and limit:
        current = queue.pop(0)
        limit -= 1
        for user in current.users:
            if goal(user):
                return True
            if user not in seen and through(user):
                seen.add(user)
                queue.append(user)
    return False


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that wrote the node, relative to the compiled model."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return clean_module_path(path)


def module_class(node: fx.Node) -> str:
    """Class name of the innermost module that wrote the node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    _, kind = list(stack.values())[-1]
    return kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__


def clean_module_path(path: str) -> str:
    """Dynamo's expression for a module (``L['self']._modules['model'].layers[3]``) as a dotted path."""
    for prefix in ("L['self']", "L['fn']", "self"):
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    for old, new in (("._modules['", "."), ("']._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.replace("._modules.", ".").strip(".")


def source_line(node: fx.Node) -> str:
    """``file:line code`` of the innermost line of model source (that is, outside PyTorch) that made the node."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    innermost = ""
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith('File "'):
            file, _, rest = lines[i][6:].partition('", line ')
            code = lines[i + 1] if i + 1 < len(lines) and not lines[i + 1].startswith("File ") else ""
            location = f"{file}:{rest.split(',')[0]} {code}".strip()
            innermost = innermost or location
            if not file.startswith(_TORCH_FOLDER):
                return location
    return innermost


def describe(node: fx.Node) -> str:
    """Short name of a node for messages: its name and op."""
    target = node.target if isinstance(node.target, str) else str(node.target).removesuffix(".default")
    return f"%{node.name} = {target}"


def _clip(index: Any, size: Any) -> Any:
    if isinstance(index, fx.Node):
        index = value(index)
    if isinstance(index, int) and index < 0:
        return size + index
    if isinstance(index, int) and (index > 2**62 or (isinstance(size, int) and index > size)):
        return size
    return index


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat))
