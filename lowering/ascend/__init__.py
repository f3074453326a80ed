"""The ascend target: canonical ops on torch_npu's operators, finished by torchair.

``target`` decides node by node; ``route``, ``experts``, ``experts_int8``, ``experts_int4``, ``norms`` and ``rope`` know
the operators of one canonical op each; ``prefetch`` is an option on top. Nothing here imports torch_npu or torchair
before a graph needs them.
"""

from moe_fx.lowering.ascend.target import AscendTarget

TARGET = AscendTarget()
