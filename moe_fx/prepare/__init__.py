"""``moe_fx.prepare``: make Python loops over experts capturable, before ``torch.compile``.

Three steps per block, one file each: ``recognise`` reads what a block computes from executions of it (``trace``),
``program`` writes the same computation as one traceable function, ``install`` stacks the weights, verifies and hooks
that function in. ``report`` tells what came of every block.
"""

from moe_fx.prepare.prepare import prepare
from moe_fx.prepare.report import PrepareReport

__all__ = ["PrepareReport", "prepare"]
