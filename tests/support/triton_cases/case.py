"""One compile case: a Triton kernel with the types and constants of one model, as the compile-only gates build it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A kernel as one launch would specialise it.

    Attributes:
        name: unique over all kernels, such as "gating-qwen3_30b"; goldens are kept under it.
        kernel: "module:function", the module in lowering/triton, such as "gating:gating_kernel".
        signature: Triton type ("*bf16", "i32", "fp32") of every argument that is not a constant, in the kernel's order.
        constants: value of every tl.constexpr argument, and None for a pointer that the launch leaves out.
        num_warps, num_stages: CUDA launch options; Ascend has neither.
        cuda_only: why Ascend does not get the kernel, or None when it does.
        ascend_only: why CUDA does not get the kernel in this form, or None when it does.
        enable_fp_fusion: CUDA launch option: may a multiplication and an addition become one FMA?
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    cuda_only: str | None = None
    ascend_only: str | None = None
    enable_fp_fusion: bool = True

    def __post_init__(self) -> None:
        if self.kernel.count(":") != 1:
            raise ValueError(f"{self.name}: kernel is {self.kernel!r}, expected 'module:function'")
        both = sorted(set(self.signature) & set(self.constants))
        if both:
            raise ValueError(f"{self.name}: {', '.join(both)} given both a type and a constant")
        if self.cuda_only and self.ascend_only:
            raise ValueError(f"{self.name}: cuda_only and ascend_only together leave no compiler to build it with")
