"""Optional: compute a layer's shared expert on a stream of its own, beside routing and the routed experts.

    h -> route -> experts ------> add          h -> route -> experts ----------------------------> add
    h -> gate, up, act, down --^               h -> [scope: gate, up, act, down on "moe_fx_shared"] --^

The nodes are put together right behind their last input, between the marks that ``torchair.scope.npu_stream_switch``
leaves in a graph. GE waits where data passes from one stream to the other: the shared expert for ``h``, the addition
for both. A captured graph waits where it is told to, and reuses memory in the order of its nodes, so there it reads

    h, record -> [scope: wait, gate, up, act, down, record] -> route -> experts -> wait, hold h -> add

``hold`` keeps h's memory from the main stream's later results while the other stream may still read it. Memory that
belongs to the other stream goes back to it behind the addition, which its next scope waits for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from moe_fx.errors import UnsupportedError
from moe_fx.lowering.ascend import kernel_library
from moe_fx.lowering.ascend.arguments import layer_of
from moe_fx.passes.graph import is_collective, module_path

# All layers use one stream: they come one after the other.
STREAM = "moe_fx_shared"
# Operators whose result is a block's, by name: torch_npu is not imported here.
_COMBINED = (
    "npu.npu_moe_finalize_routing.default",
    "npu.npu_moe_token_unpermute.default",
    "npu._npu_moe_token_unpermute.default",
    "npu.npu_grouped_matmul_finalize_routing.default",
    "moe_fx_ascend.experts_w4a16.default",
)
# They add their first two arguments.
_ADDITIONS = ("aten.add.Tensor", "npu.npu_add_rms_norm.default", "moe_fx.add_rms_norm.default")
_PRODUCTS = ("mm", "matmul", "linear", "addmm", "bmm")


@kernel_library.define("(Tensor[] tensors) -> ()", fake=lambda tensors: None)
def hold(tensors: list[torch.Tensor]) -> None:
    """Nothing, with tensors whose memory must be theirs until then."""


fx.node.has_side_effect(torch.ops.moe_fx_ascend.hold.default)


def insert(gm: fx.GraphModule, *, captured: bool) -> int:
    """Put every shared expert of a lowered graph on the second stream, in place; returns how many there were.

    Args:
        captured: the graph is captured, so that it must wait of its own; otherwise GE runs it.

    Raises:
        UnsupportedError: this torchair has no streams within a graph.
    """
    found = 0
    for combined in list(gm.graph.nodes):
        join, other = _addition(combined) if str(combined.target) in _COMBINED else (None, None)
        branch = _branch(combined, join, other) if join is not None and other is not None else []
        if join is not None and branch:
            _put_beside(gm.graph, branch, join, captured)
            found += 1
    return found


def _addition(combined: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition that the routed experts' result goes to, through casts and views alone, and its other operand."""
    node = combined
    # Operators of several results have some that nobody takes.
    while len(users := [user for user in node.users if user.users]) == 1:
        (user,) = users
        if str(user.target) in _ADDITIONS:
            others = [operand for operand in user.args[:2] if isinstance(operand, fx.Node) and operand is not node]
            return (user, others[0]) if len(others) == 1 and node in user.args[:2] else (None, None)
        if any(not _is_size(operand) for operand in user.all_input_nodes if operand is not node):
            break
        node = user
    return None, None


def _branch(combined: fx.Node, join: fx.Node, other: fx.Node) -> list[fx.Node]:
    """The nodes of ``other`` that the routed experts do not need, in order; empty where they are no shared expert."""
    taken = _with_inputs([combined], lambda node: False)
    branch = _with_inputs([other], lambda node: node in taken or node.op in ("placeholder", "get_attr"))
    block = module_path(combined).rpartition(".")[0]
    for node in branch:
        leaves = [user for user in node.users if user not in branch and user is not join]
        elsewhere = layer_of(node) != layer_of(combined) or not f"{module_path(node)}.".startswith(
            f"{block}.".lstrip(".")
        )
        if leaves or elsewhere or not _is_local(node):
            return []
    if not any(getattr(node.target, "_opname", "") in _PRODUCTS for node in branch):
        return []
    return [node for node in join.graph.nodes if node in branch]


def _with_inputs(nodes: list[fx.Node], stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes and all that they are computed from, up to nodes where to stop, which are left out."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and not stop(node):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_local(node: fx.Node) -> bool:
    """Whether a node computes a value and nothing else: ranks run their collectives in one order, on one stream."""
    if node.target is operator.getitem or _is_size(node):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.is_impure() or is_collective(node):
        return False
    reduces = "hcom" in {argument.name for argument in node.target._schema.arguments}
    known = node.target.namespace in ("aten", "npu", "moe_fx", "moe_fx_ascend", "prims")
    return known and not reduces and not node.target._schema.is_mutable


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _put_beside(graph: fx.Graph, branch: list[fx.Node], join: fx.Node, captured: bool) -> None:
    option = "ascend_shared_stream"
    if captured:
        record, wait = _events(option)
        # The graph's own inputs stay anyway.
        read = [node for node in _inputs(branch) if node.op == "call_function" and not _is_size(node)]
        with graph.inserting_before(join):
            done = _call(graph, record)
            _call(graph, wait, [done])
            if read:
                _call(graph, torch.ops.moe_fx_ascend.hold.default, read)
        branch = [*branch, done]
    put_on(STREAM, graph, branch, captured=captured, option=option)


def put_on(stream: str, graph: fx.Graph, nodes: list[fx.Node], *, captured: bool, option: str) -> None:
    """Move nodes as ``put_behind_inputs`` does, and onto a stream, which starts on them when the inputs are there.

    Args:
        nodes: in order.
        captured: see ``insert``.
        option: what a user can switch off where this torchair has no streams.

    Raises:
        UnsupportedError: it has none.
    """
    with _needed_for(option):
        from torchair.scope import npu_stream_switch

        names, values = (list(column) for column in zip(*npu_stream_switch(stream).attrs, strict=True))
        enter, leave = torch.ops.air.scope_enter.default, torch.ops.air.scope_exit.default
    marks = [_call(graph, enter, names, values)]
    if captured:
        record, wait = _events(option)
        start = _call(graph, record)
        marks = [start, *marks, _call(graph, wait, [start])]
    put_behind_inputs(graph, [*marks, *nodes, _call(graph, leave)])


def put_behind_inputs(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Move nodes together, in order, right behind the last that they read and the graph's inputs."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    place = max([*_inputs(nodes), *graph.find_nodes(op="placeholder")[-1:]], key=order.__getitem__)
    for node in nodes:
        place.append(node)
        place = node


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    """What nodes read of others."""
    return list(dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in nodes))


def _call(graph: fx.Graph, target: torch._ops.OpOverload, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = None
    return node


def _events(option: str) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Operators that record an event on the current stream, and let that stream wait for such."""
    with _needed_for(option):
        import torchair.ops  # noqa: F401  Defines them.

        return torch.ops.air.record.default, torch.ops.air.wait.default


@contextmanager
def _needed_for(option: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this torchair has no streams in a graph as moe-fx marks them ({error}); set {option}=False"
        ) from error
