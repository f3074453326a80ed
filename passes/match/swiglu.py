"""The gated activation of dense MLPs and shared experts -> ``moe_fx.swiglu``.

Unfused::

    down(silu(gate_proj(x)) * up_proj(x))       # separate projections
    g, u = gate_up_proj(x).chunk(2, -1); down(silu(g) * u)

Fused::

    down(moe_fx.swiglu(gate_proj(x), up_proj(x)))
    down(moe_fx.swiglu(gate_up_proj(x)))

Where gate and up are projections by two slices of one stored weight, the two products are merged into one for free
(unless level is bitwise: a matrix product of another width may add in another order).
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    UNIT_DIMS,
    VIEWS,
    as_half,
    as_slice,
    aten,
    describe,
    dtype,
    is_op,
    only_user,
    peel,
    rank,
    same,
    same_shape,
    shape,
)
from moe_fx.passes.match.activation import Activation, read_activation

_PROJECTIONS = (aten.linear, aten.mm, aten.addmm, aten.matmul)
_GATE_FUNCTIONS = (aten.silu, aten.gelu, aten.relu)
_MERGED_HERE = "sliced weight, merged"
_CLAMPS = (aten.clamp, aten.clamp_min, aten.clamp_max)


class SwigluPass(Pass):
    """Dense SwiGLU: act(gate) * up between projections, separate or merged, to ``moe_fx.swiglu``."""

    name = "swiglu"
    level = Level.BITWISE

    def run(self, ctx: MatchContext) -> None:
        for node in list(ctx.graph.nodes):
            if _is_candidate(node):
                try:
                    activation = _read(node)
                except Miss as miss:
                    ctx.missed("swiglu", node, miss)
                    continue
                _rewrite(ctx, node, activation)
        ctx.finish_pass()


def _is_candidate(node: fx.Node) -> bool:
    """A product with an activated factor that goes into a projection and comes out of one."""
    if not is_op(node, aten.mul) or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    gate, up = node.args
    if not any(_is_activated_projection(a) and _is_up(b) for a, b in ((gate, up), (up, gate))):
        return False
    user = only_user(node)
    while is_op(user, *VIEWS):
        user = only_user(user)
    return is_op(user, *_PROJECTIONS)


def _is_activated_projection(node: Any) -> bool:
    node = peel(node, *ALIASES, *CASTS, *_CLAMPS)
    if is_op(node, aten.mul):
        return any(_is_scaled_silu(gate, factor) for gate, factor in (node.args, node.args[::-1]))
    return is_op(node, *_GATE_FUNCTIONS) and _projection(node.args[0]) is not None


def _is_scaled_silu(gate: Any, factor: Any) -> bool:
    """Whether ``gate * factor`` looks like ``gate * sigmoid(alpha * gate)`` of a projection."""
    if not is_op(factor, aten.sigmoid):
        return False
    source = _projection(gate)
    return source is not None and source is _projection(peel(factor.args[0], aten.mul))


def _is_up(node: Any) -> bool:
    return _projection(node.args[0] if is_op(node, aten.add) else node) is not None


def _projection(node: Any) -> fx.Node | None:
    """The matrix product that node is (a half of)."""
    for _ in range(6):
        node = peel(node, *ALIASES, *CASTS, *UNIT_DIMS, *_CLAMPS, aten.view)
        if is_op(node, *_PROJECTIONS):
            return node
        cut = as_slice(node)
        if cut is not None:
            node = cut.source
        elif is_op(node, aten.select):
            node = node.args[0]
        elif is_op(node, operator.getitem) and is_op(node.args[0], aten.unbind):
            node = node.args[0].args[0]
        else:
            return None
    return None


def _read(node: fx.Node) -> Activation:
    activation = read_activation(node)
    require(activation.layout != "none", "the activation has no gate", node)
    factors = [activation.gate] + ([activation.up] if activation.up is not None else [])
    for factor in factors:
        require(_projection(factor) is not None, "a factor of the gated activation is no projection", factor)
    interior = _interior(node, factors)
    for inner in (*factors, *interior):
        wide = dtype(inner) != dtype(node) or is_op(inner, *CASTS)
        require(not wide, "the activation is computed in another dtype than its inputs", inner)
    for inner in interior:
        private = as_half(inner) is not None or all(user is node or user in interior for user in inner.users)
        require(private, f"{describe(inner)} has another consumer", inner)
    spelled = activation.act == "silu" and not any(is_op(inner, aten.silu) for inner in interior)
    require(not spelled, "gate * sigmoid(gate) rounds differently than silu(gate)", node)
    width = shape(activation.gate)[-1]
    of_gate = shape(node)[-1] * (1 if activation.up is not None else 2)
    plain = same_shape(shape(node)[:-1], shape(activation.gate)[:-1]) and same(of_gate, width)
    require(plain, "gate and up differ in shape from their product", node)
    if activation.up is not None:
        require(same_shape(shape(activation.gate), shape(activation.up)), "gate and up differ in shape", node)
    return activation


def _interior(node: fx.Node, factors: list[fx.Node]) -> list[fx.Node]:
    """What lies between the factors and their product, the halves of a merged projection included."""
    found: list[fx.Node] = []
    queue = [node]
    while queue:
        for parent in queue.pop().all_input_nodes:
            if parent not in factors and parent not in found and parent.op == "call_function":
                found.append(parent)
                queue += [] if as_half(parent) is not None else [parent]
    return found


def _rewrite(ctx: MatchContext, node: fx.Node, activation: Activation) -> None:
    attributes = activation.attributes()
    gate, up, form = activation.gate, activation.up, "merged"
    if up is not None:
        attributes.pop("layout")
        form = "separate"
        merged = _merge_projections(ctx, gate, up) if ctx.allows(Level.TOLERANCE) else None
        if merged is not None:
            gate, up, form = merged, None, _MERGED_HERE
    new = ctx.emit_op("swiglu", (gate,) if up is None else (gate, up), attributes, like=node)
    ctx.replace(node, new)
    ctx.matched("swiglu", node, new, form=f"{form}, {activation.act}", replaced=[node])
    if form == _MERGED_HERE:
        ctx.sites[-1].level = Level.TOLERANCE


def _merge_projections(ctx: MatchContext, gate: fx.Node, up: fx.Node) -> fx.Node | None:
    """One product for gate and up when their weights are the two halves of one stored weight."""
    if not (is_op(gate, aten.linear) and is_op(up, aten.linear)) or gate.args[0] is not up.args[0]:
        return None
    if len(gate.args) > 2 or len(up.args) > 2:
        return None
    first, second = as_slice(gate.args[1]), as_slice(up.args[1])
    if first is None or second is None or first.source is not second.source or (first.dim, second.dim) != (0, 0):
        return None
    weight = first.source
    halves = (
        rank(weight) == 2
        and first.step == second.step == 1
        and same(first.start, 0)
        and same(first.stop, second.start)
        and same(second.stop, shape(weight)[0])
        and same(first.stop * 2, shape(weight)[0])
    )
    return ctx.emit(aten.linear.default, (gate.args[0], weight), like=gate) if halves else None
