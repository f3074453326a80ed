"""One canonical op, lowered for Ascend and run on ``npu:0`` of the stand-in with eager kernels."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_fx.check import compare_outputs
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.ascend.target import AscendTarget
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.prepared_inputs import hoist


def graph_of(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: int = 0
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A graph of one call on npu tensors, with FakeTensor values, and its inputs.

    Args:
        dynamic: so many inputs, the first ones, have a symbolic first dimension; equal sizes are one symbol.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if len(inputs) > dynamic:
            return mode.from_tensor(tensor, static_shapes=True)
        sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (tensor.dim() - 1)
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input_{len(inputs)}"))

    graph, inputs = fx.Graph(), []

    def operand(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        inputs.append(value.to("npu"))
        node = graph.placeholder(f"input_{len(inputs)}")
        node.meta["val"] = fake(inputs[-1])
        return node

    node = graph.call_function(
        CANONICAL_OPS[op].overload, tuple(map(operand, args)), {key: operand(value) for key, value in kwargs.items()}
    )
    fakes, named_fakes = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = CANONICAL_OPS[op].overload(*fakes, **named_fakes)
    if isinstance(node.meta["val"], tuple):
        results = []
        for index, value in enumerate(node.meta["val"]):
            results.append(graph.call_function(operator.getitem, (node, index)))
            results[-1].meta["val"] = value
        graph.output(tuple(results))
    else:
        graph.output(node)
    return fx.GraphModule({}, graph), inputs


def kernel(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings | None = None) -> str:
    """What explain says about the call."""
    gm, _ = graph_of(op, args, kwargs)
    (node,) = gm.graph.find_nodes(op="call_function", target=CANONICAL_OPS[op].overload)
    return AscendTarget(settings).kernel_for(node, "torchair")


def run(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings | None = None) -> Any:
    """The lowered call's result on the CPU; fails where the op was not lowered."""
    gm, inputs = graph_of(op, args, kwargs)
    AscendTarget(settings).lower(gm, "eager")
    left = gm.graph.find_nodes(op="call_function", target=CANONICAL_OPS[op].overload)
    assert not left, kernel(op, args, kwargs, settings)
    _, with_prepared = hoist(gm, inputs)
    result = with_prepared(gm.forward)(*inputs)
    return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()


def difference(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings | None = None) -> str:
    """How the lowered call misses the reference, by the op's own tolerance; empty where it does not."""
    want = CANONICAL_OPS[op].reference(*args, **kwargs)
    return compare_outputs(op, run(op, args, kwargs, settings), want)
