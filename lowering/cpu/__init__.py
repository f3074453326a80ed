"""The CPU target: cheap ops go back to Inductor as their references, experts run per hit expert.

``experts`` is kept whole: its reference reads each hit expert's weights once and leaves the matrix products to PyTorch's
CPU kernels, which is at least as fast as the grouped and batched forms that it replaces (``benchmarks/cpu_model.py``).
A dedicated C++ engine takes its place here.
"""

from moe_fx.lowering.targets import ReferenceTarget

TARGET = ReferenceTarget("cpu")
