"""Reading gated activations: which of ``lowering.ops.activation``'s forms a subgraph computes, and from what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Miss
from moe_fx.passes.graph import ALIASES, CASTS, UNIT_DIMS, arg, as_half, aten, dtype, is_op, number, peel

_ELEMENTWISE = (
    *(aten.mul, aten.add, aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.square, aten.pow),
    *(aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh),
    *CASTS,
    *ALIASES,
    *UNIT_DIMS,
)
_UNARY = {aten.silu: "silu", aten.relu: "relu"}
_LAYOUTS = {("first", "second"): "gate_up", ("second", "first"): "up_gate", ("even", "odd"): "interleaved"}


@dataclass(frozen=True)
class Activation:
    """``activate``'s arguments as read of a graph.

    Attributes:
        act, alpha, limit: as in ``lowering.ops.activation.activate``.
        gate: what the activation is applied to; the merged projection with layout ``gate_up``, ``up_gate`` or
            ``interleaved``.
        up: the other factor (layout ``split``), else None.
        layout: as in ``experts``.
    """

    act: str
    gate: fx.Node
    up: fx.Node | None
    layout: str
    alpha: float = 1.702
    limit: float | None = None

    def attributes(self) -> dict[str, Any]:
        """Attributes of the canonical op; alpha only where it is used."""
        attributes: dict[str, Any] = {"act": self.act, "layout": self.layout, "limit": self.limit}
        if self.act == "swiglu_oai":
            attributes["alpha"] = self.alpha
        return attributes


def read_activation(node: fx.Node) -> Activation:
    """Read the activation whose result is ``node``; :class:`Miss` names what does not fit."""
    _require_no_narrowing(node)
    node = _plain(node)
    if is_op(node, aten.mul) and isinstance(node.args[1], fx.Node):
        if _plain(node.args[0]) is _plain(node.args[1]):
            return _ungated(node)
        for gated, up in (node.args, reversed(node.args)):
            activation = _gated(_plain(gated), _plain(up))
            if activation is not None:
                return activation
        if not is_op(_plain(node.args[0]), aten.relu):
            raise Miss("no factor of the product is a known activation (silu, gelu, relu, clamped swiglu)", node)
    return _ungated(node)


@dataclass(frozen=True)
class _Gate:
    act: str
    source: fx.Node
    alpha: float = 1.702
    limit: float | None = None
    limit_after: bool = False


def _gated(gated: fx.Node, up: fx.Node) -> Activation | None:
    gate = _read_gate(gated)
    if gate is None:
        return None
    shifted = is_op(up, aten.add) and number(arg(up, 1)) == 1 and number(up.kwargs.get("alpha", 1)) == 1
    up_source = _plain(up.args[0]) if shifted else up
    up_source, low, high = _read_clamp(up_source)
    act = gate.act
    if act == "scaled_silu":
        if not shifted:
            raise Miss(f"gate * sigmoid({gate.alpha} * gate) without the (up + 1) of swiglu_oai", gated)
        act = "swiglu_oai"
    elif shifted:
        raise Miss("(up + 1) without the scaled sigmoid of swiglu_oai", up)
    if gate.limit_after:
        act = "silu_then_clamp"
    if not (gate.limit == high and gate.limit == (None if low is None else -low)):
        raise Miss("gate and up are clamped to different limits", up)
    layout, gate_source, up_node = _read_layout(gate.source, up_source)
    return Activation(act, gate_source, up_node, layout, gate.alpha, gate.limit)


def _read_layout(gate: fx.Node, up: fx.Node) -> tuple[str, fx.Node, fx.Node | None]:
    gate_half, up_half = as_half(gate), as_half(up)
    if gate_half is not None and up_half is not None and gate_half[0] is up_half[0]:
        layout = _LAYOUTS.get((gate_half[1], up_half[1]))
        if layout is None:
            raise Miss(f"gate is the {gate_half[1]} and up the {up_half[1]} half of the projection", gate)
        return layout, gate_half[0], None
    return "split", gate, up


def _ungated(node: fx.Node) -> Activation:
    if is_op(node, aten.square) or (is_op(node, aten.pow) and number(arg(node, 1)) == 2):
        inner = _plain(node.args[0])
        if is_op(inner, aten.relu):
            return Activation("relu2", _plain(inner.args[0]), None, "none")
    if (
        is_op(node, aten.mul)
        and _plain(node.args[0]) is _plain(node.args[1])
        and is_op(_plain(node.args[0]), aten.relu)
    ):
        return Activation("relu2", _plain(_plain(node.args[0]).args[0]), None, "none")
    gate = _read_gate(node)
    if gate is None or gate.act == "scaled_silu" or gate.limit is not None:
        raise Miss("not a known activation (silu, gelu, relu, relu^2, clamped swiglu)", node)
    return Activation(gate.act, gate.source, None, "none")


def _read_gate(node: fx.Node) -> _Gate | None:
    """``act(x)`` with an optional clamp on either side of the activation."""
    inner, low, high = _read_clamp(node)
    after = high is not None and low is None
    if after:
        node = inner
    if is_op(node, *_UNARY):
        act, source = _UNARY[node.target.overloadpacket], _plain(node.args[0])
    elif is_op(node, aten.gelu):
        act = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
        source = _plain(node.args[0])
    elif is_op(node, aten.mul) and isinstance(node.args[1], fx.Node):
        scaled = _read_scaled_silu(node)
        if scaled is None:
            return None
        source, alpha = scaled
        source, low, high = _read_clamp(source)
        if alpha == 1.0:
            return _Gate("silu", source, limit=high) if low is None else None
        return _Gate("scaled_silu", source, alpha, high) if low is None else None
    else:
        return None
    if after:
        return _Gate(act, source, limit=high, limit_after=True) if act == "silu" else None
    source, low, high = _read_clamp(source)
    return _Gate(act, source, limit=high) if low is None else None


def _read_scaled_silu(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``x * sigmoid(alpha * x)``."""
    for x, gate in (node.args, reversed(node.args)):
        gate = _plain(gate)
        if not is_op(gate, aten.sigmoid):
            continue
        inner, alpha = _plain(gate.args[0]), 1.0
        if is_op(inner, aten.mul):
            factor = number(inner.args[1])
            if factor is None:
                continue
            inner, alpha = _plain(inner.args[0]), factor
        if inner is _plain(x):
            return inner, alpha
    return None


