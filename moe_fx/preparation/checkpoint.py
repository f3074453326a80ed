"""``load_quantized``: expert weights that are quantised already, from safetensors straight into the engine's layout.

Values are moved, not computed: int8 per channel and int4 per group come out as they went in (``csrc/cpu/pack.h`` says
what int4 scales may lose). Every name and shape is checked before the model is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_fx.errors import CheckError, OptionError
from moe_fx.lowering.ops.activation import split_gate_up
from moe_fx.lowering.ops.experts_quantized import dequantize_int4
from moe_fx.passes.core import Miss
from moe_fx.preparation.matrices import Matrices, projections
from moe_fx.preparation.packable import Packable, require_engine
from moe_fx.preparation.quantize import pack_model, spec_for
from moe_fx.preparation.report import PrepareReport

if TYPE_CHECKING:
    from moe_fx.lowering.cpu.packing import PackedSpec

# Per projection, the names that checkpoints use.
_NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
# In an AWQ int32, the column of each nibble, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The engine computes what the checkpoint says up to rounding of results, and of activations to int8.
_BOUNDS = {"exact": 0.02, "int8": 0.06}


def load_quantized(
    model: nn.Module,
    checkpoint: str | Path | Iterable[str | Path],
    *,
    activations: str = "exact",
    rename: Callable[[str], str] | None = None,
) -> PrepareReport:
    """Fill a model's experts from a checkpoint whose expert weights are quantised already.

    The experts of each block are packed for the CPU expert engine as they are in the file, expert by expert, without
    widening them; the model's own expert weights (random, or on the meta device) are released. Only experts are read:
    attention, norms, routers, shared experts and embeddings are not this function's business, quantised or not.

    Understood are AWQ (``qweight``, ``qzeros``, ``scales``), compressed-tensors int4 (``weight_packed``,
    ``weight_scale``, ``weight_shape``, ``weight_zero_point``) and int8 per channel (``weight`` in int8,
    ``weight_scale``), under ``<experts>.<E>.gate_proj`` (``w1``), ``up_proj`` (``w3``) and ``down_proj`` (``w2``), or
    under the names of the model's own Linears where it keeps experts in a list.

    Args:
        model: its blocks are found and read as by ``moe_fx.prepare``. Blocks that loop over a list of experts must have
            weights of some sort, since they are read by executing them.
        checkpoint: a folder, one safetensors file, or several.
        activations: see ``moe_fx.prepare``.
        rename: what the model calls a tensor of the checkpoint, where that is something else.

    Returns:
        What became of every block; the error in it is against the checkpoint's own weights.

    Raises:
        CheckError: a tensor is missing, or has another shape or dtype than the model needs; the model is untouched.
        OptionError: no safetensors file is there.
        MissingToolchainError: the engine cannot be loaded.
    """
    require_engine()
    if activations not in _BOUNDS:
        raise OptionError(f"activations={activations!r} is none of {', '.join(map(repr, _BOUNDS))}")
    with Checkpoint(checkpoint, rename) as source:

        def check(block: Packable) -> None:
            with contextlib.suppress(Miss):  # Sizes that the engine does not store: the report says so.
                _Experts(block, source).check()

        def pack(block: Packable) -> tuple[torch.Tensor, PackedSpec, Matrices, float]:
            experts = _Experts(block, source)
            return (*experts.pack(), experts, _BOUNDS[activations])

        return pack_model(model, pack, activations, check)


class Checkpoint:
    """Tensors by name, over one or several safetensors files that stay open."""

    def __init__(self, where: str | Path | Iterable[str | Path], rename: Callable[[str], str] | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self._stack = contextlib.ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        for path in _safetensors(where):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckError(f"{path} is no whole safetensors file ({error}); download it again") from error
            self._files.update({(rename(name) if rename else name): (file, name) for name in file.keys()})  # noqa: SIM118

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> Iterable[str]:
        """All names, as the model would call them."""
        return self._files.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, read now."""
        file, stored = self._files[name]
        return file.get_tensor(stored)

    def like(self, name: str) -> tuple[tuple[int, ...], str]:
        """``(shape, dtype as safetensors spells it)``, without reading the tensor."""
        file, stored = self._files[name]
        part = file.get_slice(stored)
        return tuple(part.get_shape()), part.get_dtype()


