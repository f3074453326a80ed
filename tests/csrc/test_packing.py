"""Packed weights: their bytes against an independent reading of csrc/cpu/format.h, and torch's own rounding."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from moe_fx import _C

HEADER_BYTES = 4096
SMALL_PAGE, HUGE_PAGE = 4096, 2 << 20
PROJECTIONS = ("gate", "up", "down")
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Sizes(NamedTuple):
    """One layer's packed form; the fields are those of PackedSpec."""

    format: str
    experts: int = 2
    hidden: int = 128
    intermediate: int = 64
    gated: bool = True
    group: int = 0
    zero_points: bool = False
    biases: bool = False
    segments: int = 1

    @property
    def spec(self) -> _C.PackedSpec:
        return {
            "format": self.format,
            "experts": self.experts,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "gated": self.gated,
            "group": self.group,
            "zero_points": self.zero_points,
            "biases": self.biases,
            "segments": self.segments,
        }

    def shape(self, projection: str) -> tuple[int, int]:
        """[N, K] of a projection."""
        return (self.hidden, self.intermediate) if projection == "down" else (self.intermediate, self.hidden)


class Packed:
    """A packed buffer and the tensor of uint8 [nbytes] that shares its memory."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.nbytes = _C.packed_bytes(sizes.spec)
        self.buffer = _C.HugeBuffer(self.nbytes)
        self.bytes = torch.frombuffer(self.buffer, dtype=torch.uint8)
        _C.begin_packed(self.buffer.address, self.nbytes, sizes.spec)

    @property
    def at(self) -> tuple[int, int]:
        return self.buffer.address, self.nbytes

    def pack_float(self, expert: int, projection: str, weight: torch.Tensor, threads: int = 1) -> None:
        """``weight`` [N, K], inputs contiguous."""
        row_stride = weight.stride(0) * weight.element_size()
        _C.pack_float(*self.at, expert, projection, weight.data_ptr(), row_stride, DTYPES[weight.dtype], threads)

    def pack_int8(self, expert: int, projection: str, values: torch.Tensor, scales: torch.Tensor) -> None:
        """``values`` int8 [N, K], ``scales`` fp32 [N]."""
        _C.pack_int8(
            *self.at, expert, projection, values.data_ptr(), values.stride(0), scales.data_ptr(), scales.stride(0), 2
        )

    def pack_int4(
        self, expert: int, projection: str, nibbles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> None:
        """``nibbles`` uint8 [N, K] of 0..15, ``scales`` fp32 [N, K/g], ``zeros`` uint8 [N, K/g]."""
        pairs = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous()
        zeros_at = (0, 0) if zeros is None else (zeros.data_ptr(), zeros.stride(0))
        _C.pack_int4(
            *self.at,
            expert,
            projection,
            pairs.data_ptr(),
            pairs.stride(0),
            scales.data_ptr(),
            scales.stride(0),
            *zeros_at,
            2,
        )

    def unpack(self, expert: int, projection: str) -> torch.Tensor:
        """fp32 [N, K]."""
        out = torch.full(self.sizes.shape(projection), torch.nan)
        _C.unpack(*self.at, expert, projection, out.data_ptr())
        return out


# --- An independent reading of the layout ----------------------------------------------------------------------------


def up(value: int, step: int) -> int:
    return -(-value // step) * step


def shares(blocks: int, segments: int, step: int) -> list[int]:
    """The first block of each segment, and the number of blocks: as even as steps of `step` blocks allow."""
    if blocks < step * segments:
        step = 1
    steps = up(blocks, step) // step
    return [min(steps * index // segments * step, blocks) for index in range(segments + 1)]


class Block(NamedTuple):
    """A block of 16 rows: its scales (fp32 [16, groups]), zero points (int [16, groups]) and values (int [16, K])."""

    scales: torch.Tensor
    zeros: torch.Tensor
    values: torch.Tensor


def read_block(sizes: Sizes, data: bytes, inputs: int) -> Block:
    if sizes.format == "int8":
        scales = torch.tensor(struct.unpack("<16f", data[:64]))[:, None]
        chunks = torch.tensor(struct.unpack(f"<{len(data) - 64}b", data[64:])).view(-1, 16, 4)
        values = chunks.transpose(0, 1).reshape(16, -1)
        assert not values[:, inputs:].any()
        return Block(scales, torch.zeros(16, 1, dtype=torch.int64), values[:, :inputs])
    groups = inputs // sizes.group
    (multiplier,) = struct.unpack("<f", data[:4])
    halves = struct.unpack(f"<{groups * 16}e", data[64 : 64 + groups * 32])
    scales = torch.tensor(halves, dtype=torch.float64).view(groups, 16).T * multiplier
    end = 64 + groups * 32
    zeros = torch.full((16, groups), 8)
    if sizes.zero_points:
        zeros = torch.tensor(list(data[end : end + groups * 16])).view(groups, 16).T
        end += groups * 16
    values = [[0] * inputs for _ in range(16)]
    words = struct.unpack(f"<{inputs // 8 * 32}H", data[up(end, 64) :])
    for chunk in range(inputs // 8):
        for row in range(16):
            for p in range(2):
                word = words[(chunk * 16 + row) * 2 + p]
                for j in range(4):
                    values[row][chunk * 8 + 2 * j + p] = word >> 4 * j & 15
    return Block(scales.float(), zeros, torch.tensor(values))


def read_layer(packed: Packed) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(expert, projection) -> scales [padded N, groups], zeros, values [padded N, K], read from the bytes alone."""
    sizes = packed.sizes
    data = bytes(memoryview(packed.buffer))[: packed.nbytes]
    blocks = {"w13": up(sizes.intermediate, 16) // 16, "w2": up(sizes.hidden, 16) // 16}
    inputs = {"w13": sizes.hidden, "w2": sizes.intermediate}
    parts = {"w13": ["gate", "up"] if sizes.gated else ["gate"], "w2": ["down"]}
    alignment = HUGE_PAGE if sizes.segments > 1 else SMALL_PAGE
    position = HEADER_BYTES
    if sizes.biases:
        position += 4 * sizes.experts * 16 * sum(len(parts[matrix]) * blocks[matrix] for matrix in blocks)

    def block_bytes(matrix: str) -> int:
        if sizes.format == "int8":
            return 64 + 16 * up(inputs[matrix], 64)
        groups = inputs[matrix] // sizes.group
        return up(64 + groups * (48 if sizes.zero_points else 32), 64) + 8 * inputs[matrix]

    found: dict[tuple[int, str], dict[int, Block]] = {}
    for segment in range(sizes.segments):
        position = up(position, alignment)
        for matrix, step in (("w13", 1), ("w2", 2)):
            first = shares(blocks[matrix], sizes.segments, step)
            for expert in range(sizes.experts):
                for block in range(first[segment], first[segment + 1]):
                    for part in parts[matrix]:
                        size = block_bytes(matrix)
                        read = read_block(sizes, data[position : position + size], inputs[matrix])
                        found.setdefault((expert, part), {})[block] = read
                        position += size
    assert up(position, alignment) == packed.nbytes
    result = {}
    for key, rows in found.items():
        in_order = [rows[block] for block in sorted(rows)]
        result[key] = tuple(torch.cat(field) for field in zip(*in_order, strict=True))
    return result  # type: ignore[return-value]


# --- Rounding to nearest, in torch -----------------------------------------------------------------------------------


def rtn_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales fp32 [N, 1] and values int64 [N, K] of [N, K]."""
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True) / 127
    values = torch.where(scales > 0, weight / scales, 0.0).round().clamp(-127, 127)
    return scales, values.long()


def stored_scales(scales: torch.Tensor) -> torch.Tensor:
    """fp32 [N, groups] rounded as blocks of 16 rows store them: fp16 times a power of two."""
    stored = torch.empty_like(scales)
    for begin in range(0, len(scales), 16):
        block = scales[begin : begin + 16]
        largest = block.max().item()
        # frexp's exponent is one more than the leading bit's, which goes to 2^14; what fits fp16 is never divided.
        exponent = torch.frexp(torch.tensor(largest)).exponent.item() - 15
        multiplier = 2.0 ** (min(exponent, 0) if largest <= 65504 else exponent)
        stored[begin : begin + 16] = (block / multiplier).half().float() * multiplier
    return stored


def rtn_int4(weight: torch.Tensor, group: int, zero_points: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales fp32 [N, K/g], zeros int64 [N, K/g] and nibbles int64 [N, K] of [N, K]."""
    groups = weight.float().unflatten(1, (-1, group))
    if zero_points:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = stored_scales(((high.double() - low.double()) / 15).float())
        zeros = torch.where(scales > 0, -low / scales, 0.0).round().clamp(0, 15)
        nibbles = (groups / scales[..., None]).round() + zeros[..., None]
        nibbles = torch.where(scales[..., None] > 0, nibbles, 0.0).clamp(0, 15)
    else:
        scales = stored_scales(groups.abs().amax(2) / 7)
        zeros = torch.full_like(scales, 8)
        nibbles = torch.where(scales[..., None] > 0, groups / scales[..., None], 0.0).round().clamp(-7, 7) + 8
    return scales, zeros.long(), nibbles.flatten(1).long()


# --- Tests -----------------------------------------------------------------------------------------------------------

FORMATS = [
    Sizes("int8"),
    Sizes("int8", hidden=100, intermediate=37, biases=True),
    Sizes("int8", experts=1, hidden=1, intermediate=1, gated=False),
    Sizes("int8", hidden=144, intermediate=50, segments=3, biases=True),
    Sizes("int4", group=32),
    Sizes("int4", group=64, hidden=192, intermediate=64, zero_points=True),
    Sizes("int4", group=128, hidden=256, intermediate=128, gated=False),
    Sizes("int4", group=32, hidden=160, intermediate=96, zero_points=True, segments=2, biases=True),
    Sizes("int4", group=32, hidden=32, intermediate=32, segments=4),
]


def projections(sizes: Sizes) -> list[tuple[int, str]]:
    names = PROJECTIONS if sizes.gated else ("gate", "down")
    return [(expert, name) for expert in range(sizes.experts) for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("sizes", FORMATS, ids=str)
def test_float_weights_are_rounded_and_laid_out_as_documented(sizes: Sizes, dtype: torch.dtype) -> None:
    packed = Packed(sizes)
    weights = {}
    for index, (expert, name) in enumerate(projections(sizes)):
        weight = torch.randn(sizes.shape(name)) * 0.02 + 0.005
        weight[0] *= 1e-3  # rows of other magnitudes share a multiplier
        weight[-1] = 0
        weights[expert, name] = weight.to(dtype)
        packed.pack_float(expert, name, weights[expert, name], threads=1 + index % 3)
    read = read_layer(packed)
    assert read.keys() == weights.keys()
    for (expert, name), weight in weights.items():
        rows, _ = weight.shape
        if sizes.format == "int8":
            scales, values = rtn_int8(weight)
            zeros = torch.zeros_like(scales).long()
        else:
            scales, zeros, values = rtn_int4(weight, sizes.group, sizes.zero_points)
        read_scales, read_zeros, read_values = read[expert, name]
        assert torch.equal(read_scales[:rows], scales)
        assert torch.equal(read_zeros[:rows], zeros)
        assert torch.equal(read_values[:rows], values)
        # Rows that only fill up the last block.
        assert not read_scales[rows:].any()
        assert not (read_values[rows:] - read_zeros[rows:, :1]).any()
        group = weight.shape[1] // scales.shape[1]
        meant = ((values.unflatten(1, (-1, group)) - zeros[..., None]) * scales[..., None]).flatten(1)
        assert torch.equal(packed.unpack(expert, name), meant)


@pytest.mark.parametrize("sizes", FORMATS, ids=str)
def test_rounding_error_is_bounded(sizes: Sizes) -> None:
    packed = Packed(sizes)
    weight = torch.randn(sizes.shape("down"))
    packed.pack_float(0, "down", weight)
    error = (packed.unpack(0, "down") - weight).unflatten(1, (-1, sizes.group or weight.shape[1])).abs().amax(2)
    groups = weight.unflatten(1, (-1, sizes.group or weight.shape[1]))
    if sizes.zero_points:
        step = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15  # the zero point is rounded too
    else:
        step = groups.abs().amax(2) / (127 if sizes.format == "int8" else 7) / 2
    assert (error <= step * 1.01).all()


@pytest.mark.parametrize("sizes", [Sizes("int8"), Sizes("int8", hidden=100, intermediate=37)], ids=str)
def test_int8_weights_are_taken_over_exactly(sizes: Sizes) -> None:
    packed = Packed(sizes)
    sources = {}
    for expert, name in projections(sizes):
        values = torch.randint(-128, 128, sizes.shape(name), dtype=torch.int8)
        scales = torch.rand(len(values), 3)[:, 1]  # not contiguous
        packed.pack_int8(expert, name, values, scales)
        sources[expert, name] = values, scales
    read = read_layer(packed)
    for (expert, name), (values, scales) in sources.items():
        read_scales, _, read_values = read[expert, name]
        assert torch.equal(read_scales[: len(values), 0], scales)
        assert torch.equal(read_values[: len(values)], values.long())
        assert torch.equal(packed.unpack(expert, name), scales[:, None] * values)


def smallest_and_largest_f16(shape: torch.Size) -> torch.Tensor:
    """fp32 of random finite fp16 bit patterns, from 2^-24 to 65504."""
    scales = torch.randint(0, 0x7C00, shape, dtype=torch.int16).view(torch.float16).float()
    scales[0, 0], scales[-1, -1] = 2.0**-24, 65504.0
    return scales


def wide_bf16(shape: torch.Size) -> torch.Tensor:
    """fp32 of random bf16 over a range of 2^28."""
    return ((1 + torch.randint(0, 128, shape) / 128) * 2.0 ** torch.randint(-40, -12, shape)).bfloat16().float()


@pytest.mark.parametrize("make_scales", [smallest_and_largest_f16, wide_bf16])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_taken_over_exactly(
    group: int, zero_points: bool, make_scales: Callable[[torch.Size], torch.Tensor]
) -> None:
    sizes = Sizes("int4", experts=1, group=group, hidden=256, intermediate=128, zero_points=zero_points)
    packed = Packed(sizes)
    sources = {}
    for expert, name in projections(sizes):
        rows, inputs = sizes.shape(name)
        nibbles = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
        scales = make_scales(torch.Size((rows, inputs // group)))
        # Checkpoints that store zero points less one reach 16.
        zeros = torch.randint(0, 17, scales.shape, dtype=torch.uint8) if zero_points else None
        packed.pack_int4(expert, name, nibbles, scales, zeros)
        sources[expert, name] = nibbles.long(), scales, torch.full(scales.shape, 8) if zeros is None else zeros.long()
    read = read_layer(packed)
    for key, (nibbles, scales, zeros) in sources.items():
        read_scales, read_zeros, read_values = read[key]
        assert torch.equal(read_scales, scales)
        assert torch.equal(read_zeros, zeros)
        assert torch.equal(read_values, nibbles)
        meant = (nibbles.unflatten(1, (-1, group)) - zeros[..., None]) * scales[..., None]
        assert torch.equal(packed.unpack(*key), meant.flatten(1))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "sizes", [Sizes("int8"), Sizes("int4", group=32), Sizes("int4", group=32, zero_points=True)], ids=str
)
def test_what_is_not_finite_shows_in_its_row_or_group_only(sizes: Sizes, value: float) -> None:
    packed = Packed(sizes)
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    weight[20, 70] = value
    packed.pack_float(1, "up", weight)
    scales, zeros, values = read_layer(packed)[1, "up"]
    bad = torch.zeros(64, 128 // (sizes.group or 128), dtype=torch.bool)
    bad[20, -1 if sizes.format == "int8" else 70 // 32] = True
    assert torch.equal(scales.isnan(), bad)
    bad_inputs = bad.repeat_interleave(sizes.group or 128, dim=1)
    assert torch.equal(packed.unpack(1, "up").isnan(), bad_inputs)
    assert not (values - zeros.repeat_interleave(sizes.group or 128, dim=1))[bad_inputs].any()


def test_rows_need_not_be_contiguous() -> None:
    packed, again = Packed(Sizes("int8", hidden=100)), Packed(Sizes("int8", hidden=100))
    wide = torch.randn(128, 160, dtype=torch.bfloat16)
    every_other = wide[::2, 20:120]
    packed.pack_float(0, "gate", every_other)
    again.pack_float(0, "gate", every_other.contiguous())
    assert torch.equal(packed.unpack(0, "gate"), again.unpack(0, "gate"))


def test_biases_lie_behind_the_header() -> None:
    sizes = Sizes("int8", hidden=100, intermediate=37, biases=True)
    packed = Packed(sizes)
    position = HEADER_BYTES
    for name in PROJECTIONS:
        rows = sizes.shape(name)[0]
        for expert in range(sizes.experts):
            bias = torch.randn(rows, 2)[:, 0]
            _C.pack_bias(*packed.at, expert, name, bias.data_ptr(), bias.stride(0))
            padded = packed.bytes[position : position + 4 * up(rows, 16)].view(torch.float32)
            assert torch.equal(padded[:rows], bias)
            assert not padded[rows:].any()
            position += 4 * up(rows, 16)


@pytest.mark.parametrize("sizes", FORMATS, ids=str)
def test_a_buffer_tells_its_spec(sizes: Sizes) -> None:
    packed = Packed(sizes)
    assert _C.packed_spec(*packed.at) == sizes.spec
    # The header as documented: magic, format, gated, sizes, flags, bytes.
    head = struct.unpack("<8sII4q4IQ", bytes(memoryview(packed.buffer)[:72]))
    assert head[0] == b"MOEFXPK1"
    assert head[1:3] == (2 if sizes.format == "int8" else 3, sizes.gated)
    assert head[3:7] == (sizes.experts, sizes.hidden, sizes.intermediate, sizes.group)
    assert head[7:] == (sizes.zero_points, sizes.biases, sizes.segments, 0, packed.nbytes)


def test_headers_that_are_not_whole_or_not_ours_are_refused() -> None:
    packed = Packed(Sizes("int8"))
    address, nbytes = packed.at
    with pytest.raises(ValueError, match=rf"has {nbytes - 1} of {nbytes} bytes: it was cut short; pack the weights"):
        _C.packed_spec(address, nbytes - 1)
    with pytest.raises(ValueError, match="a buffer of 72 bytes is shorter than the header"):
        _C.packed_spec(address, 72)
    with pytest.raises(ValueError, match="must start on a multiple of 64 bytes; allocate it as HugeBuffer"):
        _C.packed_spec(address + 8, nbytes)
    packed.bytes[7] = ord("2")
    with pytest.raises(ValueError, match="of layout version '2', and this moe-fx reads '1'; pack the weights again"):
        _C.packed_spec(address, nbytes)
    packed.bytes[:7] = torch.tensor(list(b"GGUF\0\0\0"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="not written by moe-fx"):
        packed.unpack(0, "gate")


def test_wrong_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="int4 needs a group of 32, 64 or 128 inputs, not 16"):
        _C.packed_bytes(Sizes("int4", group=16).spec)
    with pytest.raises(ValueError, match="intermediate is 64, which is no multiple of the group of 128"):
        _C.packed_bytes(Sizes("int4", group=128).spec)
    with pytest.raises(ValueError, match="format is 'int5'; packed weights are 'int8' or 'int4'"):
        _C.packed_bytes(Sizes("int5").spec)
    with pytest.raises(ValueError, match="the format bf16 is dense"):
        _C.packed_bytes(Sizes("bf16").spec)
    spec = dict(Sizes("int8").spec)
    del spec["group"]
    with pytest.raises(ValueError, match="the spec lacks 'group'; it needs format, experts"):
        _C.packed_bytes(spec)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the spec has an unknown 'groups'"):
        _C.packed_bytes({**Sizes("int8").spec, "groups": 2})  # type: ignore[arg-type, typeddict-unknown-key]
    buffer = _C.HugeBuffer(4096)
    with pytest.raises(ValueError, match=r"4096 bytes and these weights need \d+; allocate packed_bytes"):
        _C.begin_packed(buffer.address, 4096, Sizes("int8").spec)


def test_wrong_arguments_are_refused() -> None:
    packed = Packed(Sizes("int8", gated=False))
    weight = torch.randn(64, 128)
    with pytest.raises(ValueError, match="expert 2 is not among the 2"):
        packed.pack_float(2, "gate", weight)
    with pytest.raises(ValueError, match="ungated and have no up projection"):
        packed.pack_float(0, "up", weight)
    with pytest.raises(ValueError, match="projection is 'w2'; it must be 'gate', 'up' or 'down'"):
        packed.pack_float(0, "w2", weight)
    with pytest.raises(ValueError, match="threads is 0"):
        packed.pack_float(0, "gate", weight, threads=0)
    with pytest.raises(ValueError, match="dtype is 'f64'"):
        _C.pack_float(*packed.at, 0, "gate", weight.data_ptr(), 512, "f64", 1)
    with pytest.raises(ValueError, match="stride of 128 bytes where a row has 512"):
        _C.pack_float(*packed.at, 0, "gate", weight.data_ptr(), 128, "f32", 1)
    with pytest.raises(ValueError, match="these packed weights are int8"):
        packed.pack_int4(0, "gate", torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 4), None)


def test_huge_buffers_are_zeroed_writable_and_aligned() -> None:
    buffer = _C.HugeBuffer(3 * SMALL_PAGE)
    view = memoryview(buffer)
    assert (view.nbytes, view.format, view.readonly) == (3 * SMALL_PAGE, "B", False)
    assert buffer.address % HUGE_PAGE == 0
    assert not any(view)
    data = torch.frombuffer(buffer, dtype=torch.uint8)
    assert data.data_ptr() == buffer.address
    del view, buffer  # the tensor keeps the memory
    data.fill_(7)
    assert data.sum() == 7 * 3 * SMALL_PAGE


def test_page_nodes_tell_of_every_step() -> None:
    buffer = _C.HugeBuffer(2 * HUGE_PAGE)
    torch.frombuffer(buffer, dtype=torch.uint8).fill_(1)
    nodes = _C.page_nodes(buffer.address, 2 * HUGE_PAGE, HUGE_PAGE)
    assert nodes == [] or (len(nodes) == 2 and all(node >= 0 for node in nodes))
    with pytest.raises(ValueError, match="step is 0"):
        _C.page_nodes(buffer.address, HUGE_PAGE, 0)
