"""``moe_fx.prepare``: make Python loops over experts capturable, before ``torch.compile``.

``model`` finds a model's MoE blocks and ``block`` takes each through its steps: ``trace`` records executions of it,
``weights`` and ``recognise`` read which weights play which part, ``program`` writes the same computation as one
traceable function, ``verify`` compares the two, and ``install`` stacks the weights and hooks the function in.
``report`` tells what came of every block.
"""

import sys
import types
from typing import Any

from moe_fx.prepare.model import prepare
from moe_fx.prepare.report import PrepareReport

__all__ = ["PrepareReport", "prepare"]


class _CallableModule(types.ModuleType):
    """Python binds an imported submodule in its package: ``moe_fx.prepare(model)`` must work through that, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> PrepareReport:
        return prepare(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
