"""``moe_fx_ascend::repack_int4`` and ``int4_offsets``: int4 weights of checkpoints in the layout of the NPU's kernels.

That layout is int32 [E, K, N / 8] for K inputs and N outputs: eight signed int4 a word, low first, and the weight is
``(int4 + offset) * scale``. A checkpoint keeps nibbles unsigned, so that nibble 8 is int4 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fx.lowering.ascend import kernel_library

# Nibbles are stored unsigned; the middle of their range stands for zero.
_MIDDLE = 8
# In AWQ's words, the output whose nibble lies at each place.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _repacked(packed: Sequence[torch.Tensor], layout: str) -> torch.Tensor:
    first = packed[0]
    if layout == "compressed_tensors":
        inputs, outputs = first.shape[2] * 8, sum(weight.shape[1] for weight in packed)
    elif layout == "gptq":
        inputs, outputs = first.shape[1] * 8, sum(weight.shape[2] for weight in packed)
    else:
        inputs, outputs = first.shape[1], sum(weight.shape[2] for weight in packed) * 8
    return first.new_empty((first.shape[0], inputs, outputs // 8))


@kernel_library.define("(Tensor[] packed, str layout) -> Tensor", fake=_repacked)
def repack_int4(packed: Sequence[torch.Tensor], layout: str) -> torch.Tensor:
    """Weights [E, ...], side by side in one [E, K, N / 8]: gate and up, for example.

    Args:
        packed: int32 each.
        layout: ``awq``: [E, K, N / 8], the nibble at bit 4i of word c is output ``8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``;
            ``gptq``: [E, K / 8, N], it is input 8r + i; ``compressed_tensors``: [E, N, K / 8], the same.

    Where the kernel library is not loaded, PyTorch computes it.
    """

    def nibbles(weight: torch.Tensor) -> torch.Tensor:
        unpacked = _unpacked(weight)
        if layout == "awq":
            return _in_order(unpacked).flatten(-2)
        if layout == "gptq":
            return unpacked.transpose(2, 3).flatten(1, 2)
        return unpacked.flatten(-2).transpose(1, 2)

    return _packed(torch.cat([nibbles(weight) for weight in packed], dim=-1) - _MIDDLE)


def _fake_offsets(zeros: Sequence[torch.Tensor], layout: str, dtype: torch.dtype) -> torch.Tensor:
    experts, groups, _ = zeros[0].shape
    return zeros[0].new_empty((experts, groups, 8 * sum(words.shape[2] for words in zeros)), dtype=dtype)


@kernel_library.define("(Tensor[] zeros, str layout, ScalarType dtype) -> Tensor", fake=_fake_offsets)
def int4_offsets(zeros: Sequence[torch.Tensor], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Zero points of weights side by side, as offsets [E, G, N]: 8 less the zero point.

    Args:
        zeros: int32 [E, G, N / 8] each.
        layout: ``awq``: nibbles in the order of its weights; ``gptq_v2``: in order; ``gptq``: in order, one too small.
        dtype: bf16 or fp16.

    Where the kernel library is not loaded, PyTorch computes it.
    """
    unpacked = [_unpacked(words) for words in zeros]
    points = torch.cat([(_in_order(u) if layout == "awq" else u).flatten(-2) for u in unpacked], dim=-1)
    return (_MIDDLE - points - int(layout == "gptq")).to(dtype)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """[..., 8] unsigned nibbles, low first."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)) & 0xF


def _in_order(nibbles: torch.Tensor) -> torch.Tensor:
    """AWQ's nibbles by output."""
    return nibbles[..., [_AWQ_ORDER.index(output) for output in range(8)]]


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Signed int4 values, eight a word."""
    places = (values & 0xF).unflatten(-1, (-1, 8))
    words = places[..., 0].clone()
    for place in range(1, 8):
        words |= places[..., place] << (4 * place)
    return words
