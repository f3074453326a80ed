"""``prepare(model)``: find the MoE blocks, have each one prepared, and report."""

from __future__ import annotations

from torch import nn

from moe_fx.errors import OptionError
from moe_fx.integrations import transformers as transformers_hook
from moe_fx.passes.core import Miss
from moe_fx.preparation.block import NeedsNothing, Unfit, prepare_block
from moe_fx.preparation.install import ATTRIBUTE, is_prepared, uninstall
from moe_fx.preparation.memory import bytes_held
from moe_fx.preparation.packed import is_packed
from moe_fx.preparation.quantize import quantize_model
from moe_fx.preparation.report import LEFT, NEEDS_NOTHING, BlockReport, PrepareReport
from moe_fx.preparation.weights import find_experts

# What prepare's arguments may be.
FORMATS, GROUP_SIZES, ACTIVATIONS = (None, "int8", "int4"), (32, 64, 128), ("exact", "int8")


def prepare(
    model: nn.Module,
    *,
    quantize: str | None = None,
    group_size: int = 128,
    activations: str = "exact",
    zero_points: bool = False,
) -> PrepareReport:
    """Make MoE blocks that loop over experts in Python capturable by ``torch.compile(model, backend="moe_ascend")``.

    Call it once the weights are loaded, in the mode (``eval()``) that the model will run in. Each block is executed on
    a few random inputs to read what it computes; its experts' weights are stacked into one tensor per projection, of
    which the block's parameters become views; and while ``moe_ascend`` traces, the block runs as one fused op. Eager
    calls and other backends run the block's own forward on the same parameters: state_dict, parameter identities and
    values are unchanged, and so is memory (one block's experts more while stacking). What cannot be recognised, or
    does not give the block's own results, is left as it was and reported with the reason.

    ``model.to(...)`` and ``load_state_dict(assign=True)`` prepare again by themselves, copies and pickles of a model
    are unprepared. Calling ``prepare`` again is safe, and needed after expert parameters were replaced one by one.

    With ``quantize`` the experts are packed for the CPU expert engine instead, of such blocks and of transformers 5.x
    alike: each block's weights are rounded to nearest, expert by expert, and then *released* (peak memory is the model
    and one block), so eager code and every other backend run the packed experts, too. Expert parameters become empty;
    state_dicts no longer hold the experts (``moe_fx.save_packed`` does), and there are no gradients through them. A
    block whose packed experts differ from its own by more than the format's bound (relative L2 error 0.06 for int8, 0.3
    for int4, on random inputs; 0.01 to 0.03 and 0.1 to 0.21 are usual) is left as it was.

    Args:
        model: any module; its MoE blocks are found by structure.
        quantize: ``"int8"`` (symmetric, a scale per output channel), ``"int4"`` (a scale per group of inputs) or None.
        group_size: inputs per int4 scale: 32, 64 or 128.
        activations: ``"exact"`` keeps activations as the model has them; ``"int8"`` rounds each row (int8 weights) or
            group (int4) of them to int8 as well, which is faster and adds about 0.01 to the error.
        zero_points: give int4 groups a zero point, which serves weights that are not centred on zero.

    Returns:
        What became of every block; print it.

    Raises:
        OptionError: an argument has a value that it cannot take.
        MissingToolchainError: ``quantize`` was asked for without the engine.
    """
    _check_arguments(quantize, group_size, activations, zero_points)
    if quantize is not None:
        return quantize_model(model, quantize, group_size, activations, zero_points)
    before = bytes_held(model)
    reports = [_prepare(model, *candidate) for candidate in list(find_experts(model, is_packed))]
    largest = max((report.bytes_stacked for report in reports), default=0)
    return PrepareReport(tuple(reports), before, bytes_held(model), before + largest)


def _check_arguments(quantize: str | None, group_size: int, activations: str, zero_points: bool) -> None:
    for name, given, choices in (
        ("quantize", quantize, FORMATS),
        ("group_size", group_size, GROUP_SIZES),
        ("activations", activations, ACTIVATIONS),
    ):
        if given not in choices:
            raise OptionError(f"{name}={given!r} is none of {', '.join(map(repr, choices))}")
    if zero_points and quantize != "int4":
        raise OptionError("zero_points=True is for quantize='int4'; int8 weights are symmetric")
    if activations != "exact" and quantize is None:
        raise OptionError(f"activations={activations!r} is for packed experts; pass quantize='int8' or 'int4', too")


def _prepare(model: nn.Module, path: str, store_path: str) -> BlockReport:
    """Prepare the module that holds the experts or, where that needs more than hidden states, the one around it."""
    block = model.get_submodule(path)
    if is_packed(block):
        return BlockReport(path, type(block).__name__, NEEDS_NOTHING, "its experts are already packed")
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
