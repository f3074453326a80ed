"""torch_npu: attention with symbolic sizes, only while this backend traces.

torch_npu's ``scaled_dot_product_attention`` reads the sizes of its operands as plain integers, FakeTensors' too. Dynamo
takes them all for constants then, and each number of tokens gets a graph of its own, ``dynamic=True`` or not, up to
dynamo's limit of recompilations. While shapes are worked out for this backend, PyTorch's own form of the function
answers, which keeps them symbolic. What computes attention is decided later: by the lowering, or by torch_npu where
torchair traces the function. Eager code and other backends see torch_npu alone.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch._C import DispatchKey

from moe_fx.integrations.tracing import tracing_for_moe_ascend

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_KEYS = (DispatchKey.AutogradPrivateUse1, DispatchKey.PrivateUse1)
_PROXY = torch._C._TorchDispatchModeKey.PROXY


@functools.cache
def install() -> None:
    """Install the hook, once; it has no effect without torch_npu, or where somebody else answers already."""
    if importlib.util.find_spec("torch_npu") is None:
        return
    for key in _KEYS:
        if key not in _ATTENTION.py_kernels:
            _ATTENTION.py_impl(key)(functools.partial(_attention, key))


def _attention(
    key: DispatchKey,
    query: torch.Tensor,
    key_: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> torch.Tensor:
    """Called instead of torch_npu's own, wherever PyTorch works with FakeTensors."""
    operands = (query, key_, value, attn_mask, dropout_p, is_causal)
    # What is recorded node by node is to be torch_npu's choice of operator, not its shape alone.
    if tracing_for_moe_ascend() and torch._C._get_dispatch_mode(_PROXY) is None:
        result: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(*operands, None, **others)[0]
    else:
        result = _ATTENTION._op_dk(key, *operands, **others)
    return result
