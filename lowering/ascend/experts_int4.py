"""``experts_int4`` (W4A16): the project's own kernel for few tokens, ``npu_grouped_matmul`` with antiquant otherwise.

Both read weights of one packed form. Without the kernel library (``kernel_library``) every graph takes the grouped
product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_fx.lowering.ascend import kernel_library, w4a16
from moe_fx.lowering.ascend import weights as recipes
from moe_fx.lowering.ascend.antiquant import widened
from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, require
from moe_fx.lowering.ascend.experts import activation_name, are_inputs, bias_dtype, check_shapes
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.inline import inline
from moe_fx.lowering.prepared_inputs import call_recipe

_HALF = (torch.bfloat16, torch.float16)
# int4 values that share one int32.
_PER_WORD = 8


def choose(node: fx.Node, settings: Settings, ids_in_range: bool) -> Choice:
    """The operators for an ``experts_int4`` node; see ``experts.choose``.

    Raises:
        Refused: they cannot compute it.
    """
    a = bound(node)
    check_shapes(a)
    x, w13, w2 = value(a["x"]), value(a["w13"]), value(a["w2"])
    require(not a["dynamic_activations"], "npu_grouped_matmul has no int4 weights with int8 activations in groups")
    require(x.dtype in _HALF, f"x is {x.dtype}; int4 weights give bf16 and fp16 results")
    weights = ("w13", "w13_scale", "w2", "w2_scale", "w13_zero", "w2_zero", "b13", "b2")
    require(
        are_inputs(a[name] for name in weights), "a weight is computed in the graph, and would be packed every call"
    )
    for name, weight in (("w13", w13), ("w2", w2)):
        require(weight.shape[1] % _PER_WORD == 0, f"{name} has {weight.shape[1]} rows, not a multiple of {_PER_WORD}")
    layout = "none" if a["layout"] == "none" else "gate_up"
    activation = activation_name(a["act"], a["limit"], layout)
    few = w4a16.takes(a) and statically_known_true(x.shape[0] <= w4a16.MAX_TOKENS)
    missing = _missing(a, settings) if few else ""
    own = few and not missing

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        operands = [a["x"], a["weights"], a["ids"], *_operands(node, a, offsets=not own)]
        if own:
            inline(gm, node, w4a16.call, operands[:9], out_dtype=a["out_dtype"])
            return
        static = {key: a[key] for key in ("act", "alpha", "limit", "out_dtype")}
        chosen = dict(layout=layout, combine=settings.combine, ids_in_range=ids_in_range)
        inline(gm, node, widened, operands, **chosen, **static)

    if own:
        return Choice("moe_fx_ascend experts_w4a16 (Ascend C)", rewrite)
    return Choice(f"torch_npu grouped_matmul (W4A16) + {activation} + {settings.combine}{missing}", rewrite)


def _missing(a: dict[str, Any], settings: Settings) -> str:
    """What keeps the project's own kernel from a call that it is for, as the end of a sentence; empty for nothing."""
    if kernel_library.loaded() is None:
        return ", for lack of the Ascend C kernel library"
    if reason := w4a16.refusal(a):
        return f", since the Ascend C kernel refuses: {reason}"
    if settings.ge and not w4a16.is_in_ge():
        return ", since this CANN takes no operator of the Ascend C kernel library into GE graphs"
    return ""


def _operands(node: fx.Node, a: dict[str, Any], offsets: bool) -> list[fx.Node | None]:
    """[w13, its scale and offset, w2, its scale and offset, b13, b2] as ``antiquant.widened`` takes them.

    Args:
        offsets: also where there are no zero points and every offset is 0.
    """
    dtype = value(a["x"]).dtype
    offsets = offsets or a["w13_zero"] is not None or a["w2_zero"] is not None

    def projection(name: str, layout: str) -> list[fx.Node | None]:
        packed, scale, zero = a[name], a[f"{name}_scale"], a[f"{name}_zero"]
        form = dict(layout=layout, dtype=dtype)
        zeros = () if zero is None else (zero,)
        return [
            call_recipe(node, recipes.int4_packed, packed, layout=layout),
            call_recipe(node, recipes.group_scales, scale, **form),
            call_recipe(node, recipes.group_offsets, scale, *zeros, **form) if offsets else None,
        ]

    def bias(vector: fx.Node | None, layout: str) -> fx.Node | None:
        form = dict(layout=layout, dtype=bias_dtype(dtype))
        return None if vector is None else call_recipe(node, recipes.columns, [vector], **form)

    first, second = projection("w13", a["layout"]), projection("w2", "gate_up")
    return [*first, *second, bias(a["b13"], a["layout"]), bias(a["b2"], "gate_up")]
