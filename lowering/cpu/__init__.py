"""The CPU target: ``experts`` and its quantised forms on the C++ engine, all else back to the finishing compiler.

What the engine does not take (fp32 and transposed weights), or what there is no engine for (``moe_fx._C`` cannot be
loaded), goes back to Inductor in a form that it makes fast (``experts``), or runs the reference. The other ops are
composites, whose references Inductor fuses as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import fx

from moe_fx.lowering.cpu import experts
from moe_fx.lowering.inline import inline
from moe_fx.lowering.targets import ReferenceTarget, canonical_name

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class CpuTarget(ReferenceTarget):
    """See :class:`moe_fx.lowering.targets.Target`."""

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """See :class:`Target`."""
        module = load_engine()
        weights = None if module is None else _weights_on_engine(node, module)
        if module is not None and weights is not None:
            return module.description(weights)
        form = _form(node, downstream)
        return super().kernel_for(node, downstream) if form is None else f"{downstream} ({form.__name__})"

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """See :class:`Target`."""
        module = load_engine()
        for node in list(gm.graph.nodes):
            name = canonical_name(node)
            if module is not None and name is not None and _weights_on_engine(node, module) is not None:
                node.target = getattr(getattr(torch.ops, module.NAMESPACE), name).default
                node.kwargs = {key: given for key, given in node.kwargs.items() if key != "transposed"}
                continue
            form = _form(node, downstream)
            if form is not None:
                inline(gm, node, form, list(node.args), **node.kwargs)
        gm.graph.lint()
        gm.recompile()


def load_engine() -> ModuleType | None:
    """The engine's ops, or None where the extension is missing; loaded when a graph first needs them."""
    try:
        from moe_fx.lowering.cpu import engine as module
    except ImportError:
        return None
    return module


def _form(node: fx.Node, downstream: str) -> Callable[..., torch.Tensor] | None:
    """How to spell an ``experts`` node; only Inductor keeps the gathered weights from being stored."""
    is_experts = canonical_name(node) == "experts"
    return experts.choose(node) if is_experts and downstream == "inductor" else None


def _weights_on_engine(node: fx.Node, module: ModuleType) -> str | None:
    """The weights of a node that the engine runs, in words (``bf16``, ``int4 g128, int8 activations``), else None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target is getattr(torch.ops, module.NAMESPACE).experts_packed.default:
        return _quantized(str(node.kwargs.get("packed_as") or "packed"), node)
    name = canonical_name(node)
    if name not in ("experts", "experts_int8", "experts_int4") or len(node.args) < 5:
        return None
    x, out_dtype = _value(node.args[0]), node.kwargs.get("out_dtype")
    known = (x.dtype, out_dtype or x.dtype)
    if x.device.type not in ("cpu", "meta") or not all(dtype in module.ACTIVATION_DTYPES for dtype in known):
        return None
    return _dense_weights(node, module) if name == "experts" else _quantized_weights(node, module)


def _dense_weights(node: fx.Node, module: ModuleType) -> str | None:
    matrices = [_value(arg) for arg in (*node.args[3:5], *node.args[7:8]) if arg is not None]
    rows_in_place = all(
        w.dtype in module.DENSE_DTYPES and w.stride(2) == 1 and w.stride(1) >= w.shape[2] for w in matrices
    )
    return None if node.kwargs.get("transposed") or not rows_in_place else _DTYPE_NAMES[matrices[0].dtype]


def _quantized_weights(node: fx.Node, module: ModuleType) -> str | None:
    given: list[Any] = [*node.args[3:], *[None] * 6]
    sources = [arg for arg in given if arg is not None]
    # A weight that the graph itself computes would be packed again in every call.
    if any(arg.op not in ("placeholder", "get_attr") for arg in sources):
        return None
    w13, w13_scale, w2, w2_scale = map(_value, given[:4])
    if canonical_name(node) == "experts_int4":
        zero, biases = given[4], given[6:8]
    else:
        zero, biases = None, given[4:6]
    if w13.device.type == "meta":
        return None
    layout, biased = node.kwargs.get("layout", "gate_up"), any(bias is not None for bias in biases)
    try:
        spec = module.quantized_spec(w13, w13_scale, w2, w2_scale, zero, layout, biased)
    except ValueError:
        return None
    return _quantized(spec.label, node)


def _quantized(label: str, node: fx.Node) -> str:
    return f"{label}, int8 activations" if node.kwargs.get("dynamic_activations") else label


def _value(node: Any) -> Any:
    return node.meta["val"]


TARGET = CpuTarget("cpu")
