"""Reading expert matmuls: products of routed rows with per-expert weights, in each of their spellings.

* grouped: ``_grouped_mm(rows, w, offsets)`` and ``transformers.grouped_mm_fallback``
* batched: ``bmm(w[ids], rows.unsqueeze(-1)).squeeze(-1)`` and its mirror, also as ``matmul`` and with a slot dimension
* einsum: ``einsum("ti,taoi->tao", x, w[ids])`` and relatives
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moe_fx.passes.core import Miss, require
from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    UNIT_DIMS,
    arg,
    aten,
    dtype,
    is_op,
    number,
    only_user,
    peel,
    rank,
    same_shape,
    shape,
)
from moe_fx.passes.match.pairs import TOKEN_MAJOR, PairSpace


@dataclass(frozen=True)
class ExpertMatmul:
    """One product of routed rows with per-expert weights.

    Attributes:
        node: the matmul itself.
        out: its result as [T * k, N] or [T, k, N] rows, bias included.
        rows: the left operand in the same row order.
        weight: the 3-D weight as stored.
        transposed: weight is stored [E, in, out] instead of [E, out, in].
        ids: the [T, k] expert ids that steer it.
        bias: [E, out] or None.
        form: ``grouped_mm``, ``batched_mm`` or ``einsum``.
        clamped: ids that are no expert's were clamped into range to gather the weight.
    """

    node: fx.Node
    out: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    ids: fx.Node
    form: str
    bias: fx.Node | None = None
    clamped: bool = False


def is_expert_matmul(node: fx.Node) -> bool:
    """Whether the node looks like an expert matmul at all: a candidate that must be matched or explained."""
    if _is_grouped(node):
        return True
    if is_op(node, aten.bmm, aten.matmul, aten.einsum):
        return any(_gathered_weight(operand) is not None for operand in _operands(node))
    return False


def read_expert_matmul(node: fx.Node, space: PairSpace) -> ExpertMatmul:
    """Read a candidate; :class:`Miss` names the predicate that failed."""
    if _is_grouped(node):
        read = _read_grouped(node, space)
    elif is_op(node, aten.einsum):
        read = _read_einsum(node, space)
    else:
        read = _read_batched(node, space)
    return _with_bias(read, space)


def _is_grouped(node: fx.Node) -> bool:
    # The fallback op is transformers' own; it is named here so that transformers need not be imported.
    return is_op(node, aten._grouped_mm) or str(node.target) == "transformers.grouped_mm_fallback.default"


def _operands(node: fx.Node) -> list[fx.Node]:
    if is_op(node, aten.einsum):
        return list(node.args[1])
    return [a for a in node.args[:2] if isinstance(a, fx.Node)]


def _read_grouped(node: fx.Node, space: PairSpace) -> ExpertMatmul:
    rows, weight, offsets = node.args[0], node.args[1], arg(node, 2)
    require(rank(weight) == 3, "the grouped matmul's weight is not 3-D", node)
    require(len(node.args) < 4 or node.args[3] is None, "the grouped matmul adds its own bias", node)
    counts = space.counts(offsets)
    if counts is None:
        raise Miss("the grouped matmul's offsets are not the cumulated histogram of expert ids", offsets)
    require(counts.offsets, "the grouped matmul's offsets are counts that were not cumulated", offsets)
    stored, transposed = _stored(weight)
    return ExpertMatmul(node, node, rows, stored, transposed, counts.ids, "grouped_mm")


def _stored(weight: Any) -> tuple[fx.Node, bool]:
    """A right operand [E, in, out] as ``(stored weight, stored as [E, in, out])``."""
    transposed = True
    while is_op(weight, aten.transpose, aten.permute, aten.mT, *ALIASES):
        if not is_op(weight, *ALIASES):
            require(_swaps_last_two(weight), "an expert weight is permuted other than by its last two dims", weight)
            transposed = not transposed
        weight = weight.args[0]
    return weight, transposed


def _swaps_last_two(node: fx.Node) -> bool:
    n = rank(node)
    if is_op(node, aten.transpose):
        return {node.args[1] % n, node.args[2] % n} == {n - 1, n - 2}
    if is_op(node, aten.permute):
        order = [d % n for d in node.args[1]]
        return order == [*range(n - 2), n - 1, n - 2]
    return True


def _gathered_weight(operand: Any) -> tuple[fx.Node, Any, bool] | None:
    """``(weight [E, ., .], ids index, swapped)`` when operand is ``w[ids]``, maybe with its last two dims swapped."""
    swapped = False
    while is_op(operand, aten.transpose, aten.permute, aten.mT, *ALIASES, *CASTS):
        if is_op(operand, aten.transpose, aten.permute, aten.mT):
            if not _swaps_last_two(operand):
                return None
            swapped = not swapped
        operand = operand.args[0]
    if is_op(operand, aten.index):
        indices = operand.args[1]
        if len(indices) != 1 or indices[0] is None:
            return None
        index = indices[0]
    elif is_op(operand, aten.index_select) and arg(operand, 1) == 0:
        index = arg(operand, 2)
    else:
        return None
    weight = operand.args[0]
    base = peel(weight, *ALIASES, *CASTS, aten.transpose, aten.permute, aten.slice)
    if rank(weight) != 3 or base.op not in ("placeholder", "get_attr"):
        return None
    return weight, index, swapped


def _ids_of(index: fx.Node, space: PairSpace) -> fx.Node:
    if rank(index) == 2:
        return peel(index, *CASTS, *ALIASES)
    pairs = space.pairs(index)
    if pairs is None:
        raise Miss("expert weights are gathered by an index that is not the router's ids", index)
    require(pairs.order == TOKEN_MAJOR, "expert weights are gathered in another order than token-major", index)
    return pairs.root


def _read_batched(node: fx.Node, space: PairSpace) -> ExpertMatmul:
    left, right = node.args[0], node.args[1]
    gathered = _gathered_weight(left)
    weight_left = gathered is not None
    if gathered is None:
        gathered = _gathered_weight(right)
    assert gathered is not None
    rows = right if weight_left else left
    weight, index, swapped = gathered
    require(dtype(node) == dtype(weight), "expert weights are cast after they were gathered", node)
    unit = rank(node) - 1 if weight_left else rank(node) - 2
    unsqueezed = peel(rows, *ALIASES)
    is_vector = is_op(unsqueezed, aten.unsqueeze, aten.view, aten.reshape) and shape(unsqueezed)[unit] == 1
    require(is_vector, "an expert matmul multiplies more than one row per pair", node)
    vector = unsqueezed.args[0]
    squeezed = only_user(node)
    require(
        is_op(squeezed, aten.squeeze, aten.view, aten.reshape) and rank(squeezed) == rank(node) - 1,
        "the expert matmul's unit dimension is not squeezed",
        node,
    )
    # weight on the left multiplies [.., out, in] by a column; on the right a row by [.., in, out]
    stored_in_out = (not weight_left) != swapped
    stored, transposed = _stored(weight)
    return ExpertMatmul(
        node,
        squeezed,
        vector,
        stored,
        stored_in_out if transposed else not stored_in_out,
        _ids_of(index, space),
        "batched_mm",
        clamped=(pairs := space.pairs(index)) is not None and pairs.sentinels == "clamped",
    )


def _read_einsum(node: fx.Node, space: PairSpace) -> ExpertMatmul:
    equation = str(node.args[0]).replace(" ", "")
    operands = _operands(node)
    require(len(operands) == 2, "an einsum of more than two operands", node)
    inputs, _, result = equation.partition("->")
    terms = inputs.split(",")
    if _gathered_weight(operands[0]) is not None:
        operands, terms = operands[::-1], terms[::-1]
    rows, weight_operand = operands
    gathered = _gathered_weight(weight_operand)
    if gathered is None:
        raise Miss("no operand of the einsum is a gathered expert weight", node)
    weight, index, swapped = gathered
    require(dtype(node) == dtype(weight), "expert weights are cast after they were gathered", node)
    require(rank(index) == 2 and len(terms[1]) == 4, f"einsum {equation!r} does not gather by [T, k] ids", node)
    token, slot, a, b = list(terms[1])
    contracted = terms[0][-1]
    require(
        terms[0] in (token + contracted, token + slot + contracted), f"einsum {equation!r} is no expert matmul", node
    )
    require(contracted in (a, b), f"einsum {equation!r} contracts no weight dimension", node)
    free = b if contracted == a else a
    require(result == token + slot + free, f"einsum {equation!r} does not give [T, k, out]", node)
    stored, _ = _stored(weight)
    require(stored is weight, "an einsum over a transposed expert weight", node)
    transposed = (contracted == a) != swapped
    return ExpertMatmul(node, node, rows, stored, transposed, _ids_of(index, space), "einsum")


def _with_bias(read: ExpertMatmul, space: PairSpace) -> ExpertMatmul:
    """Take in ``out + bias[ids]`` when that is all that is done with the product."""
    out = read.out
    user = only_user(out)
    while user is not None and is_op(user, *UNIT_DIMS, *ALIASES) and same_shape(shape(user), shape(out)):
        out, user = user, only_user(user)
    if not is_op(user, aten.add) or number(user.kwargs.get("alpha", 1)) != 1:
        return read
    assert user is not None
    other = user.args[1] if user.args[0] is out else user.args[0]
    gathered = peel(other, *ALIASES)
    if not is_op(gathered, aten.index, aten.index_select) or rank(gathered.args[0]) != 2:
        return read
    index = gathered.args[1][0] if is_op(gathered, aten.index) else arg(gathered, 2)
    pairs = space.pairs(index)
    ids = pairs.root if pairs is not None else peel(index, *CASTS, *ALIASES)
    require(ids is read.ids, "an expert bias is gathered by other ids than its weight", gathered)
    if pairs is not None and read.form != "grouped_mm":
        require(pairs.order == TOKEN_MAJOR, "an expert bias is gathered in another order than its weight", gathered)
    elif pairs is not None:
        rows = space.rows(read.rows)
        require(rows is None or rows.order == pairs.order, "an expert bias is in another order than the rows", gathered)
    return replace(read, out=user, bias=gathered.args[0])
