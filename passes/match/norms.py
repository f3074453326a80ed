"""RMSNorm in every spelling, and residual add + RMSNorm.

Unfused::

    h = x.float()
    h = h * rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)     # also pow(-0.5), h / sqrt(...), aten.rms_norm
    y = weight * h.to(dtype)                                 # cast before the weight
    y = (weight * h).to(dtype)                               # cast after the weight
    y = (h * (1 + weight.float())).to(dtype)                 # offset weight

Fused::

    y = moe_fx.rms_norm(x, weight, eps, cast=..., offset=...)
    y, total = moe_fx.add_rms_norm(x, residual, weight, eps, ...)   # when x was itself a residual sum
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    arg,
    aten,
    bind,
    dtype,
    is_last_dim,
    is_op,
    number,
    only_user,
    peel,
    rank,
    same,
    same_shape,
    shape,
)


@dataclass
class _Norm:
    x: fx.Node
    eps: float
    result: fx.Node
    weight: fx.Node | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


class RmsNormPass(Pass):
    """RMSNorm (fp32 inside, cast before or after the weight, weight or 1 + weight) to ``moe_fx.rms_norm``."""

    name = "rms_norm"
    level = Level.BITWISE

    def run(self, ctx: MatchContext) -> None:
        for node in list(ctx.graph.nodes):
            if is_op(node, aten.rms_norm):
                self._try(ctx, node, _read_op)
            elif _is_reciprocal_root(node) and _mean_square(node) is not None and not _is_variance(node):
                self._try(ctx, node, _read_spelled)
        ctx.finish_pass()

    def _try(self, ctx: MatchContext, node: fx.Node, read: Any) -> None:
        try:
            norm = read(node)
        except Miss as miss:
            ctx.missed("norm", node, miss)
            return
        args = (norm.x, norm.weight, norm.eps)
        new = ctx.emit_op("rms_norm", args, norm.attributes, like=node)
        ctx.replace(norm.result, new)
        form = f"cast {norm.attributes['cast']} weight"
        if norm.attributes.get("offset"):
            form = f"{norm.attributes['offset']:g} + weight"
        if norm.weight is None:
            form = "no weight"
        ctx.matched("norm", norm.result, new, form=form, replaced=[norm.result])


class AddRmsNormPass(Pass):
    """Residual add + ``moe_fx.rms_norm`` to ``moe_fx.add_rms_norm``."""

    name = "add_rms_norm"
    level = Level.BITWISE
    requires = ("rms_norm",)

    def run(self, ctx: MatchContext) -> None:
        sites = {site.node: site for site in ctx.sites if site.kind == "norm" and site.matched}
        for norm in ctx.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.rms_norm.default):
            total = norm.args[0]
            if not _is_residual_sum(total):
                continue
            x, residual = total.args[:2]
            attributes = dict(norm.kwargs)
            new = ctx.emit_op("add_rms_norm", (x, residual, *norm.args[1:]), attributes, like=norm)
            ctx.replace(norm, ctx.output_of(new, 0))
            ctx.replace(total, ctx.output_of(new, 1))
            site = sites.get(norm.name)
            if site is not None:
                ctx.sites.remove(site)
            form = f"add, {site.form}" if site is not None else "add, rms_norm"
            normed = site.replaced[0] if site is not None else norm
            ctx.matched("norm", norm, new, form=form, replaced=[normed, total])
        ctx.finish_pass()


def _is_residual_sum(node: Any) -> bool:
    """``a + b`` of two activations of one shape and dtype."""
    if not is_op(node, aten.add) or number(node.kwargs.get("alpha", 1)) != 1:
        return False
    x, residual = node.args
    if not (isinstance(x, fx.Node) and isinstance(residual, fx.Node)):
        return False
    if rank(x) < 2 or not same_shape(shape(x), shape(residual)):
        return False
    return dtype(x) == dtype(residual) == dtype(node)


def _read_op(node: fx.Node) -> _Norm:
    """``aten.rms_norm``: fp32 inside, cast after the weight; eps defaults to the machine epsilon of fp32."""
    bound = bind(node)
    x = bound["input"]
    require(len(bound["normalized_shape"]) == 1, "the norm is over more than the last dimension", node)
    require(dtype(x) != torch.float64, "the norm is computed in torch.float64, not fp32", node)
    eps = torch.finfo(torch.float32).eps if bound["eps"] is None else bound["eps"]
    return _Norm(x, float(eps), node, bound["weight"], {"cast": "after"})


def _is_reciprocal_root(node: fx.Node) -> bool:
    if is_op(node, aten.rsqrt, aten.sqrt):
        return True
    return is_op(node, aten.pow) and number(arg(node, 1)) in (-0.5, 0.5)


def _mean_square(node: fx.Node) -> fx.Node | None:
    """The mean of squares under a root, with or without eps."""
    inner = node.args[0]
    if is_op(inner, aten.add):
        inner = next((a for a in inner.args if is_op(a, aten.mean)), None)
    if not is_op(inner, aten.mean):
        return None
    squared = inner.args[0]
    return inner if _squared(squared) is not None else None


def _is_variance(root: fx.Node) -> bool:
    """Whether the mean is of centred values: that is a LayerNorm, no candidate."""
    mean = _mean_square(root)
    centred = peel(_squared(mean.args[0]), *CASTS) if mean is not None else None
    return is_op(centred, aten.sub)


def _squared(node: Any) -> fx.Node | None:
    """x of ``x.pow(2)``, ``x.square()`` or ``x * x``."""
    if is_op(node, aten.square) or (is_op(node, aten.pow) and number(arg(node, 1)) == 2):
        return node.args[0]
    if is_op(node, aten.mul) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _read_spelled(root: fx.Node) -> _Norm:
    mean = _mean_square(root)
    assert mean is not None
    squared = mean.args[0]
    wide = _squared(squared)
    assert wide is not None
    require(is_last_dim(arg(mean, 1), squared), "the mean is not over the last dimension", mean)
    require(bool(arg(mean, 2)), "the mean does not keep its dimension", mean)
    inner = root.args[0]
    require(inner is not mean, "no eps is added to the mean square", root)
    require(number(inner.kwargs.get("alpha", 1)) == 1, "eps is scaled by the sum's alpha", inner)
    eps = number(inner.args[1] if inner.args[0] is mean else inner.args[0])
    require(eps is not None and same_shape(shape(inner), shape(mean)), "eps is not a constant", inner)
    x = wide
    for node in (wide, mean, root):
        require(dtype(node) == torch.float32, f"the norm is computed in {dtype(node)}, not fp32", node)
    if is_op(wide, *CASTS):
        x = wide.args[0]
        require(dtype(x).is_floating_point, f"the activation is {dtype(x)}, not floating", wide)
    interior = [squared, mean, inner, root]
    for node in interior:
        require(len(node.users) == 1, "an intermediate of the norm has another consumer", node)
    scaled = _read_scaling(root, wide)
    norm = _Norm(x, float(eps), scaled)
    _read_weight(norm)
    return norm


def _read_scaling(root: fx.Node, wide: fx.Node) -> fx.Node:
    """The node that multiplies x by the reciprocal root (or divides it by the root)."""
    divides = is_op(root, aten.sqrt) or (is_op(root, aten.pow) and number(arg(root, 1)) == 0.5)
    node = only_user(root)
    if divides:
        require(is_op(node, aten.div) and _is_upcast(node.args[0], wide), "x is not divided by the root", root)
        # x / sqrt(v) rounds differently from x * rsqrt(v).
        raise Miss("the norm divides by a square root, which no kernel's rounding matches bit for bit", node)
    factors = (node.args, node.args[::-1]) if is_op(node, aten.mul) else ()
    scales = any(factor is root and _is_upcast(x, wide) for factor, x in factors)
    require(scales, "the reciprocal root does not scale x", root)
    return node


def _is_upcast(node: Any, wide: fx.Node) -> bool:
    """Whether a factor is ``wide``, the same cast written again, or the activation itself, which the root promotes."""
    if node is wide:
        return True
    if not is_op(wide, *CASTS):
        return False
    source = wide.args[0]
    if node is source:
        return torch.promote_types(dtype(source), torch.float32) == torch.float32
    return is_op(node, *CASTS) and node.args[0] is source and dtype(node) == dtype(wide)


def _read_weight(norm: _Norm) -> None:
    """Follow the normalised value through cast and weight in either order."""
    node, source = norm.result, dtype(norm.x)
    cast = None
    user = only_user(node)
    if is_op(user, *CASTS) and dtype(user) == source and source != torch.float32:
        node, cast, user = user, "before", only_user(user)
    weight, offset = _weight_of(user, node, cast)
    if weight is not None:
        assert user is not None
        node, norm.weight = user, weight
        if cast is None:
            after = only_user(node)
            if is_op(after, *CASTS) and dtype(after).is_floating_point:
                node = after
            cast = "after"
    norm.result = node
    norm.attributes = {"cast": cast or "after", "offset": offset}
    if norm.attributes["cast"] == "after" and dtype(node) != source:
        norm.attributes["out_dtype"] = dtype(node)


def _weight_of(user: fx.Node | None, normalised: fx.Node, cast: str | None) -> tuple[fx.Node | None, float]:
    """``(weight [D], offset)`` when user multiplies the normalised value by one."""
    if not is_op(user, aten.mul):
        return None, 0.0
    assert user is not None
    other = user.args[1] if user.args[0] is normalised else user.args[0]
    if not isinstance(other, fx.Node) or rank(other) != 1 or not same(shape(other)[0], shape(normalised)[-1]):
        return None, 0.0
    if cast is None and dtype(other) == torch.float32:
        if is_op(other, aten.add) and number(arg(other, 1)) and number(other.kwargs.get("alpha", 1)) == 1:
            return _narrow(other.args[0]), number(arg(other, 1)) or 0.0
        return _narrow(other), 0.0
    return other, 0.0


def _narrow(weight: fx.Node) -> fx.Node:
    """The weight before its exact cast to fp32, which the op makes itself."""
    if not is_op(weight, *CASTS):
        return weight
    stored = weight.args[0]
    exact = dtype(stored).is_floating_point and torch.promote_types(dtype(stored), torch.float32) == torch.float32
    return peel(stored, *ALIASES) if exact else weight
