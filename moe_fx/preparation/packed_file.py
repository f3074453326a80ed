"""``save_packed`` and ``load_packed``: a model's packed experts in one safetensors file.

One uint8 tensor per block, named by the block's path, in the engine's own layout; the metadata says what each is. The
header is padded so that tensors start on pages of memory when the file is mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_fx.errors import CheckError, UnsupportedError
from moe_fx.preparation.memory import Ledger
from moe_fx.preparation.packable import Packable, attribute, find_packable, require_engine
from moe_fx.preparation.packed import FORM, PACKED, is_packed
from moe_fx.preparation.report import LEFT, PREPARED, BlockReport, PrepareReport

_KIND, _VERSION = "moe_fx packed experts", "1"
_PAGE, _ALIGNMENT = 4096, 64


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write the packed experts of all blocks (``moe_fx.prepare(model, quantize=...)``) to one safetensors file.

    Everything else of the model is its state_dict's business.

    Raises:
        UnsupportedError: no block has packed experts.
    """
    blocks = {name: module for name, module in model.named_modules() if is_packed(module)}
    if not blocks:
        raise UnsupportedError("the model has no packed experts; call moe_fx.prepare(model, quantize=...) first")
    require_engine()
    packed = {name: getattr(module, PACKED) for name, module in blocks.items()}
    known = {name: _described(blocks[name], tensor) for name, tensor in packed.items()}
    metadata = {"kind": _KIND, "version": _VERSION, "blocks": json.dumps(known)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in packed.items():
        end = begin + tensor.numel()
        entries[name] = {"dtype": "U8", "shape": [tensor.numel()], "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % _PAGE)
    # Written by hand: safetensors' own writer copies all tensors first, as much memory again.
    # Put in place when it is whole: the file of that name may be mapped, by these very tensors even.
    whole = Path(path)
    partial = whole.with_name(f"{whole.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for tensor in packed.values():
                file.write(memoryview(tensor.numpy()))
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)


def load_packed(model: nn.Module, path: str | Path, *, copy: bool = False) -> PrepareReport:
    """Let a model run the packed experts that :func:`save_packed` wrote.

    The model's own expert weights are released and need not be there: it may be on the meta device (blocks that loop
    over a list of experts need weights of some sort, since they are read by executing them).

    Args:
        model: of the architecture that the file was written for.
        path: the file.
        copy: False maps the file: no copy is made, pages are read when they are first used and shared between
            processes. True reads it into the engine's own memory, whose huge pages stream faster and lie on the right
            memory nodes.

    Returns:
        What became of every block; ``error`` is not measured.

    Raises:
        CheckError: the file is damaged, is none of :func:`save_packed`'s, or is of another model; the model is
            untouched. Damage inside a block's weights is not detected.
        MissingToolchainError: the engine cannot be loaded.
    """
    require_engine()
    file = _File(Path(path))
    for found in find_packable(model):
        if isinstance(found, Packable):
            file.check(found)
    file.require_all()
    ledger = Ledger(model)
    reports = []
    for found in find_packable(model):
        reports.append(found if isinstance(found, BlockReport) else _load(found, file, copy))
        ledger.saw(0)
    return PrepareReport(tuple(reports), ledger.before, ledger.now(), ledger.peak)


def _load(block: Packable, file: _File, copy: bool) -> BlockReport:
    from moe_fx.lowering.cpu.packing import copy_packed, read_spec

    kind, size = type(block.module).__name__, block.matrices.nbytes
    if block.path not in file.blocks:
        return BlockReport(block.path, kind, LEFT, f"{file.path} does not hold its experts")
    packed, dynamic = file.packed(block.path), file.blocks[block.path]["int8_activations"]
    spec = read_spec(packed)
    if copy:
        packed = copy_packed(packed)
    block.install(packed, spec.label, dynamic)
    return BlockReport(
        module=block.path,
        kind=kind,
        status=PREPARED,
        form=block.form,
        n_experts=spec.experts,
        top_k=block.top_k,
        act=attribute(block.experts, "act"),
        experts=block.experts,
        packed_as=spec.label,
        activations="int8" if dynamic else "exact",
        bytes_experts=size,
        bytes_packed=packed.nbytes,
    )


class _File:
    """A mapped file of packed experts."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        if not path.is_file():
            raise CheckError(f"{path} is not there; moe_fx.save_packed(model, path) writes it")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckError(f"{path} is no whole safetensors file ({error}); save the model again") from error
        if metadata.get("kind") != _KIND:
            raise CheckError(
                f"{path} holds no packed experts (it is another safetensors file); "
                "moe_fx.save_packed writes them, moe_fx.load_quantized reads quantised checkpoints"
            )
        if metadata.get("version") != _VERSION:
            raise CheckError(
                f"{path} is of version {metadata.get('version')}, this moe-fx reads {_VERSION}; save the model again"
            )
        self.blocks: dict[str, dict[str, Any]] = json.loads(metadata["blocks"])
        self._found: set[str] = set()

    def packed(self, name: str) -> torch.Tensor:
        """A block's packed weights: the mapped file, or a copy where another tool moved them to odd addresses."""
        tensor = self._tensors[name]
        return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()

    def check(self, block: Packable) -> None:
        """Raise :class:`CheckError` unless what the file holds for a block (if anything) is that block's."""
        from moe_fx.lowering.cpu.packing import read_spec

        if block.path not in self.blocks:
            return
        where = f"{self.path}: {block.path or 'the model'}"
        if block.path not in self._tensors:
            raise CheckError(f"{where} has no tensor; save the model again")
        try:
            spec = read_spec(self.packed(block.path))
        except ValueError as error:
            raise CheckError(f"{where} is damaged ({error}); save the model again") from error
        m = block.matrices
        stored = (spec.experts, spec.hidden, spec.intermediate, spec.gated, spec.biases)
        wanted = (m.n_experts, m.hidden, m.intermediate, m.gated, m.biases)
        if stored != wanted:
            names = ("experts", "hidden", "intermediate", "gated", "biases")
            pairs = zip(names, stored, wanted, strict=True)
            what = ", ".join(f"{name} {a} instead of {b}" for name, a, b in pairs if a != b)
            raise CheckError(f"{where} is of another model: {what}")
        kept, own = self.blocks[block.path]["experts"], _comparable(block.experts)
        if kept != own:
            raise CheckError(f"{where} is of another model: its experts compute {kept} instead of {own}")
        self._found.add(block.path)

    def require_all(self) -> None:
        """Raise :class:`CheckError` unless the model has every block of the file."""
        absent = sorted(set(self.blocks) - self._found)
        if absent:
            raise CheckError(
                f"{self.path} holds the experts of {absent[0]}, which this model does not have as unpacked experts; "
                "load it into a model of the architecture that it was saved from"
            )


def _described(module: nn.Module, packed: torch.Tensor) -> dict[str, Any]:
    from moe_fx.lowering.cpu.packing import read_spec

    form = getattr(module, FORM)
    return {
        "experts": _comparable(form.experts),
        "int8_activations": bool(form.attributes.get("dynamic_activations")),
        "packed": dict(read_spec(packed).to_dict()),
    }


def _comparable(experts: Mapping[str, Any]) -> dict[str, Any]:
    """What experts compute, as JSON has it; how the model stored their weights is of no account."""
    kept = {key: given for key, given in experts.items() if key not in ("layout", "transposed")}
    return {key: str(given) if isinstance(given, torch.dtype) else given for key, given in sorted(kept.items())}
