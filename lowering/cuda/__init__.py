"""The CUDA target: canonical ops on Triton kernels, all else to the finishing compiler.

A node that its kernel does not take (its attributes, sizes or dtypes, an old GPU, no Triton) keeps its reference, and
explain says why.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.targets import ReferenceTarget, canonical_name


class CudaTarget(ReferenceTarget):
    """See :class:`moe_fx.lowering.targets.Target`."""

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """See :class:`Target`."""
        refusal = _refusal(node)
        if refusal is None:
            return "Triton"
        otherwise = super().kernel_for(node, downstream)
        return f"{otherwise}: {refusal}" if refusal else otherwise

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """See :class:`Target`."""
        lowered = False
        ops, _ = _ops_or_reason()
        for node in list(gm.graph.nodes):
            if ops is not None and _refusal(node) is None:
                node.target = ops.KERNELS[canonical_name(node)].overload
                lowered = True
        if lowered:
            _let_views_copy(gm.graph)
        gm.graph.lint()
        gm.recompile()


def _refusal(node: fx.Node) -> str | None:
    """Why a node keeps its reference, in words; empty for a node that is of no concern here; None for a kernel's."""
    name = canonical_name(node)
    if name is None:
        return ""
    ops, reason = _ops_or_reason()
    if ops is None:
        return reason
    if name not in ops.KERNELS:
        return "there is no Triton kernel for it"
    args, kwargs = _values(node)
    tensors = [given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its operands are on several devices ({', '.join(sorted(map(str, devices)))})"
    refusal: str | None = ops.device.unavailable(tensors[0].device) or ops.KERNELS[name].refusal(*args, **kwargs)
    return refusal


def _ops_or_reason() -> tuple[ModuleType | None, str]:
    """The registered ops, loaded when a graph first needs them, or why there are none."""
    try:
        from moe_fx.lowering.cuda import ops
    except ImportError as error:
        return None, f"Triton cannot be imported ({error})"
    return ops, ""


def _values(node: fx.Node) -> tuple[Any, Any]:
    """A node's positional and keyword operands, as fake tensors and constants."""
    return (
        fx.map_arg(node.args, lambda n: n.meta["val"]),
        fx.map_arg(node.kwargs, lambda n: n.meta["val"]),
    )


def _let_views_copy(graph: fx.Graph) -> None:
    """Turn ``view`` into ``reshape``: a kernel's rows lie densely where a reference's result may be a strided view.

    A view that the captured graph could take of the one may not exist of the other, and the reverse; ``reshape`` serves
    both, and is the same view wherever there is one.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


TARGET = CudaTarget("cuda")
