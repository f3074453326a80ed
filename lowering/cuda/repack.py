"""Repacks int4 weights and zero points between the layouts that ``triton/repack.py`` defines, without loss."""

from __future__ import annotations

import math

import torch
import triton

from moe_fx.lowering.cuda import device
from moe_fx.lowering.cuda.device import on_its_device
from moe_fx.lowering.triton.repack import inputs_kernel, outputs_kernel

LAYOUTS = ("canonical", "planar", "awq", "gptq", "compressed_tensors")
ZERO_LAYOUTS = ("awq", "gptq", "gptq_v2", "compressed_tensors")
_BYTES = ("canonical", "planar")
# A planar word takes its four bytes' low nibbles from one word of eight inputs, and its high ones from another.
_GROUP_UNIT = 16
_BLOCK_N, _BLOCK_W = 64, 8
_BLOCK_C, _BLOCK_J = 16, 64


def to_planar(weight: torch.Tensor, source: str, group: int) -> torch.Tensor:
    """A weight in layout ``source`` as planar uint8 [..., N, K/2]; see :func:`repack`."""
    return repack(weight, source, "planar", group=group)


def from_planar(weight: torch.Tensor, target: str, group: int) -> torch.Tensor:
    """A planar weight uint8 [..., N, K/2] in layout ``target``; see :func:`repack`."""
    return repack(weight, "planar", target, group=group)


@on_its_device
def repack(weight: torch.Tensor, source: str, target: str, *, group: int | None = None) -> torch.Tensor:
    """A weight in another layout; every value is kept.

    Args:
        weight: in layout ``source``, with any number of leading dimensions (experts): uint8 [..., N, K/2]
            (``canonical``, ``planar``), int32 [..., K, N/8] (``awq``), [..., K/8, N] (``gptq``), or [..., N, K/8]
            (``compressed_tensors``).
        source, target: names of layouts.
        group: inputs to a planar group, where one of the layouts is planar: a multiple of 16 that divides K.

    Returns:
        The weight in layout ``target``, contiguous; a view of the given tensor where no value has to be moved.

    Raises:
        ValueError: an unknown layout, another dtype or shape than the layout's, or sizes that one of them cannot hold.
    """
    for name in (source, target):
        if name not in LAYOUTS:
            raise ValueError(f"{name!r} is no layout of int4 weights; known are {', '.join(map(repr, LAYOUTS))}")
    outputs, inputs = _sizes(weight, source)
    group = _check(outputs, inputs, source, target, group)
    moved = _move(_one_batch(weight), source, target, outputs, inputs, group)
    return moved.view(*weight.shape[:-2], *moved.shape[1:])


@on_its_device
def zeros_to_bytes(zeros: torch.Tensor, source: str) -> torch.Tensor:
    """Packed zero points as ``experts_int4`` takes them.

    Args:
        zeros: int32 [..., G, N/8] (``awq``, ``gptq``, ``gptq_v2``) or [..., N/8, G] (``compressed_tensors``), for N
            outputs and G groups.
        source: name of a layout of zero points.

    Returns:
        uint8 [..., N, G].

    Raises:
        ValueError: an unknown layout, or another dtype or number of dimensions.
    """
    _check_zeros(source, zeros, torch.int32)
    groups, octets = zeros.shape[-2:] if source != "compressed_tensors" else zeros.shape[:-3:-1]
    dense = _one_batch(zeros)
    out = torch.empty(dense.shape[0], octets * 8, groups, dtype=torch.uint8, device=zeros.device)
    _launch_outputs(dense, out, groups, to_rows=True, layout=source, zeros=True)
    return out.view(*zeros.shape[:-2], *out.shape[1:])


