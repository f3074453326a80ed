"""Repacking int4 weights: every layout against numpy code that follows its definition value by value, and back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE

pytest.importorskip("triton", reason="upstream Triton is not installed (it is made for Linux)")

from moe_fx.lowering.cuda import repack as launcher
from moe_fx.lowering.cuda.repack import (
    LAYOUTS,
    ZERO_LAYOUTS,
    from_planar,
    repack,
    to_planar,
    zeros_from_bytes,
    zeros_to_bytes,
)
from moe_fx.lowering.ops.experts_quantized import dequantize_int4

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(values: np.ndarray, layout: str, group: int = 0) -> np.ndarray:
    """Nibbles [N, K] in a layout, one at a time."""
    outputs, inputs = values.shape
    shape, dtype = {
        "canonical": ((outputs, inputs // 2), np.uint8),
        "planar": ((outputs, inputs // 2), np.uint8),
        "awq": ((inputs, outputs // 8), np.uint32),
        "gptq": ((inputs // 8, outputs), np.uint32),
        "compressed_tensors": ((outputs, inputs // 8), np.uint32),
    }[layout]
    out = np.zeros(shape, dtype)
    for n in range(outputs):
        for k in range(inputs):
            if layout == "canonical":
                place, bit = (n, k // 2), 4 * (k % 2)
            elif layout == "planar":
                start, within = k // group * group, k % group
                place, bit = (n, start // 2 + within % (group // 2)), 4 * (within // (group // 2))
            elif layout == "awq":
                place, bit = (k, n // 8), 4 * AWQ_ORDER.index(n % 8)
            elif layout == "gptq":
                place, bit = (k // 8, n), 4 * (k % 8)
            else:
                place, bit = (n, k // 8), 4 * (k % 8)
            out[place] |= dtype(int(values[n, k]) << bit)
    return out.view(np.int32) if dtype is np.uint32 else out


def packed_zeros(values: np.ndarray, layout: str) -> np.ndarray:
    """Zero points [N, G] in a layout, one at a time."""
    outputs, groups = values.shape
    out = np.zeros((outputs // 8, groups) if layout == "compressed_tensors" else (groups, outputs // 8), np.uint32)
    for n in range(outputs):
        for g in range(groups):
            nibble = AWQ_ORDER.index(n % 8) if layout == "awq" else n % 8
            stored = int(values[n, g]) - (1 if layout == "gptq" else 0)
            out[(n // 8, g) if layout == "compressed_tensors" else (g, n // 8)] |= np.uint32(stored << (4 * nibble))
    return out.view(np.int32)


def nibbles(*shape: int, low: int = 0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 16 + low, shape).astype(np.uint8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


@pytest.mark.parametrize("source, target", list(itertools.product(LAYOUTS, repeat=2)))
@pytest.mark.parametrize("outputs, inputs, group", [(8, 32, 32), (24, 64, 16), (16, 96, 32), (8, 96, 96), (8, 48, 48)])
def test_every_layout_to_every_other(source: str, target: str, outputs: int, inputs: int, group: int) -> None:
    values = nibbles(outputs, inputs)
    given, wanted = (tensor(packed(values, layout, group)) for layout in (source, target))
    got = repack(given, source, target, group=group)
    assert got.dtype == wanted.dtype
    assert got.is_contiguous()
    assert torch.equal(got, wanted)
    assert torch.equal(given, tensor(packed(values, source, group)))  # as it was


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("layout", ["awq", "gptq", "canonical"])
def test_more_than_one_block_each_way(layout: str, group: int) -> None:
    values = nibbles(136, 256)
    given, planar = tensor(packed(values, layout)), tensor(packed(values, "planar", group))
    assert torch.equal(to_planar(given, layout, group), planar)
    assert torch.equal(from_planar(planar, layout, group), given)


@pytest.mark.parametrize("outputs", [1, 3, 70])
@pytest.mark.parametrize("layout", ["gptq", "compressed_tensors", "canonical"])
def test_any_number_of_outputs_where_inputs_are_packed(layout: str, outputs: int) -> None:
    values = nibbles(outputs, 32)
    given, planar = tensor(packed(values, layout)), tensor(packed(values, "planar", 32))
    assert torch.equal(to_planar(given, layout, 32), planar)
    assert torch.equal(from_planar(planar, layout, 32), given)


def test_canonical_inputs_need_not_fill_words_for_awq() -> None:
    values = nibbles(8, 6)
    canonical, awq = (tensor(packed(values, layout)) for layout in ("canonical", "awq"))
    assert torch.equal(repack(canonical, "canonical", "awq"), awq)
    assert torch.equal(repack(awq, "awq", "canonical"), canonical)


@pytest.mark.parametrize("source, target", list(itertools.product(LAYOUTS, repeat=2)))
@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_experts_are_packed_one_by_one(source: str, target: str, leading: tuple[int, ...]) -> None:
    experts = [nibbles(8, 32, seed=e) for e in range(int(np.prod(leading)))]
    given, wanted = (
        torch.stack([tensor(packed(values, layout, 16)) for values in experts]).unflatten(0, leading)
        for layout in (source, target)
    )
    assert torch.equal(repack(given, source, target, group=16), wanted)


@pytest.mark.parametrize("source, target", list(itertools.product(LAYOUTS, repeat=2)))
def test_views_of_any_strides(source: str, target: str) -> None:
    """Transposed memory, and rows that start off a word's boundary."""
    values = nibbles(16, 32)
    given, wanted = (tensor(packed(values, layout, 16)) for layout in (source, target))
    transposed = given.mT.contiguous().mT
    assert torch.equal(repack(transposed, source, target, group=16), wanted)
    larger = torch.zeros(given.numel() + 3, dtype=given.dtype, device=DEVICE)
    shifted = larger[3:].view(given.shape).copy_(given)
    assert torch.equal(repack(shifted, source, target, group=16), wanted)


