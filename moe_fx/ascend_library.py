"""Where the library of Ascend C kernels lies; what is in it is `moe_fx.lowering.ascend.kernel_library`'s business."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["FILE_NAME", "VARIABLE", "default_path", "named_path"]

FILE_NAME = "libmoe_fx_ascendc.so"
VARIABLE = "MOE_FX_ASCENDC_LIBRARY"
"""The environment variable that names a library outside the package."""


def default_path() -> Path:
    """The place in the package, where `moe-fx build-ascend` puts it."""
    return Path(__file__).parent / FILE_NAME


def named_path() -> Path | None:
    """What the environment names; None where it names nothing."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None
