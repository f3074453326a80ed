"""Finding the blocks of a model whose experts can be packed, and reading what they compute.

A module of stacked experts (transformers 5.x) is read by capturing it alone, on the meta device; a block that loops
over its experts by executing it. Blocks come one by one, so that each can be packed and its weights released before the
next is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_fx.errors import MissingToolchainError
from moe_fx.integrations import transformers as transformers_hook
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.passes.core import Miss
from moe_fx.preparation.block import NeedsNothing, ReadBlock, Unfit, read_block
from moe_fx.preparation.experts_module import ModuleForm, read_experts_module
from moe_fx.preparation.install import is_prepared, uninstall
from moe_fx.preparation.matrices import ModelMatrices
from moe_fx.preparation.packed import PACKED, PackedForm, install_packed, is_packed, packed_attributes
from moe_fx.preparation.program import PackedOperand
from moe_fx.preparation.report import LEFT, NEEDS_NOTHING, BlockReport
from moe_fx.preparation.weights import find_experts, signature, stacked_experts


@dataclass
class Packable:
    """One module whose experts can be packed.

    Attributes:
        path, module: the module, and where it is in its model.
        form: ``stacked parameters`` or ``module list``.
        matrices: its experts' weights.
        experts: attributes of ``moe_fx.experts`` that differ from its defaults.
        top_k: k, where the module decides it.
        call: how a module of experts is called.
        read: what was read of a block.
    """

    path: str
    module: nn.Module
    form: str
    matrices: ModelMatrices
    experts: Mapping[str, Any]
    top_k: int = 0
    call: ModuleForm | None = None
    read: ReadBlock | None = None

    def install(self, packed: torch.Tensor, label: str, dynamic: bool) -> None:
        """Replace the experts by packed ones; their own weights are released."""
        attributes = packed_attributes(self.experts, label, dynamic)
        if self.read is None:
            form = PackedForm(self.experts, attributes, call=self.call)
        else:
            operand = PackedOperand(PACKED, torch.ops.moe_fx_cpu.experts_packed.default, attributes)
            programs = {rank: program.run for rank, program in self.read.packed_programs(operand).items()}
            name = next(iter(type(self.module).forward.__code__.co_varnames[1:]), "")
            form = PackedForm(self.experts, attributes, programs=programs, dtype=self.read.dtype, input_name=name)
            self.read.release()
        install_packed(self.module, form, packed, self.matrices.parameters)


def require_engine() -> None:
    """Load the engine's ops.

    Raises:
        MissingToolchainError: the extension cannot be loaded.
    """
    try:
        from moe_fx.lowering.cpu import engine  # noqa: F401 - registers the ops
    except ImportError as error:
        raise MissingToolchainError(
            f"packed experts run on the C++ engine, and moe_fx._C cannot be loaded ({error}); reinstall moe-fx"
        ) from error


def find_packable(model: nn.Module) -> Iterator[Packable | BlockReport]:
    """Each block of the model with the structure of experts: read, or reported with the reason why it was not."""
    forms: dict[str, ModuleForm] = {}
    for path, store_path in list(find_experts(model, is_packed)):
        module = model.get_submodule(path)
        if is_packed(module):
            yield BlockReport(path, type(module).__name__, NEEDS_NOTHING, "its experts are already packed")
        else:
            yield _read(model, path, store_path, forms)


def _read(model: nn.Module, path: str, store_path: str, forms: dict[str, ModuleForm]) -> Packable | BlockReport:
    module = model.get_submodule(path)
    kind = type(module).__name__
    devices = {p.device.type for p in module.parameters()}
    if not devices <= {"cpu", "meta"}:
        where = ", ".join(sorted(devices))
        return BlockReport(path, kind, LEFT, f"its weights are on {where}; the engine packs weights of the host")
    reason = ""
    if not store_path:
        try:
            return _read_module(path, module, forms)
        except Miss as miss:
            reason = miss.reason
        except Unfit as unfit:
            if devices == {"meta"}:
                return BlockReport(path, kind, LEFT, str(unfit))
        if reason and (transformers_hook.captures(module) or devices == {"meta"}):
            return BlockReport(path, kind, LEFT, reason)
    outer, _, name = path.rpartition(".")
    tries = [(path, store_path)]
    if path:
        tries.append((outer, f"{name}.{store_path}".rstrip(".")))
    for block_path, experts_path in tries:
        try:
            return _read_block(block_path, model.get_submodule(block_path), experts_path)
        except Unfit as unfit:
            reason = reason or str(unfit)
        except NeedsNothing as nothing:
            return BlockReport(block_path, kind, LEFT, reason or f"its experts cannot be told apart: {nothing}")
        except Miss as miss:
            block_kind = type(model.get_submodule(block_path)).__name__
            return BlockReport(block_path, block_kind, LEFT, reason or miss.reason)
    return BlockReport(path, kind, LEFT, reason)


def _read_module(path: str, module: nn.Module, forms: dict[str, ModuleForm]) -> Packable:
    """A module of stacked experts. Modules that differ in nothing but their values are captured once."""
    n_experts = stacked_experts(module)
    key = repr([(name, what) for name, (what, _) in signature(module)])
    form = forms.get(key)
    if form is None:
        form = forms[key] = read_experts_module(module, n_experts)
    layout = form.attributes.get("layout", "gate_up")
    transposed = form.attributes.get("transposed", False)
    matrices = ModelMatrices.of_operands(module, n_experts, form.operands, layout, transposed)
    return Packable(path, module, "stacked parameters", matrices, form.attributes, call=form)


def _read_block(path: str, block: nn.Module, store_path: str) -> Packable:
    """A block that loops over its experts."""
    if is_prepared(block):
        uninstall(block)
    read = read_block(path, block, store_path)
    read.preparation = None  # The stacked copy has served its purpose, the verification.
    matrices = ModelMatrices.of_slots(block, read.form)
    return Packable(path, block, read.report.form, matrices, read.attributes, read.report.top_k, read=read)


def attribute(experts: Mapping[str, Any], name: str) -> Any:
    """An attribute of ``moe_fx.experts``, or its default."""
    declared = {a.name: a for a in CANONICAL_OPS["experts"].overload._schema.arguments}
    return experts.get(name, declared[name].default_value)