def _read_clamp(node: fx.Node) -> tuple[fx.Node, float | None, float | None]:
    """``(x, low, high)`` of a clamp, or ``(node, None, None)``."""
    low, high = None, None
    while is_op(node, aten.clamp, aten.hardtanh, aten.clamp_max, aten.clamp_min):
        bounds = (arg(node, 1), arg(node, 2)) if is_op(node, aten.clamp, aten.hardtanh) else (arg(node, 1), None)
        if is_op(node, aten.clamp_max):
            bounds = (None, bounds[0])
        if low is not None or high is not None:
            raise Miss("a factor is clamped twice", node)
        if any(bound is not None and number(bound) is None for bound in bounds):
            raise Miss("a clamp's bound is not a constant", node)
        low, high = (None if bound is None else number(bound) for bound in bounds)
        node = _plain(node.args[0])
    return node, low, high


def _require_no_narrowing(result: fx.Node, depth: int = 12) -> None:
    """Casts within the activation go to the result's own dtype or to fp32: nothing is rounded on the way."""
    allowed = {dtype(result), torch.float32, torch.float64}
    frontier = [result]
    for _ in range(depth):
        parents = [p for n in frontier for p in n.all_input_nodes if is_op(n, *_ELEMENTWISE)]
        for parent in parents:
            if is_op(parent, *CASTS) and dtype(parent) not in allowed:
                raise Miss(f"the activation is cast to {dtype(parent)} on the way", parent)
        frontier = [p for p in parents if is_op(p, *_ELEMENTWISE)]
        if not frontier:
            break


def _plain(node: Any) -> Any:
    """Without the casts that ``_require_no_narrowing`` admits; computing wider is within the op's tolerance."""
    return peel(node, *CASTS, *ALIASES, *UNIT_DIMS)
