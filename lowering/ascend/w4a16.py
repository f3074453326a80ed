"""``moe_fx_ascend::experts_w4a16``: one call for a layer's int4 experts at decode, on NPU vector cores.

The kernel is the project's own (Ascend C), in a library of its own. This file has what graphs need of it: schema, fake
kernel, where it applies, and what runs without it. The GE converter is in ``ge_converters``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

import moe_fx
from moe_fx.errors import MissingToolchainError
from moe_fx.lowering.ascend.antiquant import widened
from moe_fx.lowering.ops.experts import like_x

NAMESPACE = "moe_fx_ascend"
# Beyond this many tokens the cube units of the grouped product are faster.
MAX_TOKENS = 8
# Path of the kernel library; by default the one in the package, where the build for an NPU put it.
LIBRARY_VARIABLE = "MOE_FX_ASCENDC_LIBRARY"
_LIBRARY_NAME = "libmoe_fx_ascendc.so"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def experts_w4a16(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_offset: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_offset: torch.Tensor,
) -> torch.Tensor:
    """``experts`` with silu and int4 weights for at most ``MAX_TOKENS`` tokens.

    Args:
        x: [T, H] bf16 or fp16.
        weights: [T, k] fp32 or x's dtype; ids: [T, k] int32 within [0, E).
        w13: [E, H, 2I / 8] int32, eight signed int4 each, low first, gate columns before up's; w2: [E, I, H / 8].
        w13_scale, w13_offset: [E, G, 2I] in x's dtype for G groups along H; the weight is ``(int4 + offset) * scale``.
        w2_scale, w2_offset: [E, G, H].

    Returns:
        y [T, H] in x's dtype.

    This is what runs where the kernel library is not loaded: the grouped product on the same operands.
    """
    return widened(
        x, weights, ids, w13, w13_scale, w13_offset, w2, w2_scale, w2_offset, None, None, layout="gate_up", act="silu",
        alpha=0.0, limit=None, combine="finalize_routing", ids_in_range=True, out_dtype=None,
    )  # fmt: skip


_LIBRARY.define(
    "experts_w4a16(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_scale, Tensor w13_offset,"
    " Tensor w2, Tensor w2_scale, Tensor w2_offset) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("experts_w4a16", experts_w4a16, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::experts_w4a16", like_x, lib=_LIBRARY)


def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *packed: torch.Tensor, out_dtype: Any) -> Any:
    """The op as ``experts_int4`` is spelled with it."""
    y = torch.ops.moe_fx_ascend.experts_w4a16.default(x, weights, ids.to(torch.int32), *packed)
    return y.to(out_dtype or x.dtype)


def takes(a: dict[str, Any]) -> bool:
    """Whether the kernel computes an ``experts_int4`` call with these arguments, the number of tokens apart."""
    plain = a["act"] == "silu" and a["limit"] is None and a["layout"] != "none"
    return plain and a["b13"] is None and a["b2"] is None


@functools.cache
def kernel_library() -> Path | None:
    """The kernel library, loaded; None where there is none.

    Raises:
        MissingToolchainError: the variable names a file that is not there, or the library cannot be loaded.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    path = Path(named) if named else Path(str(moe_fx.__file__)).parent / _LIBRARY_NAME
    if not path.exists():
        if named:
            raise MissingToolchainError(
                f"{LIBRARY_VARIABLE} names {path}, which does not exist; unset it to run without the library"
            )
        return None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise MissingToolchainError(
            f"the Ascend C kernel library {path} cannot be loaded ({error}); build it for this CANN, or remove it"
        ) from error
    return path