def _safetensors(where: str | Path | Iterable[str | Path]) -> list[Path]:
    paths = [Path(where)] if isinstance(where, (str, Path)) else [Path(path) for path in where]
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        what = f"{missing[0]} is not there" if missing else f"{', '.join(map(str, paths))} holds no safetensors file"
        raise OptionError(f"{what}; give the folder of a checkpoint, or its *.safetensors files")
    return files


@dataclass(frozen=True)
class _Projection:
    """One stored projection: int8 values or nibbles [N, K or K/2], scales, zeros; see ``Packer``."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def part(self, take: Callable[[torch.Tensor], torch.Tensor]) -> _Projection:
        """Some of the rows."""
        return _Projection(take(self.values), take(self.scales), None if self.zeros is None else take(self.zeros))

    def widened(self) -> torch.Tensor:
        """The weight [N, K] in fp32."""
        if self.values.dtype == torch.int8:
            return self.values.float() * self.scales.float().unsqueeze(-1)
        return dequantize_int4(self.values, self.scales, self.zeros)


class _Scheme:
    """One way of storing a quantised Linear under a base name."""

    format: str
    suffixes: Mapping[str, tuple[str, ...]]  # required suffix -> dtypes as safetensors spells them
    optional: Mapping[str, tuple[str, ...]]

    def shapes(self, outputs: int, inputs: int, group: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        raise NotImplementedError

    def group(self, source: Checkpoint, base: str, inputs: int) -> int:
        """Inputs per scale; 0 for int8."""
        raise NotImplementedError

    def read(self, source: Checkpoint, base: str) -> _Projection:
        """The tensors, as the packer takes them."""
        raise NotImplementedError


_FLOATS = ("F16", "BF16", "F32")


class _Awq(_Scheme):
    """qweight int32 [in, out/8], qzeros int32 [in/g, out/8], scales [in/g, out]."""

    format = "int4"
    suffixes = {"qweight": ("I32",), "qzeros": ("I32",), "scales": _FLOATS}  # noqa: RUF012
    optional: Mapping[str, tuple[str, ...]] = {}

    def shapes(self, outputs: int, inputs: int, group: int) -> dict[str, tuple[int, ...]]:
        groups = inputs // group
        packed = {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8)}
        return packed | {"scales": (groups, outputs)}

    def group(self, source: Checkpoint, base: str, inputs: int) -> int:
        return inputs // max(1, source.like(f"{base}.scales")[0][0])

    def read(self, source: Checkpoint, base: str) -> _Projection:
        nibbles = _awq_nibbles(source.tensor(f"{base}.qweight")).t().contiguous()
        zeros = _awq_nibbles(source.tensor(f"{base}.qzeros")).t().contiguous()
        packed = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
        return _Projection(packed, source.tensor(f"{base}.scales").float().t().contiguous(), zeros)


class _PackedInt4(_Scheme):
    """weight_packed int32 [out, in/8], weight_scale [out, in/g], weight_zero_point int32 [out/8, in/g]."""

    format = "int4"
    suffixes = {"weight_packed": ("I32",), "weight_scale": _FLOATS}  # noqa: RUF012
    optional = {"weight_zero_point": ("I32",), "weight_shape": ("I64", "I32")}  # noqa: RUF012

    def shapes(self, outputs: int, inputs: int, group: int) -> dict[str, tuple[int, ...]]:
        groups = inputs // group
        packed = {"weight_packed": (outputs, inputs // 8), "weight_zero_point": (outputs // 8, groups)}
        return packed | {"weight_scale": (outputs, groups), "weight_shape": (2,)}

    def group(self, source: Checkpoint, base: str, inputs: int) -> int:
        return inputs // max(1, source.like(f"{base}.weight_scale")[0][-1])

    def read(self, source: Checkpoint, base: str) -> _Projection:
        # Nibbles are in natural order, lowest first: the bytes of the words are the packer's.
        packed = source.tensor(f"{base}.weight_packed").contiguous().view(torch.uint8)
        zeros = None
        if f"{base}.weight_zero_point" in source:
            words = source.tensor(f"{base}.weight_zero_point")
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            zeros = ((words.unsqueeze(1) >> shifts.view(1, 8, 1)) & 0xF).flatten(0, 1).to(torch.uint8)
        return _Projection(packed, source.tensor(f"{base}.weight_scale").float().contiguous(), zeros)


class _Int8(_Scheme):
    """weight int8 [out, in], weight_scale [out, 1] or [out]."""

    format = "int8"
    suffixes = {"weight": ("I8",), "weight_scale": _FLOATS}  # noqa: RUF012
    optional: Mapping[str, tuple[str, ...]] = {}

    def shapes(self, outputs: int, inputs: int, group: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (outputs, inputs), "weight_scale": (outputs, 1)}

    def group(self, source: Checkpoint, base: str, inputs: int) -> int:
        return 0

    def read(self, source: Checkpoint, base: str) -> _Projection:
        scale = source.tensor(f"{base}.weight_scale").float().reshape(-1).contiguous()
        return _Projection(source.tensor(f"{base}.weight").contiguous(), scale)


_SCHEMES = (_Awq(), _PackedInt4(), _Int8())


def _awq_nibbles(words: torch.Tensor) -> torch.Tensor:
    """[rows, columns/8] int32 as [rows, columns] uint8 in natural order."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)
    natural = torch.empty_like(nibbles)
    natural[..., list(_AWQ_ORDER)] = nibbles
    return natural.flatten(-2)


