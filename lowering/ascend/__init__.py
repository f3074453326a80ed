"""The ascend target: canonical ops on torch_npu's operators, finished by torchair.

``target`` decides node by node; ``route``, ``experts``, ``experts_int8``, ``experts_int4``, ``norms`` and ``rope`` know
the operators of one canonical op each; ``prefetch`` is an option on top. The project's own operators, whose kernels are
in a library of its own (``kernel_library``), are defined in ``w4a16``, ``gating``, ``repack`` and ``swiglu_quant``.
Nothing here imports torch_npu or torchair before a graph needs them.
"""

from moe_fx.lowering.ascend import gating, repack, swiglu_quant, w4a16  # noqa: F401  They define operators.
from moe_fx.lowering.ascend.target import AscendTarget

TARGET = AscendTarget()
