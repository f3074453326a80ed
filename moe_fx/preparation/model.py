"""``prepare(model)``: find the MoE blocks, have each one prepared, and report."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_fx.integrations import transformers as transformers_hook
from moe_fx.passes.core import Miss
from moe_fx.preparation.block import NeedsNothing, Unfit, prepare_block
from moe_fx.preparation.install import ATTRIBUTE, is_prepared, uninstall
from moe_fx.preparation.report import LEFT, NEEDS_NOTHING, BlockReport, PrepareReport
from moe_fx.preparation.weights import expert_modules, stacked_experts


def prepare(model: nn.Module) -> PrepareReport:
    """Make MoE blocks that loop over experts in Python capturable by ``torch.compile(model, backend="moe_ascend")``.

    Call it once the weights are loaded, in the mode (``eval()``) that the model will run in. Each block is executed on
    a few random inputs to read what it computes; its experts' weights are stacked into one tensor per projection, of
    which the block's parameters become views; and while ``moe_ascend`` traces, the block runs as one fused op. Eager
    calls and other backends run the block's own forward on the same parameters: state_dict, parameter identities and
    values are unchanged, and so is memory (one block's experts more while stacking). What cannot be recognised, or
    does not give the block's own results, is left as it was and reported with the reason.

    ``model.to(...)`` and ``load_state_dict(assign=True)`` prepare again by themselves, copies and pickles of a model
    are unprepared. Calling ``prepare`` again is safe, and needed after expert parameters were replaced one by one.

    Args:
        model: any module; its MoE blocks are found by structure.

    Returns:
        What became of every block; print it.
    """
    before = _bytes_held(model)
    reports = [_prepare(model, *candidate) for candidate in list(_candidates(model))]
    largest = max((report.bytes_stacked for report in reports), default=0)
    return PrepareReport(tuple(reports), before, _bytes_held(model), before + largest)


def _candidates(model: nn.Module) -> Iterator[tuple[str, str]]:
    """``(path of the module, path of its experts in it)`` of whatever has the structure of experts."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if expert_modules(child):
                yield path, name
        if stacked_experts(module):
            yield path, ""


def _prepare(model: nn.Module, path: str, store_path: str) -> BlockReport:
    """Prepare the module that holds the experts or, where that needs more than hidden states, the one around it."""
    block = model.get_submodule(path)
    if transformers_hook.captures(block):
        why = "moe_ascend captures transformers' experts by itself"
        return BlockReport(path, type(block).__name__, NEEDS_NOTHING, why)
    try:
        return _prepare_or_report(path, block, store_path)
    except Unfit as unfit:
        inner = BlockReport(path, type(block).__name__, LEFT, str(unfit))
    if not path:
        return inner
    outer_path, _, name = path.rpartition(".")
    try:
        return _prepare_or_report(outer_path, model.get_submodule(outer_path), f"{name}.{store_path}".rstrip("."))
    except Unfit:
        return inner


def _prepare_or_report(path: str, block: nn.Module, store_path: str) -> BlockReport:
    if is_prepared(block):
        if getattr(block, ATTRIBUTE).is_current(block):
            return BlockReport(path, type(block).__name__, NEEDS_NOTHING, "it is already prepared")
        uninstall(block)
    kind = type(block).__name__
    try:
        return prepare_block(path, block, store_path)
    except NeedsNothing as nothing:
        return BlockReport(path, kind, NEEDS_NOTHING, f"dynamo captures it as it is: {nothing}")
    except Miss as miss:
        return BlockReport(path, kind, LEFT, miss.reason)


def _bytes_held(model: nn.Module) -> int:
    """Size of all distinct storages behind parameters, buffers and stacked weights."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_prepared(module):
            tensors += getattr(module, ATTRIBUTE).stacks()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
