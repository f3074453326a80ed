"""Reading (token, slot) pair spaces: which rows of a tensor belong to which routed pair.

However a model spells expert dispatch, its tensors live over the T * k pairs (token t, slot j), in token-major order or
permuted by a sort of the expert ids. This module derives, for a node, one of the facts below; forms of experts are then
a matter of which facts meet at a matmul. Facts are derived on demand and memoised per graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_fx.passes.graph import (
    ALIASES,
    CASTS,
    RESHAPES,
    UNIT_DIMS,
    arg,
    aten,
    bind,
    dtype,
    is_op,
    number,
    numel_is,
    peel,
    rank,
    same,
    same_shape,
    shape,
    value,
)


@dataclass(frozen=True)
class Order:
    """Row order over pairs: token-major (``perm is None``) or the permutation computed by node ``perm``.

    ``ids`` is the [T, k] tensor of expert ids that ``perm`` sorts.
    """

    perm: fx.Node | None = None
    ids: fx.Node | None = None


TOKEN_MAJOR = Order()


@dataclass(frozen=True)
class Pairs:
    """One value per pair: ``root`` [T, k] read in ``order``; ``cast`` is a dtype applied on the way.

    ``sentinels`` says what became of ids that are no expert's: ids ``clamped`` into range, weights ``zeroed``.
    """

    root: fx.Node
    order: Order
    cast: torch.dtype | None = None
    sentinels: str = ""


@dataclass(frozen=True)
class Permutation:
    """Row -> pair (``order.perm``), or pair -> row when ``inverse``."""

    order: Order
    inverse: bool = False


@dataclass(frozen=True)
class Tokens:
    """The token of each pair, for ``top_k`` slots a token."""

    order: Order
    top_k: Any


@dataclass(frozen=True)
class Rows:
    """The rows of ``x`` [T, ...] repeated per pair, in ``order``; ``cast`` is a dtype applied on the way."""

    x: fx.Node
    order: Order
    top_k: Any
    cast: torch.dtype | None = None


@dataclass(frozen=True)
class Counts:
    """Tokens per expert of ``ids`` [T, k]; cumulated when ``offsets``."""

    ids: fx.Node
    offsets: bool = False


@dataclass(frozen=True)
class OutOfRange:
    """True for pairs whose id is not an expert of this rank (expert-parallel sentinels)."""

    ids: fx.Node
    order: Order


Fact = Pairs | Permutation | Tokens | Rows | Counts | OutOfRange


class PairSpace:
    """Facts about the nodes of one graph.

    Args:
        expert_counts: first sizes of the graph's expert weights; a sentinel is an id of one of these sizes or more.
    """

    def __init__(self, expert_counts: Collection[int]) -> None:
        self._expert_counts = frozenset(expert_counts)
        self._facts: dict[tuple[fx.Node, str], Fact | None] = {}

    def pairs(self, node: Any) -> Pairs | None:
        """``node`` as one value per pair."""
        return self._derive(node, "pairs", self._read_pairs)

    def permutation(self, node: Any) -> Permutation | None:
        """``node`` as the permutation that a sort of expert ids gives, or its inverse."""
        return self._derive(node, "permutation", self._read_permutation)

    def tokens(self, node: Any) -> Tokens | None:
        """``node`` as the token index of each pair."""
        return self._derive(node, "tokens", self._read_tokens)

    def rows(self, node: Any) -> Rows | None:
        """``node`` as activations repeated per pair."""
        return self._derive(node, "rows", self._read_rows)

    def counts(self, node: Any) -> Counts | None:
        """``node`` as a histogram of expert ids, or its cumulative sum."""
        return self._derive(node, "counts", self._read_counts)

    def out_of_range(self, node: Any) -> OutOfRange | None:
        """``node`` as the mask of sentinel pairs."""
        return self._derive(node, "out_of_range", self._read_out_of_range)

    def _derive(self, node: Any, kind: str, read: Callable[[fx.Node], Any]) -> Any:
        if not isinstance(node, fx.Node) or not isinstance(value(node), torch.Tensor):
            return None
        key = (node, kind)
        if key not in self._facts:
            self._facts[key] = None  # A cycle cannot be a fact.
            self._facts[key] = read(node)
        return self._facts[key]

    # -- pairs ---------------------------------------------------------------------------------------------------------

    def _read_pairs(self, node: fx.Node) -> Pairs | None:
        if is_op(node, *CASTS):
            inner = self.pairs(node.args[0])
            if inner is None:
                return None
            if not dtype(inner.root).is_floating_point:
                # The width of an index is no change of value, as long as every expert fits.
                wide = dtype(node) in (torch.int32, torch.int64, torch.float32, torch.float64)
                return inner if wide else None
            return replace(inner, cast=dtype(node))
        if is_op(node, *RESHAPES, aten.unsqueeze, aten.squeeze, *ALIASES):
            source = node.args[0]
            if rank(source) == 2 and rank(node) in (1, 2) and numel_is(node, value(source).numel()):
                flat = rank(node) == 1 or same(shape(node)[1], 1)
                if flat and not same(shape(source)[1], 1):
                    return Pairs(source, TOKEN_MAJOR)
            inner = self.pairs(source)
            if inner is not None and _keeps_rows(source, node):
                return inner
            return None
        if is_op(node, aten.index, aten.index_select, aten.gather) and rank(node) <= 2:
            base, index = _single_index(node)
            permutation = self.permutation(index)
            pairs = self.pairs(base)
            if permutation is None or pairs is None:
                return None
            if not permutation.inverse and pairs.order == TOKEN_MAJOR:
                return replace(pairs, order=permutation.order)
            if permutation.inverse and pairs.order == permutation.order:
                return replace(pairs, order=TOKEN_MAJOR)
            return None
        sorted_from = _result_of(node, 0, aten.sort)
        if sorted_from is not None and _ascending(sorted_from):
            order = self._sort_order(sorted_from)
            return None if order is None or order.ids is None else Pairs(order.ids, order)
        if is_op(node, aten.masked_fill):
            inner = self.pairs(node.args[0])
            if inner is None or not self.fills_sentinels(node, inner.order):
                return None
            return replace(inner, sentinels="zeroed")
        if is_op(node, aten.clamp, aten.clamp_max):
            inner = self.pairs(node.args[0])
            if inner is None or dtype(inner.root).is_floating_point:
                return None
            low, high = (arg(node, 1), arg(node, 2)) if is_op(node, aten.clamp) else (None, arg(node, 1))
            keeps = (low is None or number(low) in (0, -1)) and number(high) is not None
            return replace(inner, sentinels="clamped") if keeps and number(high) + 1 in self._expert_counts else None
        return None

    def fills_sentinels(self, node: Any, order: Order) -> bool:
        """Whether ``node`` zeroes exactly the sentinel rows of a tensor in ``order``."""
        if not is_op(node, aten.masked_fill) or number(node.args[2]) != 0:
            return False
        mask = self.out_of_range(node.args[1])
        return mask is not None and mask.order == order

    # -- permutations --------------------------------------------------------------------------------------------------

    def _read_permutation(self, node: fx.Node) -> Permutation | None:
        node = peel(node, *CASTS, *ALIASES)
        sort = node if is_op(node, aten.argsort) else _result_of(node, 1, aten.sort)
        if sort is not None and _ascending(sort):
            inner = self.permutation(sort.args[0])
            if inner is not None and not inner.inverse:
                return Permutation(inner.order, inverse=True)
            order = self._sort_order(sort)
            return None if order is None else Permutation(order)
        # inverse written as inv[perm] = arange
        if is_op(node, aten.index_put):
            index, filled = node.args[1], node.args[2]
            key = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else None
        elif is_op(node, aten.scatter):
            key, filled = arg(node, 2), arg(node, 3)
        else:
            return None
        permutation = self.permutation(key)
        counts_up = _counts_from_zero(filled) and not (is_op(node, aten.index_put) and arg(node, 3))
        if permutation is not None and not permutation.inverse and counts_up and numel_is(node, value(key).numel()):
            return Permutation(permutation.order, inverse=True)
        return None

    def _sort_order(self, sort: fx.Node) -> Order | None:
        keys = self.pairs(sort.args[0])
        if keys is None or keys.order != TOKEN_MAJOR or dtype(keys.root).is_floating_point:
            return None
        return Order(sort, keys.root)

    # -- tokens and rows -----------------------------------------------------------------------------------------------

    def _read_tokens(self, node: fx.Node) -> Tokens | None:
        node = peel(node, *CASTS, *ALIASES)
        if is_op(node, aten.floor_divide, aten.div):
            floors = is_op(node, aten.floor_divide) or node.kwargs.get("rounding_mode") in ("floor", "trunc")
            divisor = arg(node, 1)
            if not floors:
                return None
            permutation = self.permutation(node.args[0])
            if permutation is not None and not permutation.inverse:
                assert permutation.order.ids is not None
                if same(divisor, shape(permutation.order.ids)[1]):
                    return Tokens(permutation.order, divisor)
            if _counts_from_zero(node.args[0]):
                return Tokens(TOKEN_MAJOR, divisor)
            return None
        repeated = self._repeated(node)
        if repeated is not None and _counts_from_zero(repeated[0]):
            return Tokens(TOKEN_MAJOR, repeated[1])
        if is_op(node, aten.index, aten.index_select):
            base, index = _single_index(node)
            tokens, permutation = self.tokens(base), self.permutation(index)
            if tokens is not None and permutation is not None and not permutation.inverse:
                return Tokens(permutation.order, tokens.top_k) if tokens.order == TOKEN_MAJOR else None
        return None

    def _read_rows(self, node: fx.Node) -> Rows | None:
        if is_op(node, *ALIASES):
            return self.rows(node.args[0])
        if is_op(node, *CASTS):
            inner = self.rows(node.args[0])
            return None if inner is None else replace(inner, cast=dtype(node))
        if is_op(node, aten.masked_fill):
            inner = self.rows(node.args[0])
            return inner if inner is not None and self.fills_sentinels(node, inner.order) else None
        repeated = self._repeated(node)
        if repeated is not None:
            return Rows(repeated[0], TOKEN_MAJOR, repeated[1])
        if is_op(node, aten.index, aten.index_select, aten.gather):
            base, index = _single_index(node)
            if is_op(index, aten.expand):
                index = peel(index, aten.expand, *UNIT_DIMS, *RESHAPES)
            tokens = self.tokens(index)
            if tokens is not None and isinstance(base, fx.Node):
                return Rows(base, tokens.order, tokens.top_k)
            rows, permutation = self.rows(base), self.permutation(index)
            if rows is not None and permutation is not None and not permutation.inverse:
                return replace(rows, order=permutation.order) if rows.order == TOKEN_MAJOR else None
        return None

    def _repeated(self, node: fx.Node) -> tuple[fx.Node, Any] | None:
        """``(x, k)`` when node repeats every row of x [T, ...] k times in place: [T * k, ...]."""
        if is_op(node, aten.repeat_interleave) and node.target is aten.repeat_interleave.self_int:
            source, repeats, dim = node.args[0], arg(node, 1), arg(node, 2)
            if dim in (0, None if rank(source) == 1 else 0) or dim == -rank(source):
                return source, repeats
            return None
        if is_op(node, *RESHAPES):
            spread = peel(node.args[0], *ALIASES)
            if is_op(spread, aten.expand, aten.repeat) and rank(spread) == rank(node) + 1:
                unsqueezed = spread.args[0]
                if not is_op(unsqueezed, aten.unsqueeze) and not is_op(unsqueezed, *RESHAPES):
                    return None
                source = unsqueezed.args[0]
                ones = rank(unsqueezed) == rank(source) + 1 and same(shape(unsqueezed)[1], 1)
                rest = same_shape(shape(spread)[2:], shape(source)[1:]) and same(shape(spread)[0], shape(source)[0])
                if ones and rest and rank(node) == rank(source):
                    return source, shape(spread)[1]
        return None

    # -- counts --------------------------------------------------------------------------------------------------------

    def _read_counts(self, node: fx.Node) -> Counts | None:
        node = peel(node, *CASTS, *ALIASES)
        if is_op(node, aten.cumsum):
            counts = self.counts(node.args[0])
            return Counts(counts.ids, offsets=True) if counts is not None and not counts.offsets else None
        if is_op(node, aten.histc):
            bound = bind(node)
            full_range = number(bound["min"]) == 0 and number(bound["max"]) == number(bound["bins"] - 1)
            return self._counts_of(bound["self"]) if full_range else None
        if is_op(node, aten.bincount):
            return self._counts_of(node.args[0]) if arg(node, 1) is None else None
        if is_op(node, aten.sum):
            hot = peel(node.args[0], *CASTS, *RESHAPES)
            if is_op(hot, aten.one_hot):
                ids = peel(hot.args[0], *CASTS)
                if rank(node) != 1 or not same(shape(node)[0], shape(hot)[-1]):
                    return None
                dims = arg(node, 1)
                over_pairs = isinstance(dims, (list, tuple)) and sorted(d % rank(hot) for d in dims) == list(
                    range(rank(node.args[0]) - 1)
                )
                if not over_pairs or rank(node.args[0]) != rank(hot):
                    return None
                return Counts(ids) if rank(ids) == 2 else self._counts_of(ids)
        if is_op(node, aten.scatter_add):
            into, ones = peel(node.args[0], *CASTS), peel(arg(node, 3), *CASTS)
            zeros = is_op(into, aten.zeros, aten.zeros_like, aten.new_zeros) or number(into) == 0
            counts_ones = is_op(ones, aten.ones, aten.ones_like, aten.new_ones) or number(ones) == 1
            return self._counts_of(arg(node, 2)) if zeros and counts_ones else None
        if is_op(node, aten.searchsorted):
            ids = self.pairs(node.args[0])
            right = node.kwargs.get("right") is True or node.kwargs.get("side") == "right"
            if ids is not None and ids.order.ids is ids.root and right and _counts_from_zero(node.args[1]):
                return Counts(ids.root, offsets=True)
        return None

    def _counts_of(self, node: Any) -> Counts | None:
        ids = self.pairs(node)
        return None if ids is None else Counts(ids.root)

    def _read_out_of_range(self, node: fx.Node) -> OutOfRange | None:
        node = peel(node, *RESHAPES, *UNIT_DIMS, *ALIASES, aten.expand)
        if is_op(node, aten.index, aten.index_select):
            base, index = _single_index(node)
            mask, permutation = self.out_of_range(base), self.permutation(index)
            if mask is None or permutation is None or permutation.inverse or mask.order != TOKEN_MAJOR:
                return None
            return replace(mask, order=permutation.order)
        if is_op(node, aten.ge):
            pairs = self.pairs(node.args[0])
            if pairs is not None and not dtype(pairs.root).is_floating_point and not pairs.sentinels:
                threshold = number(arg(node, 1))
                return OutOfRange(pairs.root, pairs.order) if threshold in self._expert_counts else None
        return None


def _result_of(node: fx.Node, index: int, *packets: Any) -> fx.Node | None:
    """The producer when ``node`` is its result number ``index``."""
    if is_op(node, operator.getitem) and node.args[1] == index and is_op(node.args[0], *packets):
        return node.args[0]
    return None


def _ascending(sort: fx.Node) -> bool:
    bound = bind(sort)
    return not bound.get("descending", False) and rank(bound["self"]) == 1


def _counts_from_zero(node: Any) -> bool:
    """``arange(n)``: 0, 1, 2, ..."""
    node = peel(node, *CASTS, *ALIASES)
    if is_op(node, aten.arange.default):
        return True
    if is_op(node, aten.arange.start):
        return number(node.args[0]) == 0
    return is_op(node, aten.arange.start_step) and number(node.args[0]) == 0 and number(arg(node, 2)) == 1


def _single_index(node: fx.Node) -> tuple[Any, Any]:
    """``(base, index)`` of a gather along dimension 0, else ``(base, None)``."""
    base = node.args[0]
    if is_op(node, aten.index):
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        return base, indices[0] if len(indices) == 1 else None
    dim, index = arg(node, 1), arg(node, 2)
    return base, index if dim in (0, -rank(base)) else None


def _keeps_rows(source: Any, node: fx.Node) -> bool:
    """Whether a reshape keeps one row per pair (only unit dimensions come and go)."""
    big = [s for s in shape(source) if not same(s, 1)]
    kept = [s for s in shape(node) if not same(s, 1)]
    return same_shape(big, kept)
