"""Recording what a module computes: one eager execution as a functional graph of ATen ops.

Concrete values drive Python's control flow, so loops over experts, ``.item()`` and ``tolist()`` just run. Under
inference mode PyTorch shows composite ops (``linear``, ``softmax``, ``one_hot``) to a dispatch mode before taking them
apart, so the record is as high-level as a captured graph. In-place ops are recorded as their functional forms.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fx.passes.core import Miss
from moe_fx.passes.graph import arg, aten

# Target of the get_attr node of a tensor that is neither parameter, buffer, input nor the result of a recorded op.
UNREGISTERED = "<tensor constant>"
# Composite ops whose result's size, or value in Python, depends on values; others carry a tag that says so.
_DATA_DEPENDENT = (aten.where.default, aten.item.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor)


@dataclass
class Trace:
    """One execution of a module.

    Attributes:
        graph: its ops; parameters and buffers are get_attr nodes. ``meta["val"]`` holds a node's real value.
        input: the placeholder.
        output: what the module returned, with nodes for tensors.
        data_dependent: ops whose outcome Python could see (``nonzero``, ``item``, boolean indexing).
    """

    graph: fx.Graph
    input: fx.Node
    output: Any = None
    data_dependent: list[fx.Node] = field(default_factory=list)

    def release(self) -> None:
        """Drop all values, so that views of old weights do not keep them alive until the next garbage collection."""
        for node in self.graph.nodes:
            node.meta.clear()


def record(module: nn.Module, x: torch.Tensor) -> Trace:
    """Execute ``module.forward(x)`` on real values and record it.

    Raises:
        Miss: the execution cannot be replayed: it draws random numbers, writes to its input, to a buffer or through a
            partial view, or stores state on the module.
        Exception: whatever the module itself raises on this input.
    """
    before = _state(module)
    with torch.inference_mode():
        recorder = _Recorder(module, x)
        with recorder:
            output = module.forward(x)
        trace = recorder.trace
        trace.output = pytree.tree_map_only(torch.Tensor, recorder.node_of, output)
    changed = [name for name, kept in _state(module).items() if before.get(name) != kept]
    if changed:
        raise Miss(f"its forward stores {', '.join(changed[:3])} on the module")
    return trace


def _state(module: nn.Module) -> dict[str, int]:
    """Identities of all plain attributes, by dotted name."""
    return {
        f"{path}.{name}".lstrip("."): id(attribute)
        for path, child in module.named_modules()
        for name, attribute in vars(child).items()
    }


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.trace = Trace(fx.Graph(), None)
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # ids stay unique while their tensors live
        self._recorded_at: dict[int, int] = {}
        self._writes: dict[int, tuple[int, torch.Tensor]] = {}
        self._clock = 0
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._paths = {_place(tensor): path for path, tensor in reversed(named)}
        self.trace.input = self.trace.graph.placeholder("hidden_states")
        self._remember(x, self.trace.input)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.dropout.default and not args[2]:
            return args[0]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Miss(f"it draws random numbers ({func}); call model.eval() if that is dropout or router noise")
        node_args, node_kwargs = pytree.tree_map_only(torch.Tensor, self.node_of, (args, kwargs))
        written = _written(func, args)
        if written is not None:
            return self._record_write(func, args, kwargs, node_args, node_kwargs, written)
        result = func(*args, **kwargs)
        node = self.trace.graph.call_function(func, node_args, node_kwargs)
        self._remember_result(result, node)
        if _is_data_dependent(func, args):
            self.trace.data_dependent.append(node)
        return result

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node whose value the tensor now holds."""
        node = self._nodes.get(id(tensor))
        if node is None:
            path = self._paths.get(_place(tensor), UNREGISTERED)
            node = self.trace.graph.create_node("get_attr", path)
            self._remember(tensor, node)
        write = self._writes.get(_storage(tensor))
        if write is None or write[1] is tensor or write[0] <= self._recorded_at[id(tensor)]:
            return node
        whole = write[1]
        if tensor.numel() != whole.numel() or not (tensor.is_contiguous() and whole.is_contiguous()):
            raise Miss("it writes in place through a partial view")
        node = self.trace.graph.call_function(aten.view.default, (self._nodes[id(whole)], list(tensor.shape)))
        self._remember(tensor, node)
        return node

    def _record_write(
        self, func: Any, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any, written: torch.Tensor
    ) -> Any:
        old = node_args[0]
        if old.op != "call_function":
            what = "its input" if old.op == "placeholder" else f"its own {old.target}"
            raise Miss(f"it writes to {what} in place ({func})")
        # The tensor changes under the older nodes: they keep a copy of what it was.
        old.meta["val"] = written.clone()
        result = func(*args, **kwargs)
        node = self.trace.graph.call_function(_functional(func), node_args, node_kwargs)
        self._remember(written, node)
        node.meta["val"] = written.clone()
        self._writes[_storage(written)] = (self._clock, written)
        return result

    def _remember_result(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, torch.Tensor):
            self._remember(result, node)
            return
        node.meta["val"] = result
        if isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._remember(item, self.trace.graph.call_function(operator.getitem, (node, i)))

    def _remember(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._clock += 1
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node
        self._recorded_at[id(tensor)] = self._clock
        node.meta["val"] = tensor


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements lie: the same for a parameter and its ``.data``."""
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """The argument that an in-place op writes to."""
    schema = func._schema
    writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if not any(writes):
        return None
    if not writes[0] or any(writes[1:]):
        raise Miss(f"it writes to an argument that is not the first ({func})")
    return args[0]


def _functional(func: Any) -> Any:
    """The functional form of an in-place op."""
    namespace, name = func._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    functional = getattr(packet, func._overloadname, None)
    if functional is None or functional is func:
        raise Miss(f"it writes in place by {func}, which has no functional form")
    return functional


def _is_data_dependent(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _DATA_DEPENDENT or torch.Tag.data_dependent_output in func.tags:
        return True
    if func in (aten.index.Tensor, aten.index_put.default):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def constant_index(index: Any) -> int | None:
    """An index that is one integer: given, or the value that a 0-d (or one-element) node had."""
    if isinstance(index, int):
        return index
    if isinstance(index, fx.Node):
        held = index.meta["val"]
        if isinstance(held, torch.Tensor) and held.numel() == 1 and not held.is_floating_point():
            return int(held)
    return None


def selected(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(source, index)`` when node is one element of source's first dimension, in any spelling."""
    if node.target is aten.select.int and arg(node, 1) == 0:
        index = constant_index(arg(node, 2))
        return None if index is None else (node.args[0], index)
    if node.target is operator.getitem:
        pieces, index = node.args
        if pieces.target is aten.unbind.int and arg(pieces, 1) == 0:
            return pieces.args[0], index
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:
        index = constant_index(node.args[1][0])
        return None if index is None else (node.args[0], index)
    return None
