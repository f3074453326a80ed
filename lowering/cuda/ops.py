"""The launchers as PyTorch ops: ``torch.ops.moe_fx_cuda``, registered when this module is imported.

Each op has the schema of the canonical op of its name, and is opaque to Inductor: one node, no look inside, so that a
compiled graph can be cached across processes and captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_fx.lowering.cuda import device, experts, experts_int4, gating, norms, qk_norm_rope, swiglu
from moe_fx.lowering.ops import CANONICAL_OPS

NAMESPACE = "moe_fx_cuda"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Kernel:
    """A canonical op's kernel.

    Attributes:
        op: the canonical op's name.
        launch: its signature is the canonical op's; runs the kernel on real tensors.
        refusal: the same signature on fake tensors; why the kernel does not take them, or None.
    """

    op: str
    launch: Callable[..., Any]
    refusal: Callable[..., str | None]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered ``torch.ops.moe_fx_cuda.<op>.default``."""
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.op).default
        return overload

    def register(self) -> None:
        """Define the op in PyTorch's dispatcher."""
        canonical = CANONICAL_OPS[self.op]
        _LIBRARY.define(f"{self.op}{canonical.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.op, self.launch, "CPU" if device.INTERPRETED else "CUDA")
        fake = canonical.fake or functools.partial(_like_reference, canonical.reference)
        torch.library.register_fake(f"{NAMESPACE}::{self.op}", fake, lib=_LIBRARY)


KERNELS = {
    kernel.op: kernel
    for kernel in (
        Kernel("route", gating.route, gating.route_refusal),
        Kernel("experts", experts.experts, experts.experts_refusal),
        Kernel("experts_int4", experts_int4.experts_int4, experts_int4.experts_int4_refusal),
        Kernel("rms_norm", norms.rms_norm, norms.rms_norm_refusal),
        Kernel("add_rms_norm", norms.add_rms_norm, norms.add_rms_norm_refusal),
        Kernel("qk_norm_rope", qk_norm_rope.qk_norm_rope, qk_norm_rope.qk_norm_rope_refusal),
        Kernel("swiglu", swiglu.swiglu, swiglu.swiglu_refusal),
    )
}


def _like_reference(reference: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a composite's reference returns, as the kernels lay it out: dense rows."""
    result = reference(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return torch.empty_like(result, memory_format=torch.contiguous_format)
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in result)


for _kernel in KERNELS.values():
    _kernel.register()
