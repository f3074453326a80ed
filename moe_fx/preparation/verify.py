"""Comparing a prepared block with the block itself on random inputs, before anything is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from moe_fx.lowering.ops import CANONICAL_OPS, Tolerance
from moe_fx.passes.core import Miss, require


def compare(got: Any, wanted: Any, what: str) -> float:
    """Compare two outputs leaf by leaf within the ``experts`` op's tolerance; the largest relative L2 error.

    Raises:
        Miss: structure, shape, dtype or values differ.
    """
    got_leaves, got_tree = pytree.tree_flatten(got)
    wanted_leaves, wanted_tree = pytree.tree_flatten(wanted)
    require(got_tree == wanted_tree, f"{what}: the output has another structure")
    return max((_compare_leaf(g, w, what) for g, w in zip(got_leaves, wanted_leaves, strict=True)), default=0.0)


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """The ``experts`` op's tolerance; :class:`Miss` where it has none for the dtype."""
    bounds = CANONICAL_OPS["experts"].tolerance
    if dtype not in bounds:
        raise Miss(f"its experts compute in {dtype}, which moe_fx.experts does not cover")
    return bounds[dtype]


def _compare_leaf(got: Any, wanted: Any, what: str) -> float:
    if not isinstance(wanted, torch.Tensor):
        require(got == wanted, f"{what}: {got!r} instead of {wanted!r}")
        return 0.0
    alike = got.shape == wanted.shape and got.dtype == wanted.dtype and got.device == wanted.device
    require(alike, f"{what}: a {got.dtype} {list(got.shape)} instead of a {wanted.dtype} {list(wanted.shape)}")
    if not wanted.is_floating_point():
        require(torch.equal(got, wanted), f"{what}: integer results differ")
        return 0.0
    require(bool(wanted.isfinite().all()), f"{what}: the block itself gives values that are not finite")
    bound = tolerance_of(wanted.dtype)
    difference, reference = (got - wanted).double(), wanted.double()
    norm = reference.norm()
    relative = float(difference.norm() / norm) if norm > 0 else float(difference.norm())
    # The absolute bound is meant for values of about 1; a block's outputs may be far smaller.
    scale = float(reference.square().mean().sqrt().clamp(max=1.0))
    within = bool((difference.abs() <= bound.atol * scale + bound.rtol * reference.abs()).all())
    require(
        within and relative <= bound.rel_l2,
        f"{what}: relative L2 error {relative:.1e} (at most {bound.rel_l2:.0e}),"
        f" largest difference {float(difference.abs().max()):.1e}",
    )
    return relative
