"""moe-fx: a ``torch.compile`` backend that fuses the Mixture-of-Experts parts of real models.

``torch.compile(model, backend="moe_ascend")`` needs no import of this package. What is exported here is loaded on first
use, so that ``import moe_fx`` costs little and pulls in no accelerator library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "moe_ascend": "moe_fx.backend",
    "cache_compile": "moe_fx.cache.method",
    "explain": "moe_fx.explanation",
    "Explanation": "moe_fx.explanation",
    "prepare": "moe_fx.preparation",
    "PrepareReport": "moe_fx.preparation",
    "load_quantized": "moe_fx.preparation",
    "save_packed": "moe_fx.preparation",
    "load_packed": "moe_fx.preparation",
    "weights_changed": "moe_fx.lowering.prepared_inputs",
    "Options": "moe_fx.options",
    "Pass": "moe_fx.passes.core",
    "MatchContext": "moe_fx.passes.core",
    "Level": "moe_fx.passes.core",
    "Miss": "moe_fx.passes.core",
    "MoeFxError": "moe_fx.errors",
    "MoeFxWarning": "moe_fx.errors",
    "diagnose": "moe_fx.doctor",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_EXPORTS))}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