class _Experts:
    """One block's experts in a checkpoint; also the weights that these stand for (``Matrices``)."""

    def __init__(self, block: Packable, source: Checkpoint) -> None:
        self._block, self._source = block, source
        self.gated, self.biases = block.matrices.gated, block.matrices.biases
        self._scheme, self._group, self._zero_points = self._recognise()

    def _recognise(self) -> tuple[_Scheme, int, bool]:
        base = self._base(0, "down")
        for scheme in _SCHEMES:
            first = next(iter(scheme.suffixes))
            name = f"{base}.{first}"
            if name in self._source and self._source.like(name)[1] in scheme.suffixes[first]:
                for suffix in scheme.suffixes:
                    self._require(f"{base}.{suffix}")
                group = scheme.group(self._source, base, self._block.matrices.intermediate)
                zeros = isinstance(scheme, _Awq) or f"{base}.weight_zero_point" in self._source
                return scheme, group, zeros
        near = [name for name in self._source.names() if name.startswith(f"{base}.")]
        there = f"it has {', '.join(sorted(near)[:4])}" if near else self._example()
        raise CheckError(
            f"the checkpoint holds no quantised weights that are understood for {base} "
            f"(qweight, weight_packed, or weight in int8): {there}"
        )

    def _example(self) -> str:
        some = next((name for name in self._source.names() if ".experts." in name), None)
        return f"its experts have names like {some}; rename= may map them" if some else "it holds no experts at all"

    def _base(self, expert: int, projection: str) -> str:
        """The name that a projection's tensors have in common."""
        stored = self._block.matrices.module_of(expert, projection)
        if stored is not None:
            own = f"{self._block.path}.{stored}".lstrip(".")
            return next((n for n in self._alternatives(own) if self._has(n)), own)
        names = [f"{self._block.path}.{expert}.{name}".lstrip(".") for name in _NAMES[projection]]
        found = (n for name in names for n in self._alternatives(name) if self._has(n))
        return next(found, names[0])

    def _alternatives(self, name: str) -> tuple[str, ...]:
        """A base model and the model around it differ in a leading ``model.``."""
        return name, f"model.{name}", name.removeprefix("model.")

    def _has(self, base: str) -> bool:
        return any(f"{base}.{suffix}" in self._source for scheme in _SCHEMES for suffix in scheme.suffixes)

    def check(self) -> None:
        """Raise :class:`CheckError` unless every tensor is there as the block needs it."""
        spec = self.spec()
        beyond = self._base(spec.experts, "down")
        if self._block.matrices.module_of(0, "down") is None and self._has(beyond):
            raise CheckError(f"the checkpoint has {beyond}, but {self._block.path} has {spec.experts} experts")
        for e in range(spec.experts):
            for projection in projections(spec.gated):
                outputs, inputs = spec.rows(projection)
                self._check_one(self._base(e, projection), outputs * self._shares(projection), inputs)

    def _check_one(self, base: str, outputs: int, inputs: int) -> None:
        shapes = self._scheme.shapes(outputs, inputs, self._group or 1)
        if f"{base}.weight_g_idx" in self._source or f"{base}.g_idx" in self._source:
            raise CheckError(f"{base} reorders its inputs (g_idx), which packed experts cannot; quantise without it")
        for suffix, dtypes in {**self._scheme.suffixes, **self._scheme.optional}.items():
            name = f"{base}.{suffix}"
            if suffix in self._scheme.suffixes or (suffix == "weight_zero_point" and self._zero_points):
                self._require(name)
            if name not in self._source:
                continue
            shape, dtype = self._source.like(name)
            wanted = shapes[suffix]
            if shape != wanted and not (suffix == "weight_scale" and (*shape, 1) == wanted):
                raise CheckError(f"{name} is {list(shape)}, but the model needs {list(wanted)}")
            if dtype not in dtypes:
                raise CheckError(f"{name} is {dtype}, which must be {' or '.join(dtypes)}")
            if suffix == "weight_shape" and self._source.tensor(name).tolist() != [outputs, inputs]:
                said = self._source.tensor(name).tolist()
                raise CheckError(f"{name} says {said}, but the model needs {[outputs, inputs]}")
        if self.biases:
            self._require(f"{base}.bias")
        elif f"{base}.bias" in self._source:
            raise CheckError(f"the checkpoint has {base}.bias, but the experts of {self._block.path} have no biases")

    def _require(self, name: str) -> None:
        if name not in self._source:
            raise CheckError(f"the checkpoint lacks {name}, which the experts of {self._block.path} need")

    def spec(self) -> PackedSpec:
        """How the experts are packed."""
        return spec_for(self._block, self._scheme.format, self._group, self._zero_points)

    def pack(self) -> tuple[torch.Tensor, PackedSpec]:
        """Pack them, one projection at a time."""
        from moe_fx.lowering.cpu.packing import Packer

        packer = Packer(self.spec())
        for e in range(packer.spec.experts):
            for projection in projections(self.gated):
                stored = self._stored(e, projection)
                if stored.values.dtype == torch.int8:
                    packer.int8(e, projection, stored.values, stored.scales)
                else:
                    packer.int4(e, projection, stored.values, stored.scales, stored.zeros)
                bias = self.bias(e, projection)
                if bias is not None:
                    packer.bias(e, projection, bias)
        return packer.packed, packer.spec

    def weight(self, expert: int, projection: str) -> torch.Tensor:
        """See :class:`Matrices`."""
        return self._stored(expert, projection).widened()

    def bias(self, expert: int, projection: str) -> torch.Tensor | None:
        """See :class:`Matrices`."""
        name = f"{self._base(expert, projection)}.bias"
        return self._take(projection)(self._source.tensor(name)) if self.biases else None

    def _stored(self, expert: int, projection: str) -> _Projection:
        whole = self._scheme.read(self._source, self._base(expert, projection))
        return whole if self._shares(projection) == 1 else whole.part(self._take(projection))

    def _shares(self, projection: str) -> int:
        """How many projections share the tensor that this one is stored in."""
        return 2 if self._layout(projection) not in ("split", "none") else 1

    def _layout(self, projection: str) -> str:
        """How gate and up share one Linear; ``split`` where they do not."""
        if projection == "down" or self._block.matrices.module_of(0, projection) is None:
            return "split"
        return self._block.matrices.layout

    def _take(self, projection: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """This projection's rows of what is stored."""
        layout = self._layout(projection)
        if layout in ("split", "none"):
            return lambda rows: rows

        def take(rows: torch.Tensor) -> torch.Tensor:
            gate, up = split_gate_up(rows.movedim(0, -1), layout)
            chosen = gate if projection == "gate" else up
            assert chosen is not None
            return chosen.movedim(-1, 0)

        return take
