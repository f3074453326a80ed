"""Weights in the form that a kernel wants, made once per weight and not in every call.

A lowering writes the change of form into the graph as a call of an op of the namespace ``moe_fx_prepare`` on graph
inputs, registered with :func:`recipe`. The graph means the same with or without what follows, and can be kept and read
back. Before it is compiled, :func:`hoist` takes these calls out: the compiled graph has an input for each result, and a
wrapper with the outer calling convention makes them.

A result is made at the first call with a weight, one at a time. It is a second copy beside the model's weight; graphs
of a process that prepare a weight in the same way share it. It is dropped with its weight, or with the last such graph.

Every call compares each weight's version counter and address with those that its result was made from. If one moved,
the weight is prepared again, into the same memory, so that captured graphs stay valid. That misses some writes:

* Writes through ``.data`` (``p.data.copy_(new)``, ``p.data += d``) move neither. Writes to weights that are inference
  tensors move no counter, as these have none. After either, call :func:`weights_changed`.
* A graph captured around the compiled call replays without the comparison. After any write, call the compiled function
  once outside the capture: it brings the memory that the captured graph reads up to date.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_map

NAMESPACE = "moe_fx_prepare"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# How dynamo and torchair mark a tensor that stays where it is between calls.
_STATIC = "_dynamo_static_input_type"
# On an example input: it stands for what was prepared from parameters alone; see ``as_parameters``.
_FROM_PARAMETERS = "_moe_fx_from_parameters"

Compiled = Callable[..., Any]

_epoch = 0


def weights_changed() -> None:
    """Have every prepared weight of the process made anew, into the same memory, at its next call.

    For writes that the version counter does not see: through ``.data``, or to inference tensors.
    """
    global _epoch
    with _making:
        _epoch += 1


def recipe(schema: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a function as ``moe_fx_prepare::<its name>``; it must be pure, and its result must own its memory.

    Args:
        schema: arguments and return in PyTorch's schema language, without the name.
    """

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        _LIBRARY.define(f"{function.__name__}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{function.__name__}", function, lib=_LIBRARY)
        return function

    return register


def call_recipe(before: fx.Node, made_by: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> fx.Node:
    """A call of a registered recipe for ``before`` to use; an equal one that is there already is shared."""
    target = getattr(getattr(torch.ops, NAMESPACE), made_by.__name__).default
    graph = before.graph
    for node in graph.find_nodes(op="call_function", target=target):
        if node.args == args and node.kwargs == kwargs:
            return node
    # Behind all graph inputs and earlier recipes, so that every later user can share it.
    first = [n for n in graph.nodes if n.op == "placeholder" or _is_recipe(n)]
    with graph.inserting_after(first[-1]):
        node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta = {key: before.meta[key] for key in ("stack_trace", "nn_module_stack") if key in before.meta}
    mode = torch._guards.detect_fake_mode([n.meta["val"] for n in node.all_input_nodes])
    with mode or torch.no_grad(), torch.no_grad():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def hoist(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Any], Callable[[Compiled], Compiled]]:
    """Replace every recipe over graph inputs by a graph input, in place.

    Args:
        inputs: example inputs (fake, as dynamo gives them) of the graph as it is.

    Returns:
        Example inputs of the graph as it is now, and a function that gives a compiled graph the calling convention back
        that the graph had.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {node: index for index, node in enumerate(placeholders)}
    recipes: list[_Recipe] = []
    hoisted: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        if _is_recipe(node) and all(operand in position for operand in node.all_input_nodes):
            recipes.append(_Recipe.of(node, position))
            hoisted.append(_input_instead(node, [*placeholders, *hoisted][-1]))
    if not recipes:
        return list(inputs), lambda compiled: compiled
    sources = {source for item in recipes for source in item.sources}
    kept = [index for index, node in enumerate(placeholders) if index not in sources or node.users]
    for index in sources - set(kept):
        gm.graph.erase_node(placeholders[index])
    gm.graph.lint()
    gm.recompile()
    examples = [inputs[index] for index in kept] + [_example(item, inputs) for item in recipes]
    return examples, lambda compiled: _Prepared(compiled, tuple(kept), tuple(recipes))


def as_parameters(examples: Sequence[Any]) -> list[Any]:
    """Example inputs for compilers that know parameters by type; what was prepared from parameters is one too.

    It stays where it is as long as they do.
    """
    return [torch.nn.Parameter(e, requires_grad=False) if hasattr(e, _FROM_PARAMETERS) else e for e in examples]


def _is_recipe(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


@dataclass(frozen=True)
class _Recipe:
    """A call over graph inputs, which its arguments name by position."""

    target: Callable[..., torch.Tensor]
    args: Any
    kwargs: Any
    sources: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node, position: dict[fx.Node, int]) -> _Recipe:
        args, kwargs = tree_map(
            lambda a: _Position(position[a]) if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
        )
        assert callable(node.target)
        return cls(node.target, args, kwargs, tuple(position[n] for n in node.all_input_nodes))

    def make(self, inputs: Sequence[Any] | Mapping[int, Any]) -> torch.Tensor:
        """The result for these graph inputs."""
        args, kwargs = tree_map(lambda a: inputs[a.index] if isinstance(a, _Position) else a, (self.args, self.kwargs))
        with _ordinary_tensors():
            return self.target(*args, **kwargs)

    def identity(self, sources: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Equal for calls of any graph that have the same result; holds while the sources live."""
        rank = {source: _Position(place) for place, source in enumerate(self.sources)}
        args, kwargs = tree_map(lambda a: rank[a.index] if isinstance(a, _Position) else a, (self.args, self.kwargs))
        # ``Module.to`` changes dtype and device of a parameter that stays the same object.
        kinds = tuple((id(s), s.dtype, s.device, s.shape, s.stride()) for s in sources)
        # In words: the arguments are lists and dicts, and 1, 1.0 and True are not to be one.
        return self.target, repr((args, sorted(kwargs.items()))), kinds


