"""``moe_fx.prepare``: make Python loops over experts capturable, before ``torch.compile``.

``model`` finds a model's MoE blocks and ``block`` takes each through its steps: ``trace`` records executions of it,
``weights`` and ``recognise`` read which weights play which part, ``program`` writes the same computation as one
traceable function, ``verify`` compares the two, and ``install`` stacks the weights and hooks the function in.
``report`` tells what came of every block.
"""

from moe_fx.preparation.model import prepare
from moe_fx.preparation.report import PrepareReport

__all__ = ["PrepareReport", "prepare"]
