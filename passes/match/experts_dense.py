"""Experts computed for every token and weighed by a mostly-zero table -> ``moe_fx.experts``.

Unfused (Llama-4 weighs the input; gpt-oss's and DBRX's dense paths, gpt-fast's einsum, weigh the output)::

    h = bmm(x.expand(E, T, H), w13)                # also matmul, or einsum("ti,eoi->teo", x, w)
    h = act(h[..., :I]) * h[..., I:]
    y = (bmm(h, w2) * table.t()[:, :, None]).sum(0)     # table [T, E] = zeros.scatter(1, ids, weights)

Fused::

    y = moe_fx.experts(x, weights, ids, w13, w2, ...)

Experts that were not selected are not computed any more: their product with a zero weight is taken as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    UNIT_DIMS,
    arg,
    aten,
    describe,
    dtype,
    is_op,
    number,
    only_user,
    peel,
    rank,
    same,
    shape,
    sources,
)
from moe_fx.passes.match.activation import Activation, read_activation
from moe_fx.passes.match.dense_weights import Routing, apply_late_score, read_dense_table
from moe_fx.passes.match.experts import narrow_ids


class ExpertsDensePass(Pass):
    """Experts computed for all tokens and weighed by a scattered table to ``moe_fx.experts``."""

    name = "experts_dense"
    level = Level.TOLERANCE

    def run(self, ctx: MatchContext) -> None:
        products = {n: p for n in ctx.graph.nodes if (p := _read_product(n)) is not None}
        for node, down in products.items():
            ups = _feeders(down.rows, products)
            if not ups:
                continue
            try:
                site = _read_site(down, [products[up] for up in ups])
                if not ctx.allows(self.level):
                    raise Miss("level='bitwise' excludes this rewrite (its level is tolerance)", node)
            except Miss as miss:
                ctx.missed("experts", node, miss)
                continue
            _rewrite(ctx, site)
        ctx.finish_pass()


@dataclass(frozen=True)
class _Product:
    """One product of all tokens with all experts' weights.

    Attributes:
        out: [E, T, N] (expert_axis 0) or [T, E, N] (expert_axis 1), bias included.
        rows: left operand.
        weight: as stored; ``transposed`` when [E, in, out].
    """

    node: fx.Node
    out: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    expert_axis: int
    bias: fx.Node | None = None


@dataclass(frozen=True)
class _Dense:
    ups: list[_Product]
    down: _Product
    activation: Activation
    x: fx.Node
    routing: Routing
    weight_on: str
    result: fx.Node


def _read_product(node: fx.Node) -> _Product | None:
    if is_op(node, aten.bmm, aten.matmul, aten.baddbmm) and rank(node) == 3:
        operands = node.args[1:3] if is_op(node, aten.baddbmm) else node.args[:2]
        rows, weight = operands
        stored, transposed = _stored(weight)
        if stored is None or not isinstance(rows, fx.Node):
            return None
        bias = None
        if is_op(node, aten.baddbmm):
            bias = _expert_bias(node.args[0])
            if bias is None or not (number(node.kwargs.get("beta", 1)) == number(node.kwargs.get("alpha", 1)) == 1):
                return None
        product = _Product(node, node, rows, stored, transposed, 0, bias)
    elif is_op(node, aten.einsum) and rank(node) == 3:
        read = _read_einsum(node)
        if read is None:
            return None
        product = read
    else:
        return None
    return _with_bias(product)


def _stored(weight: Any) -> tuple[fx.Node | None, bool]:
    """A right operand [E, in, out] as ``(stored 3-D graph input, stored as [E, in, out])``."""
    transposed = True
    while is_op(weight, aten.transpose, aten.permute, aten.mT, *ALIASES):
        if not is_op(weight, *ALIASES):
            last_two = is_op(weight, aten.mT) or {d % 3 for d in weight.args[1:3] if isinstance(d, int)} == {1, 2}
            if not last_two:
                return None, False
            transposed = not transposed
        weight = weight.args[0]
    is_parameter = isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr") and rank(weight) == 3
    return (weight, transposed) if is_parameter else (None, False)


def _read_einsum(node: fx.Node) -> _Product | None:
    equation = str(node.args[0]).replace(" ", "")
    operands: list[Any] = list(node.args[1])
    inputs, _, result = equation.partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or len(result) != 3:
        return None
    if _stored(operands[0])[0] is operands[0]:
        operands, terms = operands[::-1], terms[::-1]
    rows, weight = operands
    if _stored(weight)[0] is not weight or len(terms[1]) != 3:
        return None
    expert, a, b = list(terms[1])
    contracted = terms[0][-1]
    token = terms[0].replace(expert, "")[0]
    free = b if contracted == a else a
    fits = contracted in (a, b) and set(terms[0]) <= {token, expert, contracted} and free == result[2]
    if not fits or result[:2] not in (expert + token, token + expert):
        return None
    if len(terms[0]) == 3 and terms[0][:2] != result[:2]:
        return None
    return _Product(node, node, rows, weight, contracted == a, result.index(expert))


def _with_bias(product: _Product) -> _Product:
    user = only_user(product.node)
    if not is_op(user, aten.add):
        return product
    assert user is not None
    other = user.args[1] if user.args[0] is product.node else user.args[0]
    bias = _expert_bias(other)
    scaled = number(user.kwargs.get("alpha", 1)) != 1
    if bias is None or product.expert_axis != 0 or product.bias is not None or scaled:
        return product
    return _Product(product.node, user, product.rows, product.weight, product.transposed, 0, bias)


def _expert_bias(node: Any) -> fx.Node | None:
    """[E, N] of ``bias[:, None, :]``."""
    base = peel(node, aten.unsqueeze, aten.expand, *RESHAPES)
    if isinstance(base, fx.Node) and base.op == "placeholder" and rank(base) == 2 and rank(node) == 3:
        return base if same(shape(node)[1], 1) and same(shape(node)[0], shape(base)[0]) else None
    return None


def _feeders(rows: Any, products: dict[fx.Node, _Product]) -> list[fx.Node]:
    if not isinstance(rows, fx.Node):
        return []

    def stop(n: fx.Node) -> bool:
        return n in products or n.op != "call_function" or is_op(n, aten.linear, aten.sum)

    return sorted({n for n in (rows, *sources(rows, stop)) if n in products})


def _read_site(down: _Product, ups: list[_Product]) -> _Dense:
    activation = read_activation(down.rows)
    by_out = {peel(up.out, *CASTS, *ALIASES, *UNIT_DIMS): up for up in ups}
    gate = by_out.get(peel(activation.gate, *CASTS, *ALIASES, *UNIT_DIMS))
    up = None if activation.up is None else by_out.get(peel(activation.up, *CASTS, *ALIASES, *UNIT_DIMS))
    if gate is None or (activation.up is not None and up is None):
        raise Miss("the activation's input is not a product with expert weights", activation.gate)
    ordered = [gate] if up is None else [gate, up]
    require(len(ordered) == len(ups), "not all products feed the activation", down.node)
    for product in (*ordered, down):
        require(product.transposed == down.transposed, "expert weights are stored in different layouts", product.node)
        require(product.expert_axis == down.expert_axis, "products order experts and tokens differently", product.node)
    x, on_input = _read_rows(gate)
    if up is not None:
        require(_read_rows(up) == (x, on_input), "gate and up multiply different rows", up.node)
    result, on_output = _read_combine(down)
    require(on_input is None or on_output is None, "routing weights are applied twice", result)
    routing = on_input or on_output
    if routing is None:
        raise Miss("the experts' results are not weighed by a table scattered from a top-k", down.node)
    if on_input is not None:
        biased = any(p.bias is not None for p in (*ordered, down))
        require(not biased, "with biases, experts of weight zero still add to the sum", down.node)
    return _Dense(ordered, down, activation, x, routing, "output" if on_input is None else "input", result)


def _read_rows(product: _Product) -> tuple[fx.Node, Routing | None]:
    """``(x [T, H], table on the input)`` of a gate or up product."""
    node: Any = product.rows
    routing = None
    spread = (aten.expand, aten.repeat, *UNIT_DIMS, *RESHAPES, *ALIASES)
    node = peel(node, *RESHAPES, *ALIASES)
    if is_op(node, aten.mul):
        for rows, factor in (node.args, reversed(node.args)):
            routing = _read_table(factor, product.expert_axis)
            if routing is not None:
                node = rows
                break
    x = node
    while is_op(x, *spread) and not (rank(x) == 2 and same(shape(x)[0], _tokens(product))):
        x = x.args[0]
    require(rank(x) != 2 or same(shape(x)[1], shape(product.rows)[-1]), "experts read different rows", product.node)
    require(
        rank(x) == 2 and same(shape(x)[0], _tokens(product)), "rows are not all tokens for every expert", product.node
    )
    return x, routing


def _tokens(product: _Product) -> Any:
    return shape(product.node)[1 - product.expert_axis]


def _read_table(node: Any, expert_axis: int) -> Routing | None:
    """Routing of a factor that broadcasts a [T, E] table over the last dimension, transposed when experts lead."""
    if not isinstance(node, fx.Node) or not same(shape(node)[-1], 1):
        return None
    node = peel(node, *UNIT_DIMS, *RESHAPES, *ALIASES, *CASTS)
    transposed = is_op(node, aten.t, aten.transpose, aten.permute) and rank(node) == 2
    if transposed != (expert_axis == 0):
        return None
    return read_dense_table(node.args[0] if transposed else node)


def _read_combine(down: _Product) -> tuple[fx.Node, Routing | None]:
    node, routing = down.out, None
    for _ in range(8):
        user = only_user(node)
        if user is None:
            raise Miss(f"the product has {len(node.users)} consumers before the sum over experts", node)
        if is_op(user, aten.mul) and routing is None:
            factor = user.args[1] if user.args[0] is node else user.args[0]
            routing = _read_table(factor, down.expert_axis)
            if routing is None:
                raise Miss("the product is multiplied by something other than a scattered routing table", user)
        elif is_op(user, aten.sum):
            dims = arg(user, 1)
            summed = [d % 3 for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
            over_experts = summed == [down.expert_axis] and rank(node) == 3 and not arg(user, 2)
            require(over_experts, "the sum is not over the experts", user)
            after = only_user(user)
            return (after if is_op(after, *CASTS) and dtype(after).is_floating_point else user), routing
        elif not is_op(user, *RESHAPES, *ALIASES, *CASTS):
            raise Miss(f"{describe(user)} stands between the down projection and the sum over experts", user)
        node = user
    raise Miss("no sum over the experts was found", node)


def _rewrite(ctx: MatchContext, site: _Dense) -> None:
    gate, up = site.ups[0], site.ups[1] if len(site.ups) == 2 else None
    anchor = site.down.node
    weights = apply_late_score(ctx, site.routing, anchor)
    ids = narrow_ids(ctx, site.routing[1], anchor)
    args = [site.x, weights, ids, gate.weight, site.down.weight, gate.bias, site.down.bias]
    if up is not None:
        args += [up.weight, up.bias]
    while args[-1] is None:
        args.pop()
    attributes = site.activation.attributes() | {"transposed": gate.transposed, "weight_on": site.weight_on}
    if dtype(site.result) != dtype(site.x):
        attributes["out_dtype"] = dtype(site.result)
    node = ctx.emit_op("experts", args, attributes, like=anchor)
    ctx.replace(site.result, node)
    ctx.matched("experts", anchor, node, form="dense", replaced=[site.result])
