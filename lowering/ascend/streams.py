"""Optional: compute a layer's shared expert on a stream of its own, beside routing and the routed experts.

    h -> route -> experts ------> add          h -> route -> experts ----------------------------> add
    h -> gate, up, act, down --^               h -> [scope: gate, up, act, down on "moe_fx_shared"] --^

The nodes are put together right behind their last input, between the marks that ``torchair.scope.npu_stream_switch``
leaves in a graph. GE waits where data passes from one stream to the other: the shared expert for ``h``, the addition
for both. Only GE does: a captured graph would need events of its own, and gets no second stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from moe_fx.errors import UnsupportedError
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


def insert(gm: fx.GraphModule) -> int:
    """Put every shared expert of a lowered graph on the second stream, in place; returns how many there were.

    Raises:
        UnsupportedError: this torchair has no streams within a graph.
    """
    found = 0
    for combined in list(gm.graph.nodes):
        join, other = _addition(combined) if str(combined.target) in _COMBINED else (None, None)
        branch = _branch(combined, join, other) if join is not None and other is not None else []
        if branch:
            _put_in_scope(gm.graph, branch)
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


def _put_in_scope(graph: fx.Graph, branch: list[fx.Node]) -> None:
    try:
        from torchair.scope import npu_stream_switch

        names, values = (list(column) for column in zip(*npu_stream_switch(STREAM).attrs, strict=True))
        enter, leave = torch.ops.air.scope_enter.default, torch.ops.air.scope_exit.default
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this torchair has no streams in a graph as moe-fx marks them ({error}); set ascend_shared_stream=False"
        ) from error
    order = {node: index for index, node in enumerate(graph.nodes)}
    inside = set(branch)
    before = [operand for node in branch for operand in node.all_input_nodes if operand not in inside]
    last = max([*before, *graph.find_nodes(op="placeholder")[-1:]], key=order.__getitem__)
    with graph.inserting_after(last):
        place = graph.call_function(enter, (names, values))
    place.meta["val"] = None
    for node in branch:
        place.append(node)
        place = node
    with graph.inserting_after(place):
        graph.call_function(leave).meta["val"] = None
