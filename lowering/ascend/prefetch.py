"""Optional: read the experts' weights into the L2 cache while the layer's attention and routing run.

Each ``npu_prefetch`` is tied to the tensor that the layer starts from: GE may run it from then on, beside the layer's
other work. A captured graph would run it in its place among that work, so there it goes on a stream of its own, which
waits for the tensor. It computes nothing, and nothing waits for it; torch_npu declares it as a side effect, so that it
stays.

The L2 cache holds a fraction of a layer's experts, so the option sets a limit per layer: the first grouped product's
weight comes first, and what the limit leaves goes to the second's. This pays where most experts are used in each step
(large batches, expert parallelism): the operator reads from the start of a weight, whichever experts will be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from moe_fx.lowering.ascend import streams
from moe_fx.lowering.ascend.arguments import layer_of, value
from moe_fx.lowering.prepared_inputs import NAMESPACE
from moe_fx.passes.graph import peel

# All layers use one stream: what is to be used first is read first.
STREAM = "moe_fx_prefetch"
_MIB = 1 << 20
# Operators by name, since this module is imported where torch_npu is not.
_PRODUCTS = (
    "npu.npu_grouped_matmul.default",
    "npu.npu_grouped_matmul_swiglu_quant_v2.default",
    "npu.npu_grouped_matmul_finalize_routing.default",
)
# Norms, and how many tensors each adds first.
_SUMMANDS = {"npu.npu_rms_norm.default": 1, "npu.npu_add_rms_norm.default": 2}
# Views that ``ascend_weights="as_is"`` multiplies: the memory to read is that of the weight under them.
_VIEWS = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.detach.default)


def insert(gm: fx.GraphModule, mib: int, *, captured: bool) -> None:
    """Put prefetches of at most ``mib`` MiB per layer into a lowered graph, in place.

    Args:
        captured: the graph is captured, and prefetches go on a stream of their own; otherwise GE runs it.

    Raises:
        UnsupportedError: this torchair has no streams within a captured graph.
    """
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    starts = _starts(order)
    found: dict[fx.Node, list[fx.Node]] = {}
    left: dict[fx.Node, int] = {}
    for product in order:
        for weight in _weights(product):
            first = starts.get(layer_of(product))
            if first is None or order[first] > order[product]:
                first = _routed_rows(product)
            if first is None or not _is_given(weight):
                continue
            fake = value(weight)
            size = min(fake.numel() * fake.element_size(), left.setdefault(first, mib * _MIB))
            if size:
                found.setdefault(first, []).append(_prefetch(gm.graph, weight, first, size))
                left[first] -= size
    # From the last on, each right behind its start: so they keep their order where starts are the graph's inputs.
    for prefetches in reversed(found.values()):
        if captured:
            streams.put_on(STREAM, gm.graph, prefetches, captured=True, option="ascend_prefetch")
        else:
            streams.put_behind_inputs(gm.graph, prefetches)


def _starts(order: dict[fx.Node, int]) -> dict[str, fx.Node]:
    """By layer, the tensor that its first norm reads; of two that it adds, the one that is there last."""
    found: dict[str, fx.Node] = {}
    for node in order:
        layer, summands = layer_of(node), _SUMMANDS.get(str(node.target), 0)
        if layer and summands:
            read = [summand for summand in node.args[:summands] if isinstance(summand, fx.Node)]
            found.setdefault(layer, max(read, key=order.__getitem__))
    return found


def _routed_rows(product: fx.Node) -> fx.Node | None:
    """Where no layer is known: what the block routes, which is there before its router has run; its views need not."""
    node: fx.Node | None = product
    while node is not None and str(node.target) != "npu.npu_moe_init_routing_v2.default":
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    found: fx.Node | None = peel(node.all_input_nodes[0]) if node is not None else None
    return found


def _weights(product: fx.Node) -> Iterator[fx.Node]:
    if str(product.target) in _PRODUCTS:
        weights = product.args[1]
        for weight in weights if isinstance(weights, (list, tuple)) else [weights]:
            assert isinstance(weight, fx.Node)
            while weight.target in _VIEWS:
                weight = weight.all_input_nodes[0]
            yield weight


def _is_given(weight: fx.Node) -> bool:
    """Whether a weight is there before the graph runs: an input of it, or prepared from some."""
    return weight.op == "placeholder" or getattr(weight.target, "namespace", None) == NAMESPACE


def _prefetch(graph: fx.Graph, weight: fx.Node, start: fx.Node, size: int) -> fx.Node:
    """A prefetch of ``size`` bytes of ``weight`` as soon as ``start`` is there, yet to be put in its place."""
    node = graph.call_function(torch.ops.npu.npu_prefetch.default, (weight, start, size))
    node.meta = {key: start.meta[key] for key in ("stack_trace", "nn_module_stack") if key in start.meta}
    node.meta["val"] = None
    return node
