"""The canonical ops: the one vocabulary that match passes produce and targets consume.

Importing this package registers every op under ``torch.ops.moe_fx``. ``CANONICAL_OPS`` maps an op's name to its
:class:`~moe_fx.lowering.ops.spec.CanonicalOp` (schema, reference, tolerance, input generator).
"""

from moe_fx.lowering.ops import attention, experts, experts_quantized, norms, rope, route, swiglu
from moe_fx.lowering.ops.spec import CanonicalOp, Tolerance

CANONICAL_OPS: dict[str, CanonicalOp] = {
    op.name: op
    for op in (
        route.ROUTE,
        experts.EXPERTS,
        experts_quantized.EXPERTS_INT8,
        experts_quantized.EXPERTS_INT4,
        norms.RMS_NORM,
        norms.ADD_RMS_NORM,
        rope.QK_NORM_ROPE,
        swiglu.SWIGLU,
        attention.ATTENTION,
    )
}

__all__ = ["CANONICAL_OPS", "CanonicalOp", "Tolerance"]
