"""Writing a block's computation as one function that dynamo can trace, for any number of tokens.

Executions on inputs of several sizes are laid over each other, each cut where the experts stand: what is left (router,
shared experts, reshapes, returned logits) must be the same ops in the same order, and a number that differs must be a
product of the input's sizes. The experts become one call of ``moe_fx.experts`` on stacked weights.
"""

from __future__ import annotations

import builtins
import itertools
import linecache
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.passes.core import Miss, drop_defaults, require
from moe_fx.passes.graph import aten, describe, dtype, rank, shape
from moe_fx.preparation.recognise import ExpertForm, Roles, as_argument
from moe_fx.preparation.trace import UNREGISTERED, Trace

_SERIAL = itertools.count()


@dataclass(frozen=True)
class Operands:
    """Where the function finds the stacked weights: attribute paths relative to the block, or None."""

    w13: str
    w2: str
    b13: str | None = None
    b2: str | None = None
    w3: str | None = None
    b3: str | None = None

    @classmethod
    def of(cls, form: ExpertForm, stacks: str) -> Operands:
        """The block's own parameters where they are stacked, else attributes of its attribute ``stacks``."""
        if form.gate.stacked:
            slots = (form.gate, form.down, form.gate_bias, form.down_bias, form.up, form.up_bias)
            return cls(*(None if slot is None else slot.paths[0] for slot in slots))
        return cls(
            f"{stacks}.w13",
            f"{stacks}.w2",
            None if form.gate_bias is None else f"{stacks}.b13",
            None if form.down_bias is None else f"{stacks}.b2",
        )

    def call(self, attributes: Mapping[str, Any]) -> tuple[Any, list[str | None], dict[str, Any]]:
        """``(op, paths of its weights, its attributes)`` for a block whose experts have ``attributes``."""
        paths = [self.w13, self.w2, self.b13, self.b2, self.w3, self.b3]
        while paths[-1] is None:
            paths.pop()
        return CANONICAL_OPS["experts"].overload, paths, dict(attributes)


@dataclass(frozen=True)
class PackedOperand:
    """Packed weights instead: their attribute path relative to the block, the op on them, what it is told of them."""

    path: str
    op: Any
    attributes: Mapping[str, Any]

    def call(self, attributes: Mapping[str, Any]) -> tuple[Any, list[str | None], dict[str, Any]]:
        """See :meth:`Operands.call`."""
        return self.op, [self.path], dict(self.attributes)


@dataclass(frozen=True)
class Program:
    """A block's computation on inputs of one rank: ``run(block, hidden_states)``; ``code`` is its source."""

    run: Callable[..., Any]
    code: str


def experts_attributes(form: ExpertForm, roles: Roles) -> dict[str, Any]:
    """Attributes of the ``experts`` op that stands for one block."""
    attributes = dict(form.attributes) | {"transposed": form.transposed, "weight_on": roles.weight_on}
    if attributes["layout"] == "split" and not form.gate.stacked:
        attributes["layout"] = "gate_up"  # Two Linears are stacked into one weight.
    if dtype(roles.result) != dtype(roles.x):
        attributes["out_dtype"] = dtype(roles.result)
    return drop_defaults(CANONICAL_OPS["experts"].overload, attributes)


def write_program(
    traces: Sequence[Trace], roles: Sequence[Roles], form: ExpertForm, operands: Operands | PackedOperand, name: str
) -> Program:
    """Lay traces of one input rank over each other and generate the function; :class:`Miss` says what differs."""
    return _Writer(traces, roles, form, operands).write(name)


