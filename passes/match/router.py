"""Routers: score, (group-limited) top-k, renormalise and scale -> ``moe_fx.route``.

Unfused (DeepSeek-V3; every other family is a subset or another choice at some step)::

    scores = sigmoid(linear(x.float(), w.float()))          # or softmax, sqrt(softplus), ...
    choice = scores + bias                                   # optional
    choice = masked_fill(choice, ~top_groups(choice), -inf)  # optional
    ids    = topk(choice, k)[1]
    w      = gather(scores, 1, ids)                          # or topk's own values
    w      = w / (w.sum(-1, keepdim=True) + 1e-20)           # optional, also clamp(min)
    w      = (w * 2.5).to(dtype)                             # optional

Fused::

    w, ids = moe_fx.route(logits, bias, top_k=k, score="sigmoid", ...)

The match grows forward from the top-k as long as the ops are a router's; what does not fit stays behind the op as it
was, so cast points and scale order are the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, require
from moe_fx.passes.graph import (
    CASTS,
    RESHAPES,
    VIEWS,
    arg,
    aten,
    bind,
    dtype,
    getitems,
    is_last_dim,
    is_op,
    number,
    only_user,
    peel,
    rank,
    reaches,
    same,
    same_shape,
    shape,
)

# Elementwise score functions by op; softmax and sqrt(softplus) are read structurally.
_ELEMENTWISE_SCORES = {aten.sigmoid: "sigmoid", aten.softplus: "softplus", aten.tanh: "tanh"}
_FLOAT_MIN = {d: torch.finfo(d).min for d in (torch.float16, torch.bfloat16, torch.float32)}
# How far from a top-k its experts are looked for.
_REACH = 60
# A top-k over more than this is a sampler's over the vocabulary, unless it feeds experts.
_MAX_EXPERTS = 1024


@dataclass
class _Router:
    """What was read of one router, in the terms of ``route``'s schema."""

    logits: fx.Node
    scores: fx.Node
    choice: fx.Node
    bias: fx.Node | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


class RouterPass(Pass):
    """Routers (softmax, sigmoid, sqrt-softplus; biased, grouped, renormalised, scaled) to ``moe_fx.route``."""

    name = "router"
    level = Level.BITWISE

    def run(self, ctx: MatchContext) -> None:
        inner: set[fx.Node] = set()
        for topk in reversed(ctx.graph.find_nodes(op="call_function", target=aten.topk.default)):
            if topk in inner or not topk.users:
                continue
            if not _is_site(topk):
                continue
            inner |= _selections_behind(topk)
            try:
                _rewrite(ctx, topk, _match(topk))
            except Miss as miss:
                ctx.missed("router", topk, miss)
        ctx.finish_pass()


def _match(topk: fx.Node) -> _Router:
    bound = bind(topk)
    require(isinstance(bound["k"], int), "top-k's k is not a constant", topk)
    require(is_last_dim(bound["dim"], bound["self"]), "top-k is not over the last (expert) dimension", topk)
    require(bound["largest"] is True, "top-k selects the smallest (largest=False)", topk)
    router = _read_choice(bound["self"])
    router.attributes |= {"top_k": bound["k"], "sorted": bound["sorted"]}
    return router


def _read_choice(selected_on: fx.Node) -> _Router:
    groups: dict[str, Any] = {}
    node = selected_on
    limited = _read_group_limit(node)
    if limited is not None:
        node, groups = limited
    bias = None
    biased = _read_bias(node)
    if biased is not None:
        node, bias = biased
    logits, score, score_dtype = _read_score(node)
    order = "before"
    if score == "identity":
        order = "after"
        require(not groups, "groups are limited on raw logits", selected_on)
    require(dtype(selected_on) == score_dtype, f"scores are cast to {dtype(selected_on)} before the top-k", selected_on)
    attributes = {"score": score, "order": order, "score_dtype": score_dtype, **groups}
    return _Router(logits, node, selected_on, bias, attributes)


def _read_score(node: fx.Node) -> tuple[fx.Node, str, torch.dtype]:
    """(logits before any widening cast, score function, dtype it is computed in)."""
    scores = peel(node, *VIEWS)
    if is_op(scores, *CASTS) and _is_score(peel(scores, *VIEWS, *CASTS)):
        raise Miss(f"scores are cast to {dtype(scores)} before the top-k", scores)
    if is_op(scores, aten.softmax, aten._softmax):
        bound = bind(scores)
        require(is_last_dim(bound["dim"], bound["self"]), "softmax is not over the expert dimension", scores)
        logits, score = bound["self"], "softmax"
    elif is_op(scores, *_ELEMENTWISE_SCORES):
        packet = scores.target.overloadpacket
        logits, score = scores.args[0], _ELEMENTWISE_SCORES[packet]
        _require_plain_softplus(scores)
    elif is_op(scores, aten.sqrt) and is_op(scores.args[0], aten.softplus):
        logits, score = scores.args[0].args[0], "sqrtsoftplus"
        _require_plain_softplus(scores.args[0])
    else:
        require(
            _is_projection(peel(node, *VIEWS, *CASTS)),
            "the top-k's input is neither a known score (softmax, sigmoid, sqrt-softplus, softplus, tanh) of a"
            " projection nor a projection",
            scores if is_op(scores) or isinstance(scores, fx.Node) else node,
        )
        logits, score = node, "identity"
    score_dtype = dtype(node)
    while is_op(logits, *CASTS) and _widens(logits):
        logits = logits.args[0]
    require(same_shape(shape(logits), shape(node)), "scores are reshaped before the top-k", node)
    return logits, score, score_dtype


