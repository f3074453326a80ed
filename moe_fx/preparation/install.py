"""Stacking a block's expert weights and hooking its traceable function in.

The block keeps its parameters: each Linear's data becomes a view of the stacked storage, so identities, state_dict and
eager values stay as they were and nothing is held twice. The block's class becomes a subclass of itself whose forward
takes the generated function only while dynamo traces for ``moe_ascend``.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe_fx.errors import MoeFxWarning
from moe_fx.integrations.tracing import tracing_for_moe_ascend
from moe_fx.preparation.program import Program
from moe_fx.preparation.recognise import ExpertForm
from moe_fx.preparation.weights import Slot

# The block's attribute that holds its Preparation; generated functions read the stacks from it.
ATTRIBUTE = "_moe_fx"
_STACKS = ("w13", "w2", "b13", "b2")


class Preparation:
    """What a prepared block carries: a plain object, so that no parameter, buffer or state_dict entry is added.

    Attributes:
        w13, w2, b13, b2: the stacked weights, or None where the block's own parameters already are stacked.
        programs: the generated functions by rank of the input.
        training: the mode that the functions were recorded in.
        input_name: name of the forward's first parameter.
        ready: asked by dynamo while tracing: whether stacks and parameters still are the same memory.
        trainable: asked by dynamo while tracing: whether any parameter of the block wants a gradient.
    """

    def __init__(
        self, block: nn.Module, form: ExpertForm, programs: Mapping[int, Program], renew: Callable[[nn.Module], str]
    ) -> None:
        self.programs: dict[int, Callable[..., Any]] = {rank: program.run for rank, program in programs.items()}
        self.training = block.training
        self.input_name = _first_parameter(block)
        self.renew = renew
        self.w13, self.w2, self.b13, self.b2 = _stack(block, form)
        self._places = _places(form, self)
        self._owner = form.down.paths[0]
        self._made_for = _dtype_and_device(block, self._owner)
        self.ready, self.trainable = _questions(block)

    @property
    def nbytes(self) -> int:
        """Size of the stacks."""
        return sum(stack.nbytes for stack in self.stacks())

    def stacks(self) -> list[nn.Parameter]:
        """The stacks there are."""
        return [stack for name in _STACKS if (stack := getattr(self, name)) is not None]

    def adopt(self, block: nn.Module) -> None:
        """Make the block's parameters views of the stacks; each old storage is released at once."""
        for path, place in self._places.items():
            block.get_parameter(path).data = place

    def is_current(self, block: nn.Module) -> bool:
        """Whether the block's parameters still are the stacks' memory, dtype and device."""
        if _dtype_and_device(block, self._owner) != self._made_for:
            return False
        parameters = ((block.get_parameter(path), place) for path, place in self._places.items())
        return all(p.data_ptr() == place.data_ptr() and p.shape == place.shape for p, place in parameters)


class PreparedBlock(nn.Module):
    """Mixed into a prepared block's class: the generated function for ``moe_ascend``, the block's own forward else."""

    _moe_fx: Preparation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The generated function while dynamo traces for ``moe_ascend``, else the original forward."""
        if torch.compiler.is_dynamo_compiling() and tracing_for_moe_ascend():
            preparation = self._moe_fx
            x = args[0] if args else kwargs.get(preparation.input_name)
            if len(args) + len(kwargs) == 1 and x is not None and x.dim() in preparation.programs:
                wants_gradient = torch.is_grad_enabled() and (x.requires_grad or preparation.trainable())
                if not wants_gradient and self.training == preparation.training and preparation.ready():
                    return preparation.programs[x.dim()](self, x)
        return super().forward(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare again after ``.to()``, ``.half()``, ``.cuda()``, which give every parameter memory of its own."""
        result = super()._apply(*args, **kwargs)
        refresh(self)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the unprepared class: their parameters have memory of their own."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, (cls, *rest), state, *others = reduced
        state = {key: kept for key, kept in state.items() if key != ATTRIBUTE}
        hooks = state["_load_state_dict_post_hooks"]
        state["_load_state_dict_post_hooks"] = type(hooks)((k, h) for k, h in hooks.items() if h is not _after_load)
        return (make, (_original(cls), *rest), state, *others)


def install(block: nn.Module, preparation: Preparation) -> None:
    """Put a verified preparation in place."""
    preparation.adopt(block)
    setattr(block, ATTRIBUTE, preparation)
    block.__class__ = _prepared_class(type(block))
    block.register_load_state_dict_post_hook(_after_load)
    for stack in preparation.stacks():
        # As parameters are: neither symbolic in shape nor copied into a CUDA graph's own memory.
        torch._dynamo.mark_static(stack)
        torch._dynamo.mark_static_address(stack)


