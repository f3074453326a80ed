"""Recipes that bring expert weights into the layout of ``npu_grouped_matmul``: [E, K, N], gate columns before up's.

Each is a pure function of whole stacked weights that runs once per weight (``moe_fx.lowering.prepared_inputs``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import is_fake

from moe_fx.lowering.ascend import kernel_library
from moe_fx.lowering.prepared_inputs import recipe

# ACL_FORMAT_FRACTAL_NZ: the blocked layout that the matrix units read without rearranging.
_NZ = 29
# Nibbles are stored unsigned; the middle of their range stands for zero.
_MIDDLE = 8
# Inputs and outputs that the kernel of repack_int4 moves together.
_REPACK_ALIGNMENT = 32


@recipe("(Tensor[] weights, *, str layout='gate_up', bool transposed=False, bool nz=False) -> Tensor")
def stacked(
    weights: Sequence[torch.Tensor], *, layout: str = "gate_up", transposed: bool = False, nz: bool = False
) -> torch.Tensor:
    """[E, N, K] weights (``transposed``: [E, K, N]) as one contiguous [E, K, N], columns in the order gate, up.

    Args:
        weights: one merged weight, or gate and up (layout ``split``).
        layout: of their N rows, as in ``experts``.
        nz: cast the result to NZ.
    """
    rows_first = [w.transpose(1, 2) if transposed else w for w in weights]
    result = gate_first(rows_first, layout).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    # The cast changes how the device stores the tensor, not its shape; it has no kernel for shapes alone.
    return torch.ops.npu.npu_format_cast.default(result, _NZ) if nz and not is_fake(result) else result


@recipe("(Tensor[] vectors, *, str layout='gate_up', ScalarType? dtype=None) -> Tensor")
def columns(
    vectors: Sequence[torch.Tensor], *, layout: str = "gate_up", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Biases or scales [E, N] in the order of ``stacked``'s columns, cast."""
    return gate_first(list(vectors), layout).to(dtype or vectors[0].dtype, copy=True)


@recipe("(Tensor packed, *, str layout='gate_up') -> Tensor")
def int4_packed(packed: torch.Tensor, *, layout: str = "gate_up") -> torch.Tensor:
    """Unsigned nibbles uint8 [E, N, K / 2] (see ``experts_int4``) as signed int4 [E, K, N], eight an int32, low first.

    Without a kernel for it one expert at a time, since the unpacked form is many times larger.
    """
    n_experts, rows, half = packed.shape
    in_words = layout == "gate_up" and rows % _REPACK_ALIGNMENT == 0 and 2 * half % _REPACK_ALIGNMENT == 0
    if packed.device.type == "npu" and in_words and kernel_library.loaded() is not None:
        # The canonical bytes are compressed-tensors' words.
        words = packed.contiguous().view(torch.int32)
        repacked: torch.Tensor = torch.ops.moe_fx_ascend.repack_int4.default([words], "compressed_tensors")
        return repacked
    result = packed.new_empty((n_experts, 2 * half, rows // 8), dtype=torch.int32)
    if not is_fake(packed):  # Shape inference has no use for a loop over experts.
        for expert in range(n_experts):
            result[expert] = _int4_of_expert(packed[expert], layout)
    return result


@recipe("(Tensor scale, *, str layout='gate_up', ScalarType? dtype=None) -> Tensor")
def group_scales(scale: torch.Tensor, *, layout: str = "gate_up", dtype: torch.dtype | None = None) -> torch.Tensor:
    """Scales [E, N, G] as antiquant scales [E, G, N]."""
    ordered = gate_first([scale], layout).transpose(1, 2)
    return ordered.to(dtype or scale.dtype).clone(memory_format=torch.contiguous_format)


@recipe("(Tensor scale, Tensor? zero=None, *, str layout='gate_up', ScalarType? dtype=None) -> Tensor")
def group_offsets(
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    layout: str = "gate_up",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Antiquant offsets [E, G, N]: ``(int4 + offset) * scale`` with signed int4 needs ``8 - zero point``."""
    if zero is None:
        return torch.zeros_like(group_scales(scale, dtype=dtype))
    return _MIDDLE - group_scales(zero, layout=layout, dtype=dtype or scale.dtype)


@recipe("(Tensor scale, *, ScalarType dtype) -> Tensor")
def zero_offsets(scale: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Antiquant offsets [E, N] of symmetric weights."""
    return torch.zeros_like(scale, dtype=dtype)


def gate_first(parts: Sequence[torch.Tensor], layout: str) -> torch.Tensor:
    """Dimension 1 (N) in the order gate, up."""
    if layout == "split":
        return torch.cat(list(parts), dim=1)
    (whole,) = parts
    if layout == "up_gate":
        up, gate = whole.chunk(2, dim=1)
        return torch.cat((gate, up), dim=1)
    if layout == "interleaved":
        return torch.cat((whole[:, ::2], whole[:, 1::2]), dim=1)
    return whole


def _int4_of_expert(packed: torch.Tensor, layout: str) -> torch.Tensor:
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    signed = gate_first([(nibbles.to(torch.int32) - _MIDDLE).unsqueeze(0)], layout)[0].t() & 0xF
    result = signed[:, ::8].clone()
    for place in range(1, 8):
        result |= signed[:, place::8] << (4 * place)
    return result