@pytest.mark.parametrize("source, target", list(itertools.product(LAYOUTS, repeat=2)))
@pytest.mark.parametrize("experts, outputs, inputs", [(0, 8, 32), (2, 0, 32), (2, 8, 0)])
def test_nothing(source: str, target: str, experts: int, outputs: int, inputs: int) -> None:
    shape = packed(nibbles(outputs, inputs), source, 16).shape
    empty = torch.empty(experts, *shape, dtype=torch.uint8 if source in ("canonical", "planar") else torch.int32)
    got = repack(empty.to(DEVICE), source, target, group=16)
    assert got.shape == (experts, *packed(nibbles(outputs, inputs), target, 16).shape)


def test_canonical_is_what_the_reference_reads() -> None:
    """(nibble - zero) * scale of AWQ tensors equals ``experts_int4``'s weight, zeros and scales repacked alike."""
    values, zeros, group = nibbles(16, 64), nibbles(16, 2, seed=1), 32
    scales = torch.rand(2, 16)
    canonical = repack(tensor(packed(values, "awq")), "awq", "canonical")
    points = zeros_to_bytes(tensor(packed_zeros(zeros, "awq")), "awq")
    got = dequantize_int4(canonical.cpu(), scales.mT, points.cpu())
    expected = (values.astype(np.float32) - zeros.repeat(group, 1)) * scales.numpy().T.repeat(group, 1)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("layout", ZERO_LAYOUTS)
@pytest.mark.parametrize("outputs, groups", [(8, 1), (24, 3), (136, 70)])
def test_zero_points(layout: str, outputs: int, groups: int) -> None:
    values = nibbles(outputs, groups, low=1 if layout == "gptq" else 0)
    stored = tensor(packed_zeros(values, layout))
    assert torch.equal(zeros_to_bytes(stored, layout), tensor(values))
    assert torch.equal(zeros_from_bytes(tensor(values), layout), stored)


@pytest.mark.parametrize("layout", ZERO_LAYOUTS)
def test_zero_points_of_experts(layout: str) -> None:
    experts = [nibbles(16, 3, low=1 if layout == "gptq" else 0, seed=e) for e in range(4)]
    stored = torch.stack([tensor(packed_zeros(values, layout)) for values in experts]).unflatten(0, (2, 2))
    values = torch.stack([tensor(values) for values in experts]).unflatten(0, (2, 2))
    assert torch.equal(zeros_to_bytes(stored, layout), values)
    assert torch.equal(zeros_from_bytes(values, layout), stored)
    assert torch.equal(zeros_from_bytes(values.mT.contiguous().mT, layout), stored)
    assert zeros_to_bytes(stored[:0], layout).shape == (0, 2, 16, 3)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_round_trips_of_drawn_sizes(data: st.DataObject) -> None:
    """Any way through the layouts keeps every value; the first step is checked value by value."""
    group = 16 * data.draw(st.integers(1, 9), "group / 16")
    experts, groups = data.draw(st.integers(1, 2), "experts"), data.draw(st.integers(1, 2), "groups")
    outputs = 8 * data.draw(st.integers(1, 3), "outputs / 8")
    values = nibbles(experts, outputs, group * groups, seed=data.draw(st.integers(0, 99), "seed"))
    way = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=4), "way")
    start = weight = torch.stack([tensor(packed(v, way[0], group)) for v in values])
    for source, target in zip(way, [*way[1:], way[0]], strict=True):
        weight = repack(weight, source, target, group=group)
        if source == way[0] and target == way[1]:
            assert torch.equal(weight, torch.stack([tensor(packed(v, target, group)) for v in values]))
    assert torch.equal(weight, start)