def uninstall(block: nn.Module) -> None:
    """Give the block its class back; its parameters stay views of the stacks."""
    block.__class__ = _original(type(block))
    delattr(block, ATTRIBUTE)
    hooks = block._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]


def is_prepared(block: nn.Module) -> bool:
    """Whether the block carries a preparation."""
    return isinstance(block, PreparedBlock)


def refresh(block: nn.Module) -> None:
    """Prepare the block again if its parameters left the stacks; warn if that is impossible."""
    preparation: Preparation = getattr(block, ATTRIBUTE)
    if preparation.is_current(block):
        return
    uninstall(block)
    failure = preparation.renew(block)
    if failure:
        warnings.warn(
            f"moe_fx.prepare: a {type(block).__name__} was moved or reloaded and is no longer prepared ({failure});"
            " call moe_fx.prepare(model) again once its weights are in place.",
            MoeFxWarning,
            stacklevel=2,
        )


def _after_load(block: nn.Module, incompatible_keys: Any) -> None:
    """After ``load_state_dict``: with ``assign=True`` the parameters are other tensors now."""
    if is_prepared(block):
        refresh(block)


@functools.cache
def _prepared_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (PreparedBlock, cls), names)


def _original(cls: type) -> type:
    """The class that a prepared class was made of."""
    return cls.__bases__[1]


def _first_parameter(block: nn.Module) -> str:
    code = type(block).forward.__code__
    return code.co_varnames[1] if code.co_argcount > 1 else ""


def _dtype_and_device(block: nn.Module, path: str) -> tuple[torch.dtype, torch.device]:
    parameter = block.get_parameter(path)
    return parameter.dtype, parameter.device


def _stack(block: nn.Module, form: ExpertForm) -> list[nn.Parameter | None]:
    """Copies of the experts' weights as ``[w13, w2, b13, b2]``; the block is not touched."""
    if form.gate.stacked:
        return [None, None, None, None]
    upper, upper_biases = [form.gate, form.up], [form.gate_bias, form.up_bias]
    return [_concatenated(block, slots) for slots in (upper, [form.down], upper_biases, [form.down_bias])]


def _concatenated(block: nn.Module, slots: Sequence[Slot | None]) -> nn.Parameter | None:
    """``[E, sum of rows, ...]`` of one or two slots."""
    present = [slot for slot in slots if slot is not None]
    if not present:
        return None
    firsts = [block.get_parameter(slot.paths[0]) for slot in present]
    rows = sum(first.shape[0] for first in firsts)
    with torch.no_grad():
        stack = firsts[0].new_empty((present[0].n_experts, rows, *firsts[0].shape[1:]))
        begin = 0
        for slot, first in zip(present, firsts, strict=True):
            for e, path in enumerate(slot.paths):
                stack[e, begin : begin + first.shape[0]].copy_(block.get_parameter(path))
            begin += first.shape[0]
    # A Parameter, since dynamo keeps those static; never registered, so that no one else sees it.
    return nn.Parameter(stack, requires_grad=False)


def _places(form: ExpertForm, stacks: Preparation) -> dict[str, torch.Tensor]:
    """For every expert parameter the part of a stack that it becomes a view of."""
    places: dict[str, torch.Tensor] = {}
    for stack, slots in (
        (stacks.w13, (form.gate, form.up)),
        (stacks.w2, (form.down,)),
        (stacks.b13, (form.gate_bias, form.up_bias)),
        (stacks.b2, (form.down_bias,)),
    ):
        if stack is None:
            continue
        present = [slot for slot in slots if slot is not None]
        for slot, part in zip(present, stack.detach().chunk(len(present), dim=1), strict=True):
            places |= {path: part[e] for e, path in enumerate(slot.paths)}
    return places


def _questions(block: nn.Module) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """``ready`` and ``trainable``, which dynamo runs as they are while tracing and takes as constants."""
    reference = weakref.ref(block)

    @torch.compiler.assume_constant_result
    def ready() -> bool:
        current = reference()
        if current is not None and getattr(current, ATTRIBUTE).is_current(current):
            return True
        warnings.warn(
            f"moe_ascend: the experts of a {type(current).__name__} were replaced after moe_fx.prepare stacked them, so"
            " the block runs as it was written; call moe_fx.prepare(model) again.",
            MoeFxWarning,
            stacklevel=2,
        )
        return False

    @torch.compiler.assume_constant_result
    def trainable() -> bool:
        current = reference()
        return current is not None and any(p.requires_grad for p in current.parameters())

    return ready, trainable
