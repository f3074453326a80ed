"""Packed expert weights in Python's hands: a tensor over the engine's memory, written one projection at a time.

The layout is the engine's own (``csrc/cpu/format.h``); what is written here is read back with :func:`unpack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx import _C
from moe_fx._C import begin_packed, packed_bytes  # An extension without the packer is as good as none.

GROUPS = (32, 64, 128)
PROJECTIONS = ("gate", "up", "down")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class PackedSpec:
    """Sizes of a layer and how its experts are stored.

    Attributes:
        format: ``int8`` or ``int4``.
        experts, hidden, intermediate: E, H and I.
        gated: whether there are a gate and an up projection, or (False) the gate alone.
        group: inputs that share a scale (int4; 0 for int8).
        zero_points: whether int4 groups have zero points.
        biases: whether every projection has a bias.
        segments: memory nodes that the rows are spread over.
    """

    format: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    group: int = 0
    zero_points: bool = False
    biases: bool = False
    segments: int = 1

    @property
    def label(self) -> str:
        """The format in words: ``int8``, ``int4 g128``."""
        if self.format == "int8":
            return "int8"
        return f"int4 g{self.group}" + (" zp" if self.zero_points else "")

    @property
    def nbytes(self) -> int:
        """Size of the packed weights.

        Raises:
            ValueError: the engine does not store these sizes; the message says which would do.
        """
        return packed_bytes(self.to_dict())

    def to_dict(self) -> _C.PackedSpec:
        """The spec as the engine takes it."""
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

    def rows(self, projection: str) -> tuple[int, int]:
        """``(outputs, inputs)`` of a projection."""
        sizes = (self.intermediate, self.hidden)
        return sizes[::-1] if projection == "down" else sizes


class Packer:
    """Writes one layer's experts; ``packed`` is the result, a uint8 tensor over the engine's own memory."""

    def __init__(self, spec: PackedSpec) -> None:
        self.spec = spec
        size = spec.nbytes
        self.packed = torch.frombuffer(_C.HugeBuffer(size), dtype=torch.uint8, count=size)
        self._place = (self.packed.data_ptr(), size)
        begin_packed(*self._place, spec.to_dict())

    def quantize(self, expert: int, projection: str, weight: torch.Tensor) -> None:
        """Round a floating weight [N, K] to the spec's format."""
        self._check(projection, weight.shape)
        weight = _rows(weight.detach())
        stride = weight.stride(0) * weight.element_size()
        dtype = _DTYPES[weight.dtype]
        data = weight.data_ptr()
        _C.pack_float(*self._place, expert, projection, data, stride, dtype, torch.get_num_threads())

    def int8(self, expert: int, projection: str, weight: torch.Tensor, scales: torch.Tensor) -> None:
        """Take over int8 values [N, K] with one scale [N] per row."""
        self._check(projection, weight.shape)
        self._check_operand(projection, "weights", weight, tuple(weight.shape), torch.int8)
        self._check_operand(projection, "scales", scales, (weight.shape[0],))
        weight, scales = _rows(weight), scales.to(torch.float32).contiguous()
        where = (weight.data_ptr(), weight.stride(0), scales.data_ptr(), scales.stride(0))
        _C.pack_int8(*self._place, expert, projection, *where, torch.get_num_threads())

    def int4(
        self, expert: int, projection: str, nibbles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> None:
        """Take over nibbles: bytes [N, K/2] (the lower input in the low nibble), scales and uint8 zeros [N, K/g]."""
        outputs, inputs = nibbles.shape[0], 2 * nibbles.shape[1]
        self._check(projection, (outputs, inputs))
        groups = (outputs, inputs // self.spec.group)
        self._check_operand(projection, "weights", nibbles, tuple(nibbles.shape), torch.uint8)
        self._check_operand(projection, "scales", scales, groups)
        nibbles, scales = _rows(nibbles), scales.to(torch.float32).contiguous()
        if zeros is not None:
            self._check_operand(projection, "zero points", zeros, groups, torch.uint8)
            zeros = zeros.contiguous()
        points = (0, 0) if zeros is None else (zeros.data_ptr(), zeros.stride(0))
        where = (nibbles.data_ptr(), nibbles.stride(0), scales.data_ptr(), scales.stride(0), *points)
        _C.pack_int4(*self._place, expert, projection, *where, torch.get_num_threads())

    def bias(self, expert: int, projection: str, bias: torch.Tensor) -> None:
        """Write a bias [N]."""
        self._check_operand(projection, "biases", bias, self.spec.rows(projection)[:1])
        bias = bias.detach().to(torch.float32).contiguous()
        _C.pack_bias(*self._place, expert, projection, bias.data_ptr(), bias.stride(0))

    def _check(self, projection: str, size: tuple[int, ...] | torch.Size) -> None:
        wanted = self.spec.rows(projection)
        if tuple(size) != wanted:
            raise ValueError(f"the {projection} projection must be {list(wanted)}, not {list(size)}")

    @staticmethod
    def _check_operand(
        projection: str, what: str, operand: torch.Tensor, wanted: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        """The engine is given addresses: nothing behind this would notice operands that do not fit."""
        if tuple(operand.shape) != wanted or (dtype is not None and operand.dtype != dtype):
            found = f"{operand.dtype} {list(operand.shape)}"
            expected = f"{dtype or 'numbers'} {list(wanted)}"
            raise ValueError(f"the {projection} projection's {what} must be {expected}, not {found}")


def read_spec(packed: torch.Tensor) -> PackedSpec:
    """What packed weights are, as their own header says.

    Raises:
        ValueError: they are no packed weights, of another version, or cut short.
    """
    return PackedSpec(**_C.packed_spec(packed.data_ptr(), packed.numel()))


def unpack(packed: torch.Tensor, expert: int, projection: str) -> torch.Tensor:
    """One projection's weight [N, K] as the engine computes with it, fp32."""
    out = torch.empty(read_spec(packed).rows(projection), dtype=torch.float32, device="cpu")
    _C.unpack(packed.data_ptr(), packed.numel(), expert, projection, out.data_ptr())
    return out


def copy_packed(packed: torch.Tensor) -> torch.Tensor:
    """A copy in the engine's own memory: huge pages, on memory nodes where it was packed for as many as there are."""
    packer = Packer(read_spec(packed))
    packer.packed.copy_(packed)
    return packer.packed


def segments() -> int:
    """How many memory nodes weights should be spread over on this machine."""
    return _C.topology_segments()


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