def _is_score(node: Any) -> bool:
    return is_op(node, aten.softmax, aten._softmax, aten.sqrt, *_ELEMENTWISE_SCORES)


def _require_plain_softplus(node: fx.Node) -> None:
    if is_op(node, aten.softplus):
        plain = number(arg(node, 1)) == 1 and number(arg(node, 2)) == 20
        require(plain, "softplus with its own beta or threshold", node)


def _widens(cast: fx.Node) -> bool:
    source = dtype(cast.args[0])
    return source.is_floating_point and torch.promote_types(source, dtype(cast)) == dtype(cast)


def _read_bias(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``scores + bias`` with a bias over experts."""
    if not is_op(node, aten.add) or number(node.kwargs.get("alpha", 1)) != 1:
        return None
    for scores, bias in (node.args, reversed(node.args)):
        if not (isinstance(scores, fx.Node) and isinstance(bias, fx.Node)):
            continue
        if rank(scores) != rank(node) or not same_shape(shape(scores), shape(node)):
            continue
        base = peel(bias, aten.unsqueeze, aten.expand, aten.view) if rank(bias) > 1 else bias
        if not same(shape(bias)[-1] if rank(bias) else 1, shape(node)[-1]):
            continue
        if rank(base) == 1 and same(shape(base)[0], shape(node)[-1]):
            require(dtype(scores) == dtype(node), "adding the bias changes the scores' dtype", node)
            return scores, base
    return None


def _read_group_limit(node: fx.Node) -> tuple[fx.Node, dict[str, Any]] | None:
    """``(choice before the limit, attributes)`` of a group-limited selection."""
    if is_op(node, aten.masked_fill):
        choice, mask, fill, keeps = node.args[0], node.args[1], number(node.args[2]), False
    elif is_op(node, aten.where):
        mask, choice, fill, keeps = node.args[0], node.args[1], number(arg(node, 2)), True
    elif is_op(node, aten.mul) and all(isinstance(a, fx.Node) for a in node.args):
        choice, mask, fill, keeps = node.args[0], node.args[1], 0.0, True
        if _mask_source(choice) is not None:
            choice, mask = mask, choice
    else:
        return None
    while is_op(mask, aten.bitwise_not, aten.logical_not):
        mask, keeps = mask.args[0], not keeps
    if is_op(mask, aten.eq) and number(arg(mask, 1)) == 0:
        mask, keeps = mask.args[0], not keeps
    scatter = _mask_source(mask)
    if scatter is None:
        return None
    require(keeps, "the group mask drops the best groups instead of the others", node)
    fills = {float("-inf"): "-inf", _FLOAT_MIN.get(dtype(choice)): "-inf", 0.0: "zero"}
    require(fill in fills, f"experts outside the best groups are filled with {fill}, not -inf or 0", node)
    bound = bind(scatter)
    require(is_last_dim(bound["dim"], scatter), "the group mask is scattered over another dimension", scatter)
    require(number(bound.get("value", bound.get("src"))) == 1, "the group mask is not made of ones", scatter)
    index = bound["index"]
    topk = index.args[0] if isinstance(index, fx.Node) and index.args else None
    require(is_op(topk, aten.topk) and index.args[1] == 1, "the group mask does not come from a top-k", scatter)
    picked = bind(topk)
    require(is_last_dim(picked["dim"], picked["self"]), "groups are not selected over the group dimension", topk)
    require(picked["largest"] is True, "the worst groups are selected (largest=False)", topk)
    n_group, topk_group = shape(picked["self"])[-1], picked["k"]
    group_score, grouped = _read_group_score(picked["self"])
    base = peel(grouped, *RESHAPES)
    require(base is choice, "groups are scored on another tensor than the one they limit", grouped)
    require(same(shape(grouped)[-2], n_group), "groups are not consecutive experts", grouped)
    _require_unfolded_mask(mask, scatter, grouped)
    attributes: dict[str, Any] = {}
    if not same(topk_group, n_group):
        require(isinstance(n_group, int), "the number of groups is not a constant", topk)
        attributes = {
            "n_group": n_group,
            "topk_group": topk_group,
            "group_score": group_score,
            "group_fill": fills[fill],
        }
    return choice, attributes


def _mask_source(mask: Any) -> fx.Node | None:
    """The scatter of ones that a per-expert mask was expanded from."""
    node = peel(mask, *VIEWS, *CASTS, aten.expand, aten.repeat_interleave)
    return node if is_op(node, aten.scatter) else None


def _require_unfolded_mask(mask: fx.Node, scatter: fx.Node, grouped: fx.Node) -> None:
    """The [.., G] mask must repeat along a new last dimension, as the groups lie in the scores."""
    node = peel(mask, *CASTS)
    if is_op(node, aten.repeat_interleave):
        require(is_last_dim(arg(node, 2), node), "the group mask repeats over another dimension", node)
        return
    while node is not scatter:
        if is_op(node, aten.unsqueeze):
            last = node.args[1] in (-1, rank(node) - 1)
            require(last, "the group mask is expanded over another dimension", node)
        node = node.args[0]


def _read_group_score(node: fx.Node) -> tuple[str, fx.Node]:
    """(how groups are scored, the [..., G, E/G] view they are scored on)."""
    if is_op(node, aten.sum) and is_last_dim(arg(node, 1), node.args[0]):
        top = node.args[0]
        topk = top.args[0] if top.args and top.op == "call_function" else None
        require(is_op(topk, aten.topk), "group scores are sums, but not of a top-k", node)
        picked = bind(topk)
        good = picked["k"] == 2 and picked["largest"] and is_last_dim(picked["dim"], picked["self"])
        require(bool(good), "group scores are not the sum of the two largest", topk)
        return "top2sum", picked["self"]
    if node.args and is_op(node.args[0], aten.max) and node.args[1] == 0:
        reduced = bind(node.args[0])
        require(is_last_dim(reduced.get("dim"), reduced["self"]), "group maximum over another dimension", node)
        return "max", reduced["self"]
    if is_op(node, aten.amax):
        require(is_last_dim(arg(node, 1), node.args[0]), "group maximum over another dimension", node)
        return "max", node.args[0]
    raise Miss("groups are scored neither by their maximum nor by the sum of their two largest", node)


def _rewrite(ctx: MatchContext, topk: fx.Node, router: _Router) -> None:
    picked = getitems(topk)
    values, ids = picked.get(0), picked.get(1)
    weights = _read_weights(router, values, ids)
    attributes = router.attributes
    args = (router.logits,) if router.bias is None else (router.logits, router.bias)
    node = ctx.emit_op("route", args, attributes, like=topk)
    if weights is not None:
        ctx.replace(weights, ctx.output_of(node, 0))
    if ids is not None and ids.users:
        new_ids = ctx.output_of(node, 1)
        wide = ctx.emit(aten._to_copy.default, (new_ids,), {"dtype": dtype(ids)}, like=topk)
        ctx.replace(ids, wide)
    form = attributes["score"]
    if attributes["order"] == "after":
        form = f"topk -> {form}"
    if attributes.get("n_group", 1) > 1:
        form += ", grouped"
    if router.bias is not None:
        form += ", biased"
    ctx.matched("router", topk, node, form=form, replaced=[weights, ids])


def _read_weights(router: _Router, values: fx.Node | None, ids: fx.Node | None) -> fx.Node | None:
    """Follow the weights forward from the selection, filling in ``router.attributes``; returns the last node."""
    attributes = router.attributes
    gathers = [] if ids is None else [u for u in ids.users if _gathers(u, ids)]
    own = [g for g in gathers if g.args[0] in (router.scores, router.choice)]
    used_values = values is not None and bool(values.users)
    if used_values and own:
        raise Miss("both the top-k's values and gathered scores are used as weights", values)
    if used_values:
        assert values is not None
        node, grouped = values, attributes.get("n_group", 1) > 1
        if router.bias is not None or grouped:
            attributes["weight_source"] = "choice"
    elif own:
        node = own[0]
        require(len(own) == 1, "scores are gathered more than once", node)
        if node.args[0] is router.choice and router.choice is not router.scores:
            attributes["weight_source"] = "choice"
    else:
        return None
    if attributes["order"] == "after":
        node = _read_late_score(node, attributes, biased=router.bias is not None)
    node = _read_renormalisation(node, attributes)
    node = _read_scale(node, attributes)
    return _read_out_cast(node, attributes)


def _gathers(user: fx.Node, ids: fx.Node) -> bool:
    return is_op(user, aten.gather) and arg(user, 2) is ids and is_last_dim(arg(user, 1), user)


def _read_late_score(node: fx.Node, attributes: dict[str, Any], biased: bool) -> fx.Node:
    """The score that a ``topk -> score`` router applies to the selected logits.

    A widening cast may move before an unbiased selection, which keeps its order; a bias would be added in another
    dtype.
    """
    user, start = only_user(node), node
    if is_op(user, *CASTS) and _widens(user) and not biased:
        node, user = user, only_user(user)
    score = None
    if is_op(user, aten.softmax, aten._softmax) and is_last_dim(arg(user, 1), user):
        score = "softmax"
    elif is_op(user, aten.sigmoid):
        score = "sigmoid"
    if score is None or user is None:
        attributes["score"] = "identity"
        return start
    # Selecting in a wider dtype gives the same order, so the cast may stand before the top-k.
    attributes |= {"score": score, "score_dtype": dtype(user)}
    return user


def _read_renormalisation(node: fx.Node, attributes: dict[str, Any]) -> fx.Node:
    """``w / (sum(w) [+ eps])`` or ``w / sum(w).clamp(min)``."""
    if len(node.users) != 2:
        return node
    total = next((u for u in node.users if is_op(u, aten.sum)), None)
    quotient = next((u for u in node.users if is_op(u, aten.div) and u.args[0] is node), None)
    if total is None or quotient is None or len(quotient.args) != 2 or quotient.kwargs:
        return node
    bound = bind(total)
    if not is_last_dim(bound["dim"], node) or not bound["keepdim"] or bound["dtype"] is not None:
        return node
    kind, eps, divisor = "eps", 0.0, total
    nxt = only_user(total)
    if is_op(nxt, aten.add) and number(arg(nxt, 1)) is not None:
        divisor, eps = nxt, number(arg(nxt, 1))
    elif is_op(nxt, aten.clamp, aten.clamp_min) and number(arg(nxt, 1)) is not None:
        if is_op(nxt, aten.clamp) and arg(nxt, 2) is not None:
            return node
        kind, divisor, eps = "clamp", nxt, number(arg(nxt, 1))
    if quotient.args[1] is not divisor or only_user(divisor) is not quotient:
        return node
    attributes |= {"renormalize": kind, "eps": eps}
    return quotient


def _read_scale(node: fx.Node, attributes: dict[str, Any]) -> fx.Node:
    user = only_user(node)
    if is_op(user, aten.mul):
        assert user is not None
        factor = number(user.args[1] if user.args[0] is node else user.args[0])
        if factor is not None and dtype(user) == dtype(node):
            attributes["scale"] = factor
            return user
    return node


def _read_out_cast(node: fx.Node, attributes: dict[str, Any]) -> fx.Node:
    user = only_user(node)
    if is_op(user, *CASTS) and dtype(user).is_floating_point and user.kwargs.get("device") is None:
        attributes["out_dtype"] = dtype(user)
        return user
    return node


def _is_projection(node: Any) -> bool:
    """Whether the logits come out of a matrix product, maybe scaled, soft-capped or biased on the way."""
    for _ in range(12):
        node = peel(node, *VIEWS, *CASTS)
        if is_op(node, aten.linear, aten.mm, aten.addmm, aten.matmul, aten.bmm, aten.einsum):
            return True
        if not is_op(node, aten.add, aten.mul, aten.div, aten.tanh, aten.clamp, aten.sub):
            return False
        node = node.args[0]
    return False


def _is_site(topk: fx.Node) -> bool:
    """A top-k is a router's if it selects among a few projected scores, or if what it selects reaches experts."""
    n_experts = shape(topk.args[0])[-1]
    if not isinstance(n_experts, int) or n_experts > _MAX_EXPERTS:
        return _feeds_experts(topk)
    source = peel(topk.args[0], *VIEWS, *CASTS)
    while is_op(source, aten.add, aten.masked_fill, aten.softmax, aten.sigmoid, aten.sqrt, aten.softplus):
        source = peel(source.args[0], *VIEWS, *CASTS)
    return _is_projection(source) or _feeds_experts(topk)


def _feeds_experts(topk: fx.Node) -> bool:
    def goal(node: fx.Node) -> bool:
        if is_op(node, aten._grouped_mm) or "grouped_mm" in str(node.target):
            return True
        gathers_weights = is_op(node, aten.index, aten.index_select) and rank(node.args[0]) == 3
        return gathers_weights and node.args[0].op == "placeholder"

    return reaches(topk, goal, lambda n: n.op == "call_function" and not is_op(n, aten.linear), _REACH)


def _selections_behind(topk: fx.Node) -> set[fx.Node]:
    """Other top-ks that lead to this one: parts of the same router."""
    seen, queue, found = {topk}, [topk], set()
    while queue:
        for parent in queue.pop().all_input_nodes:
            if parent in seen or is_op(parent, aten.linear, aten.mm, aten.addmm):
                continue
            seen.add(parent)
            queue.append(parent)
            if is_op(parent, aten.topk):
                found.add(parent)
    return found
