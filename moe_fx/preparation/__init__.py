"""``moe_fx.prepare`` and its relatives: make a model's MoE blocks ready, before ``torch.compile``.

Capture: ``model`` finds the blocks that loop over experts in Python and ``block`` takes each through its steps:
``trace`` records executions of it, ``weights`` and ``recognise`` read which weights play which part, ``program`` writes
the same computation as one traceable function, ``verify`` compares the two, and ``install`` stacks the weights and
hooks the function in. Packing, for the CPU expert engine: ``packable`` finds and reads blocks (``experts_module`` those
of transformers 5.x), ``matrices`` gives one expert's weights however they are stored, ``quantize`` rounds them,
``checkpoint`` takes them from a quantised checkpoint and ``packed_file`` from a file of packed experts, and ``packed``
puts them in their place. ``memory`` keeps count, ``report`` tells what came of every block.
"""

from moe_fx.preparation.checkpoint import load_quantized
from moe_fx.preparation.model import prepare
from moe_fx.preparation.packed_file import load_packed, save_packed
from moe_fx.preparation.report import PrepareReport

__all__ = ["PrepareReport", "load_packed", "load_quantized", "prepare", "save_packed"]
