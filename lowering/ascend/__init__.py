"""The ascend target: canonical ops on torch_npu's operators, finished by torchair.

``target`` decides node by node; ``route``, ``experts``, ``experts_int8``, ``experts_int4``, ``norms`` and ``rope`` know
the operators of one canonical op each; ``prefetch`` and ``streams`` are options on top. The project's
own operators, whose kernels are in a library of its own (``kernel_library``), are defined in ``w4a16``, ``gating``,
``repack`` and ``swiglu_quant``.
Nothing here imports torch_npu or torchair before a graph needs them.
"""

import contextlib

from moe_fx.errors import MissingToolchainError
from moe_fx.lowering.ascend import gating, kernel_library, repack, swiglu_quant, w4a16  # noqa: F401  Define operators.
from moe_fx.lowering.ascend.target import AscendTarget

TARGET = AscendTarget()

# Graphs from the cache and engines call the operators without asking whether there are kernels. A library that cannot
# be used is reported where a graph would take it.
with contextlib.suppress(MissingToolchainError):
    kernel_library.loaded()