@on_its_device
def zeros_from_bytes(zeros: torch.Tensor, target: str) -> torch.Tensor:
    """The inverse of :func:`zeros_to_bytes`: uint8 [..., N, G] of 0 to 15 (``gptq``: 1 to 16) packed for ``target``.

    Raises:
        ValueError: an unknown layout, another dtype or number of dimensions, or an N that is no multiple of 8.
    """
    _check_zeros(target, zeros, torch.uint8)
    outputs, groups = zeros.shape[-2:]
    if outputs % 8:
        raise ValueError(f"{target} packs the zero points of 8 outputs into a word; {outputs} is no multiple of 8")
    dense = _one_batch(zeros)
    shape = (outputs // 8, groups) if target == "compressed_tensors" else (groups, outputs // 8)
    out = torch.empty(dense.shape[0], *shape, dtype=torch.int32, device=zeros.device)
    _launch_outputs(out, dense, groups, to_rows=False, layout=target, zeros=True)
    return out.view(*zeros.shape[:-2], *shape)


def _sizes(weight: torch.Tensor, layout: str) -> tuple[int, int]:
    """``(outputs, inputs)`` of a weight."""
    dtype = torch.uint8 if layout in _BYTES else torch.int32
    if weight.dtype != dtype or weight.dim() < 2:
        raise ValueError(f"a weight in layout {layout} is {dtype} [..., rows, columns], not {_form(weight)}")
    rows, columns = weight.shape[-2:]
    by_layout = {"awq": (columns * 8, rows), "gptq": (columns, rows * 8), "compressed_tensors": (rows, columns * 8)}
    return by_layout.get(layout, (rows, columns * 2))


def _check(outputs: int, inputs: int, source: str, target: str, group: int | None) -> int:
    """The planar group; 0 where neither layout is planar."""
    layouts, size = (source, target), f"[{outputs} outputs, {inputs} inputs]"
    if "awq" in layouts and outputs % 8:
        raise ValueError(f"awq packs 8 outputs into a word, which {size} does not divide into")
    if "awq" in layouts and inputs % 2:
        raise ValueError(f"{size} has an odd number of inputs, of which {_other('awq', layouts)} packs two to a byte")
    for layout in ("gptq", "compressed_tensors"):
        if layout in layouts and inputs % 8:
            raise ValueError(f"{layout} packs 8 inputs into a word, which {size} does not divide into")
    if "planar" not in layouts:
        return 0
    if group is None:
        raise ValueError("a planar weight is laid out by groups: give group=, the number of inputs that share a scale")
    if group < _GROUP_UNIT or group % _GROUP_UNIT or inputs % group:
        raise ValueError(
            f"group={group} does not do for a planar weight of {size}: it must be a multiple of {_GROUP_UNIT} that "
            "divides the inputs"
        )
    return group


def _other(layout: str, layouts: tuple[str, str]) -> str:
    return layouts[0] if layouts[1] == layout else layouts[1]


def _check_zeros(layout: str, zeros: torch.Tensor, dtype: torch.dtype) -> None:
    if layout not in ZERO_LAYOUTS:
        raise ValueError(f"{layout!r} is no layout of zero points; known are {', '.join(map(repr, ZERO_LAYOUTS))}")
    if zeros.dtype != dtype or zeros.dim() < 2:
        raise ValueError(f"zero points must be {dtype} [..., rows, columns], not {_form(zeros)}")


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _move(weight: torch.Tensor, source: str, target: str, outputs: int, inputs: int, group: int) -> torch.Tensor:
    """A dense weight [E, rows, columns] in another layout."""
    if source == target:
        return weight
    if weight.numel() == 0:
        return _empty(target, weight, outputs, inputs)
    if "awq" in (source, target):
        if source not in (*_BYTES, "awq") or target not in (*_BYTES, "awq"):
            through = _move(weight, source, "canonical", outputs, inputs, 0)
            return _move(through, "canonical", target, outputs, inputs, 0)
        return _by_outputs(weight, source, target, outputs, inputs, group)
    if "planar" in (source, target):
        return _by_inputs(weight, source, target, outputs, inputs, group)
    # What is left are views of one another: by bytes, or transposed.
    words = _as_words(weight) if source == "canonical" else weight.mT if source == "gptq" else weight
    words = words.mT if target == "gptq" else words
    return words.contiguous().view(torch.uint8) if target == "canonical" else words.contiguous()


def _empty(layout: str, like: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    by_layout = {
        "awq": (inputs, outputs // 8),
        "gptq": (inputs // 8, outputs),
        "compressed_tensors": (outputs, inputs // 8),
    }
    shape = by_layout.get(layout, (outputs, inputs // 2))
    dtype = torch.uint8 if layout in _BYTES else torch.int32
    return torch.empty(like.shape[0], *shape, dtype=dtype, device=like.device)


def _by_outputs(weight: torch.Tensor, source: str, target: str, outputs: int, inputs: int, group: int) -> torch.Tensor:
    out, to_rows = _empty(target, weight, outputs, inputs), source == "awq"
    words, rows = (weight, out) if to_rows else (out, weight)
    planar = "planar" in (source, target)
    _launch_outputs(words, rows, group or inputs, to_rows=to_rows, layout="awq", planar=planar)
    return out


def _launch_outputs(
    words: torch.Tensor,
    rows: torch.Tensor,
    group: int,
    *,
    to_rows: bool,
    layout: str,
    zeros: bool = False,
    planar: bool = False,
) -> None:
    experts, outputs, width = rows.shape
    inputs = width if zeros else width * 2
    if rows.numel() == 0:
        return
    word_octet, word_input = words.stride()[1:] if layout == "compressed_tensors" else words.stride()[:0:-1]
    half = group if zeros else group // 2
    block_j = min(_BLOCK_J, triton.next_power_of_2(half))
    items = experts * (inputs // group) * triton.cdiv(outputs // 8, _BLOCK_C) * triton.cdiv(half, block_j)
    outputs_kernel[(min(items, device.programs(rows)),)](
        words, rows, experts, outputs, inputs, group, word_input, word_octet,
        TO_ROWS=to_rows, PAIRED=not zeros, PLANAR=planar, AWQ_ORDER=layout == "awq", LESS=int(layout == "gptq"),
        BLOCK_C=_BLOCK_C, BLOCK_J=block_j,
    )  # fmt: skip


def _by_inputs(weight: torch.Tensor, source: str, target: str, outputs: int, inputs: int, group: int) -> torch.Tensor:
    out, to_planar = _empty(target, weight, outputs, inputs), target == "planar"
    words = [_as_words(side) if side.dtype == torch.uint8 else side for side in (weight, out)]
    sequential, planar = words if to_planar else reversed(words)
    by_output, by_word = sequential.stride()[1:]
    if "gptq" in (source, target):
        by_output, by_word = by_word, by_output
    block_w = min(_BLOCK_W, triton.next_power_of_2(group // _GROUP_UNIT))
    steps = (inputs // group) * triton.cdiv(group // _GROUP_UNIT, block_w)
    items = weight.shape[0] * triton.cdiv(outputs, _BLOCK_N) * steps
    inputs_kernel[(min(items, device.programs(weight)),)](
        sequential, planar, weight.shape[0], outputs, inputs, by_output, by_word,
        TO_PLANAR=to_planar, GROUP=group, BLOCK_N=_BLOCK_N, BLOCK_W=block_w,
    )  # fmt: skip
    return out


def _one_batch(tensor: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] as dense [E, rows, columns]."""
    return tensor.contiguous().view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """Bytes as int32, copied where they do not lie on a word's boundary."""
    return (rows if rows.storage_offset() % 4 == 0 else rows.clone()).view(torch.int32)