@dataclass(frozen=True)
class _Position:
    index: int


def _input_instead(node: fx.Node, last_input: fx.Node) -> fx.Node:
    """Give the graph an input for the result of ``node``, with what compilers ask of dynamo's inputs."""
    from torch._dynamo.source import AttrSource

    assert isinstance(node.target, torch._ops.OpOverload)
    first = node.all_input_nodes[0]
    with node.graph.inserting_after(last_input):
        result = node.graph.placeholder(f"{first.name}_{node.target._opname}")
    for key in ("stack_trace", "nn_module_stack", "val"):
        if key in node.meta:
            result.meta[key] = node.meta[key]
    if _STATIC in first.meta.get("tensor_dict", {}):
        result.meta["tensor_dict"] = {_STATIC: first.meta["tensor_dict"][_STATIC]}
    if hasattr(first, "_dynamo_source"):
        # A source of its own: compilers refuse two inputs of one source.
        result._dynamo_source = AttrSource(first._dynamo_source, result.name)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return result


def _example(item: _Recipe, inputs: Sequence[Any]) -> torch.Tensor:
    first = inputs[item.sources[0]]
    mode = torch._guards.detect_fake_mode(inputs)
    if mode is None:
        return item.make(inputs)
    # Dynamo gives parameters as they are.
    fakes = {
        source: given if is_fake(given) else mode.from_tensor(given, static_shapes=True)
        for source, given in ((source, inputs[source]) for source in item.sources)
    }
    with mode:
        result = item.make(fakes)
    marked = getattr(first, _STATIC, "unguarded" if isinstance(first, torch.nn.Parameter) else None)
    if marked is not None:
        setattr(result, _STATIC, marked)
    if all(isinstance(inputs[source], torch.nn.Parameter) for source in item.sources):
        setattr(result, _FROM_PARAMETERS, True)
    return result


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Outside inference mode, whatever the caller's: results must take later writes from any mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


State = tuple[int, tuple[tuple[int, int], ...]]


class _Value:
    """A result, and the state of its sources that it was made from."""

    def __init__(self, item: _Recipe, args: Sequence[Any], state: State) -> None:
        self.state, self.tensor = state, item.make(args)

    def bring_to(self, state: State, item: _Recipe, args: Sequence[Any]) -> None:
        if self.state != state:
            with _ordinary_tensors():
                self.tensor.copy_(item.make(args))
            self.state = state


# Graphs own values; this is how a graph finds another's. The lock is held to make and to refresh them, by any thread.
_shared: weakref.WeakValueDictionary[tuple[Any, ...], _Value] = weakref.WeakValueDictionary()
_making = threading.RLock()


class _Prepared:
    """A compiled graph behind the calling convention that it had before ``hoist``."""

    def __init__(self, compiled: Compiled, kept: tuple[int, ...], recipes: tuple[_Recipe, ...]) -> None:
        self._compiled, self._kept, self._recipes = compiled, kept, recipes
        self._values: dict[tuple[int, ...], _Value] = {}
        # They let go of a value when a source dies. They die with the graph; a finalizer would keep the value alive.
        self._watches: dict[tuple[int, ...], list[weakref.ref[torch.Tensor]]] = {}

    def __call__(self, *args: Any) -> Any:
        prepared = [self._value(number, item, args) for number, item in enumerate(self._recipes)]
        return self._compiled(*[args[index] for index in self._kept], *prepared)

    def _value(self, number: int, item: _Recipe, args: Sequence[Any]) -> torch.Tensor:
        sources = [args[source] for source in item.sources]
        key = (number, *map(id, sources))
        state = _state(sources)
        value = self._values.get(key)
        if value is None or value.state != state:
            with _making:
                # Another thread or graph may have been here while this one waited.
                value = self._values.get(key) or self._obtain(key, item, args, sources)
                value.bring_to(_state(sources), item, args)
        return value.tensor

    def _obtain(
        self, key: tuple[int, ...], item: _Recipe, args: Sequence[Any], sources: Sequence[torch.Tensor]
    ) -> _Value:
        identity = item.identity(sources)
        value = _shared.get(identity)
        if value is None:
            value = _shared[identity] = _Value(item, args, _state(sources))
        self._values[key] = value
        graph = weakref.ref(self)
        self._watches[key] = [weakref.ref(source, lambda _: _let_go(graph, key)) for source in sources]
        return value


def _let_go(graph: weakref.ref[_Prepared], key: tuple[int, ...]) -> None:
    prepared = graph()
    if prepared is not None:
        prepared._values.pop(key, None)
        prepared._watches.pop(key, None)


def _state(sources: Sequence[torch.Tensor]) -> State:
    return _epoch, tuple((0 if s.is_inference() else s._version, s.data_ptr()) for s in sources)
