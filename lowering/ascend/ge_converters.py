"""Converters to GE for ops that torchair has none for, or a broken one.

They are ``npu_moe_gating_top_k_softmax_v2``, ``npu_grouped_matmul_swiglu_quant_v2``, both forms of
``npu_moe_token_unpermute`` and this project's ``experts_w4a16``. torchair keeps one converter per op and process: every
later GE graph with these ops uses them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

import moe_fx.lowering.ascend.w4a16  # noqa: F401  Defines the op.
from moe_fx.errors import UnsupportedError

Converter = Callable[..., Any]
# PyTorch's number of the dtype.
_FLOAT32 = 6


@functools.cache
def register() -> None:
    """Give torchair the converters, for the process, once. An op that has a converter already keeps it.

    The exceptions are torchair's own for ``npu_moe_gating_top_k_softmax_v2``, which is replaced, and for
    ``npu_grouped_matmul_swiglu_quant_v2``, whose default for ``dequant_dtype`` is not the operator's.

    Raises:
        UnsupportedError: this torchair has no place for them.
    """
    softmax_v2: Any = torch.ops.npu.npu_moe_gating_top_k_softmax_v2.default
    users = getattr(softmax_v2, "_ge_converter", None)
    try:
        import torchair

        registry = importlib.import_module("torchair._ge_concrete_graph.fx2ge_converter")
        for own in ("custom", "lite"):  # Loaded late, they would win.
            importlib.import_module(f"torchair._ge_concrete_graph.ge_converter.{own}")
        give = torchair.register_fx_node_ge_converter
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this torchair does not take converters to GE as moe-fx registers them ({error}); "
            f"use mode='npugraph_ex', which needs none, or another torch_npu"
        ) from error

    if users is not None and not _is_torchairs(users):
        softmax_v2._ge_converter = users  # What was just imported has put torchair's own over it.

    # torchair 2.13's own for softmax_v2 calls the operator's first version, which does not have these attributes, and
    # fails. It may be on a list of converters that stay.
    def register_converter(op: Any) -> Callable[[Converter], Any]:
        present = getattr(op, "_ge_converter", None)
        if present is not None and not (op is softmax_v2 and _is_torchairs(present)):
            return lambda converter: converter
        getattr(registry, "_LITE_CONVERTER_OPS", set()).discard(op)
        given: Callable[[Converter], Any] = give(op)
        return given

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

    swiglu_quant: Any = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2.default
    torchairs = getattr(swiglu_quant, "_ge_converter", None)
    if torchairs is not None and _is_torchairs(torchairs):
        # A graph has no arguments that are the operator's defaults. torchair's own for this one is uint8.
        getattr(registry, "_LITE_CONVERTER_OPS", set()).discard(swiglu_quant)

        @give(swiglu_quant)
        def grouped_matmul_swiglu_quant_v2(*operands: Any, meta_outputs: Any = None, **attributes: Any) -> Any:
            given = {"dequant_dtype": _FLOAT32, **attributes}
            return inspect.unwrap(torchairs)(*operands, meta_outputs=meta_outputs, **given)

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


def _is_torchairs(converter: Converter) -> bool:
    return inspect.unwrap(converter).__module__.split(".")[0] in ("torchair", "torch_npu")
