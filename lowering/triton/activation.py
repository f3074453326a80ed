"""Activations of experts and MLPs on fp32 tensors: the device side of ``lowering/ops/activation.py``.

Only operations that both compilers vectorise: clamps are compare-and-select, which like torch keeps NaN (``tl.minimum``
would drop it), and tanh is spelt through ``tl.exp``.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x); exact at both ends, since e**-x reaches inf or 0 there."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def clamp_above(x, limit):
    """min(x, limit) that keeps NaN."""
    return tl.where(x > limit, limit, x)


@triton.jit
def clamp_both(x, limit):
    """Clamp to [-limit, limit], keeping NaN."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def unary(x, ACT: tl.constexpr):
    """The plain activations (``UNARY`` in the table), on fp32."""
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), with u = sqrt(2/pi) * (x + 0.044715 x**3).
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACT == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    elif ACT == "sigmoid":
        y = sigmoid(x)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        y = x
    return y


@triton.jit
def activate(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, alpha, limit, HAS_LIMIT: tl.constexpr):
    """``activation.activate`` on fp32 tensors of one shape; the caller rounds the result, once.

    Args:
        gate, up: fp32; ``up`` is not read when GATED is false.
        ACT: key of ``ACTIVATIONS``; GATED: whether there is an ``up``.
        alpha: of ``swiglu_oai``. limit: of the clamps, read when HAS_LIMIT (``silu_then_clamp`` needs it).
    """
    if not GATED:
        y = unary(gate, ACT)
    elif ACT == "silu_then_clamp":
        tl.static_assert(HAS_LIMIT, "silu_then_clamp needs a limit")
        y = clamp_above(unary(gate, "silu"), limit) * clamp_both(up, limit)
    else:
        if HAS_LIMIT:
            gate = clamp_above(gate, limit)
            up = clamp_both(up, limit)
        y = (up + 1.0) * (gate * sigmoid(gate * alpha)) if ACT == "swiglu_oai" else unary(gate, ACT) * up
    return y
