"""Tensor parallelism: a graph over DTensors becomes one over this rank's shards, which are ordinary tensors.

``torch.distributed.tensor.parallel`` and transformers' plans keep sharded weights as DTensors; dynamo's graph takes
them as inputs, unwraps them (``to_local``) or computes with them. Export and kernels know ordinary tensors only.
Each node that sees a DTensor is replaced by what it does on this rank: ATen ops on shards, and functional collectives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map

from moe_fx.errors import CaptureError

CompiledFn = Callable[..., Any]
aten = torch.ops.aten
_PARTS_OF_LINEAR = {
    aten.t.default, aten.view.default, aten.mm.default, aten.addmm.default, aten._unsafe_view.default,
}  # fmt: skip


@dataclass(frozen=True)
class LocalGraph:
    """A graph over shards.

    Attributes:
        gm: the graph; its inputs are those of the original one, except for device meshes.
        inputs: its example inputs.
        kept: positions of its inputs among the original ones.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    kept: list[int]

    def called_with_dtensors(self, compiled: CompiledFn) -> CompiledFn:
        """A callable with the original calling convention over one compiled from ``gm``."""

        def run(*args: Any) -> Any:
            return compiled(*[_shard(args[i]) for i in self.kept])

        return run


def over_shards(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LocalGraph | None:
    """The graph over the shards of its DTensor inputs.

    Args:
        gm: dynamo's graph; it is not changed.
        example_inputs: its inputs.

    Returns:
        None when there are no DTensors.

    Raises:
        CaptureError: the graph gives DTensors back, or does with them what a shard alone does not tell.
    """
    if not any(map(_is_dtensor, example_inputs)):
        return None
    if _holds_dtensor(_outputs(gm)):
        raise CaptureError(
            "the compiled function returns a DTensor, and is taken only over its shards; return its .to_local()"
        )
    for node in gm.graph.nodes:
        _require_equal_shards(_value(node))
    placeholders = gm.graph.find_nodes(op="placeholder")
    meshes = {n: given for n, given in zip(placeholders, example_inputs, strict=True) if _is_mesh(given)}
    try:
        local = fx.GraphModule(gm, _localised(gm.graph, meshes))
    except Exception as error:
        raise CaptureError(f"a computation on DTensors could not be brought to this rank's shards ({error})") from error
    local.meta.update(gm.meta)
    kept = [i for i, node in enumerate(placeholders) if node not in meshes]
    return LocalGraph(local, [_shard(example_inputs[i]) for i in kept], kept)


def _localised(graph: fx.Graph, meshes: Mapping[fx.Node, Any]) -> fx.Graph:
    """A copy in which every node that takes or gives DTensors is what it does on this rank; meshes are constants."""
    local = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in meshes:
            continue
        sees_dtensors = _holds_dtensor([_value(n) for n in (node, *node.all_input_nodes)])
        if node.op.startswith("call_") and sees_dtensors:
            copies[node] = _inline(local, node, copies, meshes)
            continue
        copy = copies[node] = local.node_copy(node, lambda n: copies[n])
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        if "example_value" in copy.meta:
            copy.meta["example_value"] = _shard(copy.meta["example_value"])
    local.lint()
    return local


def _inline(local: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, Any], meshes: Mapping[fx.Node, Any]) -> Any:
    """Append what ``node`` does on this rank, traced; what stands for its result."""
    inputs = [n for n in node.all_input_nodes if n not in meshes]

    def run(*shards: Any) -> Any:
        given = dict(meshes)
        given.update((n, _whole(x, _value(n))) for n, x in zip(inputs, shards, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        if node.op == "call_method":
            return _shard(getattr(args[0], str(node.target))(*args[1:], **kwargs))
        assert callable(node.target)
        return _shard(node.target(*args, **kwargs))

    with torch.no_grad():
        traced = make_fx(run)(*[_shard(_value(n)) for n in inputs])
    if _is_one_linear(node, traced.graph):
        copy = local.node_copy(node, lambda n: copies[n])
        copy.meta["example_value"] = _shard(_value(node))
        return copy
    given = tree_leaves([copies[n] for n in inputs])
    memo = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    first_new = len(local.nodes)
    result = local.graph_copy(traced.graph, memo)
    for new in list(local.nodes)[first_new:]:
        assert new.op == "call_function", f"{node.target} makes a constant of its own"
        # As dynamo's nodes: where the model wrote it, and the value under dynamo's name.
        new.meta = {**node.meta, "example_value": new.meta["val"]}
    return result


def _is_one_linear(node: fx.Node, traced: fx.Graph) -> bool:
    """Whether a projection of DTensors is the same projection of their shards: nothing in it moves between ranks.

    The trace has it in parts, since DTensor takes composite ops apart; capture and its passes want it whole.
    """
    on_tensors = [n for n in traced.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    called = {n.target for n in on_tensors if n.op == "call_function"}
    return node.target is torch.nn.functional.linear and called <= _PARTS_OF_LINEAR


def _whole(shards: Any, like: Any) -> Any:
    """The values that ``shards`` are this rank's parts of: DTensors where ``like`` holds some."""
    return tree_map(lambda shard, x: _dtensor(shard, x._spec) if _is_dtensor(x) else shard, shards, like)


def _require_equal_shards(value: Any) -> None:
    """Refuse DTensors with symbolic sizes whose shards may differ: one of them does not tell the whole size then."""
    for spec in [x._spec for x in tree_leaves(value) if _is_dtensor(x)]:
        for placement, ranks in zip(spec.placements, _mesh(spec).shape, strict=True):
            size = spec.shape[placement.dim] if placement.is_shard() else 0
            if isinstance(size, torch.SymInt) and not statically_known_true(size % ranks == 0):
                raise CaptureError(
                    f"a DTensor of shape {tuple(spec.shape)} is sharded along dimension {placement.dim}, whose "
                    f"symbolic size may not be a multiple of {ranks}; mark it static (torch._dynamo.mark_static)"
                )


def _mesh(spec: Any) -> Any:
    """The device mesh; dynamo has objects of its own stand for those that are a graph's inputs."""
    return getattr(spec.mesh, "real_obj", spec.mesh)


def _dtensor(shard: torch.Tensor, spec: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    if not any(isinstance(size, torch.SymInt) for size in spec.shape):
        return DTensor(shard, spec, requires_grad=False)
    # Symbolic sizes have to be those of the traced shard, which tells the whole where shards are equal.
    return DTensor.from_local(shard, _mesh(spec), spec.placements, run_check=False)


def _shard(value: Any) -> Any:
    """This rank's part of a value, which may hold DTensors."""
    return tree_map(_shard_of_one, value) if _holds_dtensor(value) else value


def _shard_of_one(x: Any) -> Any:
    if not _is_dtensor(x):
        return x
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    # A result whose collective may still be running is no ordinary tensor yet.
    return x._local_tensor.wait() if isinstance(x._local_tensor, AsyncCollectiveTensor) else x._local_tensor


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _outputs(gm: fx.GraphModule) -> list[Any]:
    return [_value(n) for n in gm.graph.output_node().all_input_nodes]


def _holds_dtensor(value: Any) -> bool:
    return any(map(_is_dtensor, tree_leaves(value)))


def _is_dtensor(x: Any) -> bool:
    # Asked of every graph: where nothing has loaded DTensor, which takes its time, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _is_mesh(x: Any) -> bool:
    return isinstance(x, sys.modules["torch.distributed.device_mesh"].DeviceMesh)