def test_nothing_is_written_outside_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[torch.Tensor] = []

    def cut(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory.append(torch.full((int(np.prod(shape)) + 128,), 77, dtype=dtype, device=device))
        return memory[-1][64:-64].view(shape)

    monkeypatch.setattr(launcher.torch, "empty", cut)
    weights = {layout: tensor(packed(nibbles(24, 96), layout, 48)) for layout in LAYOUTS}
    for source in LAYOUTS:
        for target in LAYOUTS:
            repack(weights[source], source, target, group=48)
    for layout in ZERO_LAYOUTS:
        zeros_from_bytes(zeros_to_bytes(tensor(nibbles(3, 3).astype(np.int32)), layout), layout)
    assert len(memory) >= 20
    assert all((whole[:64] == 77).all() and (whole[-64:] == 77).all() for whole in memory)


# --- What is refused --------------------------------------------------------------------------------------------------

BYTES, WORDS = torch.zeros(8, 16, dtype=torch.uint8), torch.zeros(8, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    "weight, source, target, group, message",
    [
        (
            BYTES,
            "marlin",
            "planar",
            16,
            "'marlin' is no layout of int4 weights; known are 'canonical', 'planar', 'awq'",
        ),
        (BYTES, "canonical", "tiled", 16, "'tiled' is no layout"),
        (WORDS, "canonical", "planar", 16, r"layout canonical is torch.uint8 .* not torch.int32 \[8, 16\]"),
        (BYTES, "awq", "planar", 16, "layout awq is torch.int32"),
        (BYTES[0], "canonical", "planar", 16, r"not torch.uint8 \[16\]"),
        (BYTES[:7], "canonical", "awq", None, r"awq packs 8 outputs into a word, which \[7 outputs, 32 inputs\]"),
        (BYTES[:, :3], "canonical", "gptq", None, r"gptq packs 8 inputs into a word, which \[8 outputs, 6 inputs\]"),
        (BYTES[:, :3], "canonical", "compressed_tensors", None, "compressed_tensors packs 8 inputs into a word"),
        (WORDS[:7], "awq", "canonical", None, "an odd number of inputs, of which canonical packs two to a byte"),
        (WORDS[:4], "awq", "gptq", None, "gptq packs 8 inputs into a word"),
        (BYTES, "canonical", "planar", None, "give group=, the number of inputs that share a scale"),
        (BYTES, "planar", "awq", None, "give group="),
        (BYTES, "canonical", "planar", 0, "group=0 does not do"),
        (BYTES, "canonical", "planar", -16, "group=-16 does not do"),
        (BYTES, "canonical", "planar", 24, "it must be a multiple of 16 that divides the inputs"),
        (BYTES[:, :12], "planar", "gptq", 16, r"group=16 does not do for a planar weight of \[8 outputs, 24 inputs\]"),
    ],
)
def test_weights_refused(weight: torch.Tensor, source: str, target: str, group: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repack(weight, source, target, group=group)


@pytest.mark.parametrize(
    "convert, zeros, layout, message",
    [
        (zeros_to_bytes, WORDS, "planar", "'planar' is no layout of zero points; known are 'awq', 'gptq', 'gptq_v2'"),
        (zeros_to_bytes, BYTES, "awq", r"zero points must be torch.int32 .* not torch.uint8 \[8, 16\]"),
        (zeros_from_bytes, WORDS, "awq", "zero points must be torch.uint8"),
        (zeros_from_bytes, BYTES[0], "awq", "zero points must be torch.uint8"),
        (zeros_from_bytes, BYTES[:7], "gptq", "gptq packs the zero points of 8 outputs into a word; 7 is no multiple"),
    ],
)
def test_zero_points_refused(convert: Any, zeros: torch.Tensor, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(zeros, layout)