class _Writer:
    def __init__(
        self, traces: Sequence[Trace], roles: Sequence[Roles], form: ExpertForm, operands: Operands | PackedOperand
    ) -> None:
        self._traces, self._roles, self._form, self._operands = traces, roles, form, operands
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._sizes: list[fx.Node] = []

    def write(self, name: str) -> Program:
        first = self._traces[0]
        kept = [_kept(trace, roles) for trace, roles in zip(self._traces, self._roles, strict=True)]
        lengths = {len(nodes) for nodes in kept}
        require(len(lengths) == 1, "it executes different ops for different numbers of tokens")
        self._counterparts = dict(zip(kept[0], zip(*kept, strict=True), strict=True))
        for trace, nodes in zip(self._traces, kept, strict=True):
            seen = next((n for n in trace.data_dependent if n in set(nodes)), None)
            require(seen is None, "an op outside the experts' loop has a value-dependent outcome", seen)
        self._input = self._graph.placeholder("hidden_states")
        self._new[first.input] = self._input
        for node in kept[0]:
            self._write_node(node)
        output = self._unify([as_argument(trace.output) for trace in self._traces], "its output")
        self._graph.output(output)
        self._graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return _compile(self._graph, name)

    def _write_node(self, node: fx.Node) -> None:
        same = self._counterparts[node]
        alike = len({(n.op, n.target) for n in same}) == 1
        require(alike, "it executes different ops for different numbers of tokens", node)
        if node is self._roles[0].result:
            at_result = all(n is r.result for n, r in zip(same, self._roles, strict=True))
            require(at_result, "the experts stand elsewhere for another number of tokens", node)
            self._new[node] = self._write_experts()
        elif node.op == "get_attr":
            require(node.target != UNREGISTERED, "it uses a tensor that is neither parameter nor buffer of the block")
            self._new[node] = self._graph.create_node("get_attr", node.target)
        elif node.op == "call_function":
            what = describe(node)
            args = self._unify([n.args for n in same], what)
            kwargs = self._unify([n.kwargs for n in same], what)
            self._new[node] = self._graph.call_function(node.target, args, kwargs)

    def _write_experts(self) -> fx.Node:
        roles, graph, new = self._roles[0], self._graph, self._new
        for role in ("x", "weights", "ids", "base"):
            same = [getattr(r, role) for r in self._roles]
            aligned = same[0] is None or self._counterparts.get(same[0], (same[0],)) == tuple(same)
            require(
                aligned or same[0] is self._traces[0].input, f"the experts' {role} stands elsewhere for other sizes"
            )
        x = self._flat(roles.x, shape(roles.x)[-1])
        weights, ids = self._flat(roles.weights, roles.top_k), self._flat(roles.ids, roles.top_k)
        overload, paths, attributes = self._operands.call(experts_attributes(self._form, roles))
        tensors = [None if path is None else graph.create_node("get_attr", path) for path in paths]
        node = graph.call_function(overload, (x, weights, ids, *tensors), attributes)
        if rank(roles.result) != 2:
            require(shape(roles.result) == shape(roles.x), "the experts' result is not shaped like the tokens")
            like = graph.call_function(builtins.getattr, (new[roles.x], "shape"))
            node = graph.call_function(aten.reshape.default, (node, like))
        if roles.base is not None:
            node = graph.call_function(aten.add.Tensor, (new[roles.base], node))
        return node

    def _flat(self, node: fx.Node, columns: int) -> fx.Node:
        if rank(node) == 2:
            return self._new[node]
        return self._graph.call_function(aten.reshape.default, (self._new[node], [-1, columns]))

    def _unify(self, same: Sequence[Any], what: str) -> Any:
        """One argument for the generated function from its counterparts in all traces."""
        first = same[0]
        if isinstance(first, fx.Node):
            if first is self._traces[0].input:
                require(all(n is t.input for n, t in zip(same, self._traces, strict=True)), f"{what} varies")
            else:
                require(self._counterparts.get(first) == tuple(same), f"{what} takes other operands for other sizes")
            return self._new[first]
        if isinstance(first, (tuple, list)):
            agree = all(isinstance(s, type(first)) and len(s) == len(first) for s in same)
            require(agree, f"{what} takes other arguments for other sizes")
            return type(first)(self._unify(items, what) for items in zip(*same, strict=True))
        if isinstance(first, Mapping):
            agree = all(list(s) == list(first) for s in same)
            require(agree, f"{what} takes other arguments for other sizes")
            return {key: self._unify([s[key] for s in same], what) for key in first}
        if isinstance(first, torch.device) and first == first_device(self._traces[0]):
            return self._graph.call_function(builtins.getattr, (self._input, "device"))
        if all(type(s) is type(first) and s == first for s in same):
            return first
        require(all(type(s) is int for s in same), f"{what} depends on values or sizes in a way that is not a product")
        return self._size(same, what)

    def _size(self, numbers: Sequence[int], what: str) -> fx.Node:
        """A number that differs between traces, as ``constant * a product of some of the input's sizes``."""
        shapes = [shape(t.input)[:-1] for t in self._traces]
        n = len(shapes[0])
        for dims in (d for r in range(1, n + 1) for d in itertools.combinations(range(n), r)):
            products = [_product(sizes[d] for d in dims) for sizes in shapes]
            factor = numbers[0] // products[0]
            if all(number == factor * product for number, product in zip(numbers, products, strict=True)):
                return self._write_size(dims, factor)
        raise Miss(f"{what} takes a size that is no product of the input's sizes")

    def _write_size(self, dims: Sequence[int], factor: int) -> fx.Node:
        if not self._sizes:
            whole = self._graph.call_function(builtins.getattr, (self._input, "shape"))
            self._sizes.append(whole)
        node: Any = None
        for d in dims:
            size = self._graph.call_function(operator.getitem, (self._sizes[0], d))
            node = size if node is None else self._graph.call_function(operator.mul, (node, size))
        return node if factor == 1 else self._graph.call_function(operator.mul, (node, factor))


def first_device(trace: Trace) -> torch.device:
    """The device that the trace's input was on."""
    return trace.input.meta["val"].device


def _kept(trace: Trace, roles: Roles) -> list[fx.Node]:
    """The nodes that the function still executes, in order: all but the experts and the input itself."""
    outputs: list[fx.Node] = []
    fx.map_arg(as_argument(trace.output), outputs.append)
    frontier = [n for n in (roles.x, roles.weights, roles.ids, roles.base) if n is not None]
    wanted: set[fx.Node] = set()
    queue = [*outputs, roles.result]
    while queue:
        node = queue.pop()
        if node in wanted:
            continue
        wanted.add(node)
        queue += frontier if node is roles.result else node.all_input_nodes
    return [n for n in trace.graph.nodes if n in wanted and n.op != "placeholder"]


def _compile(graph: fx.Graph, name: str) -> Program:
    code = graph.python_code("self")
    filename = f"<moe_fx.prepare {name} {next(_SERIAL)}>"
    # So that tracebacks and dynamo's messages can show the generated lines.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    return Program(scope["forward"], code.src)


def _product(numbers: Any) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
