"""Programmatic dependent launch (PDL): a kernel that starts while the one before it in the stream still runs.

A launch with ``launch_pdl=True`` may start once every program of the kernel before has called ``allow_dependents`` or
ended. Until ``wait_for_inputs`` returns, its programs may read only what is older than that kernel, and write nothing.
Every program must wait, even with nothing to do: the next kernel waits for the end of this one alone, and takes it for
the end of all before it. Hopper and later; elsewhere both are compiled to nothing (PDL false).
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernel before has ended and its results are visible; at once when called again."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_dependents(PDL: tl.constexpr):
    """Let the next kernel start; it waits by itself for this one's results."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
