"""A stand-in for CANN on a machine without an NPU; see README.md.

``preload`` comes before torch (as a pytest plugin: ``-p host_cann.preload``), :func:`install` after it.
"""

from __future__ import annotations

import functools


@functools.cache
def install() -> None:
    """Let ``npu:0`` compute: graphs in the interpreter, single operators and captures with eager CPU kernels."""
    from host_cann import eager_kernels, ge_interpreter

    ge_interpreter.install()
    eager_kernels.install()
