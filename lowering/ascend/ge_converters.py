"""Converters to GE for ops that torchair has none for; registered when a graph for torchair is lowered."""

from __future__ import annotations

import functools
from typing import Any

import torch

import moe_fx.lowering.ascend.w4a16  # noqa: F401  Defines the op.


@functools.cache
def register() -> None:
    """Give torchair the converters. They are per op, so that other graphs in the process are not concerned."""
    import torchair
    from torchair._ge_concrete_graph import fx2ge_converter
    from torchair._ge_concrete_graph.ge_converter import custom, lite  # noqa: F401  Loaded late, they would win.

    register_converter = torchair.register_fx_node_ge_converter

    # torchair 2.13's own calls the operator's first version, which does not have these attributes, and fails. It may be
    # on a list of converters that stay.
    softmax_v2 = torch.ops.npu.npu_moe_gating_top_k_softmax_v2.default
    getattr(fx2ge_converter, "_LITE_CONVERTER_OPS", set()).discard(softmax_v2)

    @register_converter(softmax_v2)
    def gating_top_k_softmax_v2(
        x: Any,
        *,
        k: int = 1,
        finished: Any = None,
        renorm: int = 0,
        output_softmax: bool = False,
        meta_outputs: Any = None,
    ) -> Any:
        attr = torchair.ge.attr
        return torchair.ge.custom_op(
            "MoeGatingTopKSoftmaxV2",
            inputs={"x": x, "finished": finished},
            outputs=["y", "expert_idx", "softmax_result"],
            attrs={"k": attr.Int(k), "renorm": attr.Int(renorm), "output_softmax": attr.Bool(output_softmax)},
        )

    def unpermuted(rows: Any, index: Any, probs: Any, padded_mode: bool) -> Any:
        return torchair.ge.custom_op(
            "MoeTokenUnpermute",
            inputs={"permuted_tokens": rows, "sorted_indices": index, "probs": probs},
            outputs=["unpermuted_tokens"],
            attrs={"padded_mode": torchair.ge.attr.Bool(padded_mode)},
        )

    @register_converter(torch.ops.npu.npu_moe_token_unpermute.default)
    def token_unpermute(
        permuted_tokens: Any,
        sorted_indices: Any,
        probs: Any = None,
        padded_mode: bool = False,
        restore_shape: Any = None,
        meta_outputs: Any = None,
    ) -> Any:
        return unpermuted(permuted_tokens, sorted_indices, probs, padded_mode)

    # What the operator is once it was traced through autograd; the second result is kept for a backward.
    @register_converter(torch.ops.npu._npu_moe_token_unpermute.default)
    def token_unpermute_for_autograd(
        permuted_tokens: Any,
        sorted_indices: Any,
        probs: Any = None,
        padded_mode: bool = False,
        restore_shape: Any = None,
        meta_outputs: Any = None,
    ) -> Any:
        return unpermuted(permuted_tokens, sorted_indices, probs, padded_mode), permuted_tokens

    @register_converter(torch.ops.moe_fx_ascend.experts_w4a16.default)
    def experts_w4a16(*operands: Any, meta_outputs: Any = None) -> Any:
        names = [argument.name for argument in torch.ops.moe_fx_ascend.experts_w4a16.default._schema.arguments]
        inputs = dict(zip(names, operands, strict=True))
        return torchair.ge.custom_op("MoeFxExpertsW4A16", inputs=inputs, outputs=["y"], attrs={})
