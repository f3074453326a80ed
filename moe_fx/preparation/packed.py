"""Putting packed experts in a model's place: the weights are gone, the module's forward runs the engine's op.

The module's class becomes a subclass of itself. Eager code, ``moe_ascend`` and every other backend run the same op,
``torch.ops.moe_fx_cpu.experts_packed``; the packed weights are a buffer that state_dicts leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_fx.errors import UnsupportedError
from moe_fx.preparation.experts_module import ModuleForm

# The module's buffer that holds its packed experts, and its attribute that says what to do with them.
PACKED = "moe_fx_packed"
FORM = "_moe_fx_form"


@dataclass(frozen=True)
class PackedForm:
    """How a module runs its packed experts.

    Attributes:
        experts: attributes of ``moe_fx.experts`` that were read of the module, layout included.
        attributes: of ``experts_packed``.
        call: for a module of experts: how its forward is called.
        programs: for a block: its function by rank of the input.
        dtype: for a block: the dtype that the functions were recorded in.
        input_name: for a block: name of its forward's first parameter.
    """

    experts: Mapping[str, Any]
    attributes: Mapping[str, Any]
    call: ModuleForm | None = None
    programs: Mapping[int, Callable[..., Any]] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    input_name: str = ""


def packed_attributes(experts: Mapping[str, Any], label: str, dynamic: bool) -> dict[str, Any]:
    """Attributes of ``experts_packed`` for those of ``experts``; how weights were stored matters no more."""
    kept = {key: given for key, given in experts.items() if key not in ("layout", "transposed")}
    return kept | {"packed_as": label} | ({"dynamic_activations": True} if dynamic else {})


class PackedModule(nn.Module):
    """What both kinds of modules with packed experts share."""

    _moe_fx_form: PackedForm
    moe_fx_packed: torch.Tensor

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Packed weights serve the host's engine: they stay where and what they are when the model is moved."""
        packed = self._buffers.pop(PACKED)
        try:
            return super()._apply(*args, **kwargs)
        finally:
            self._buffers[PACKED] = packed

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither pickled nor copied."""
        raise TypeError(
            f"a {type(self).__name__} with packed experts cannot be copied or pickled; save its experts with "
            "moe_fx.save_packed(model, path) and load them into a new model with moe_fx.load_packed"
        )


class PackedExperts(PackedModule):
    """Mixed into the class of a module of experts: forward(tokens, expert ids, routing weights), in its own order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts' weighted sum."""
        form = self._moe_fx_form
        call = form.call
        assert call is not None
        given = dict(zip(call.names, args, strict=False))
        given.update(kwargs)
        x, weights, ids = given[call.x], given[call.weights], given[call.ids]
        if call.x_dtype is not None:
            x = x.to(call.x_dtype)
        if call.weights_dtype is not None:
            weights = weights.to(call.weights_dtype)
        return torch.ops.moe_fx_cpu.experts_packed.default(x, weights, ids, self.moe_fx_packed, **form.attributes)


class PackedBlock(PackedModule):
    """Mixed into the class of a whole block: forward(hidden states), as the functions that were recorded of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returned before, its experts packed."""
        form = self._moe_fx_form
        x = args[0] if args else kwargs.get(form.input_name)
        if len(args) + len(kwargs) != 1 or x is None or x.dim() not in form.programs or x.dtype != form.dtype:
            raise UnsupportedError(
                f"this block was prepared for hidden states of rank {sorted(form.programs)} in {form.dtype} alone; "
                "bring the model into the dtype that it will run in before moe_fx.prepare(model, quantize=...)"
            )
        return form.programs[x.dim()](self, x)


def install_packed(
    module: nn.Module, form: PackedForm, packed: torch.Tensor, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Let ``module`` run ``packed``, and release the memory of the parameters that these replace."""
    for path, parameter in parameters.items():
        owner_path, _, name = path.rpartition(".")
        if parameter.device.type == "meta":
            empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype, device="cpu"), requires_grad=False)
            setattr(module.get_submodule(owner_path), name, empty)
        else:
            # Whoever else holds the parameter lets go of its memory, too.
            parameter.requires_grad_(False).data = parameter.data.new_empty(0)
    setattr(module, FORM, form)
    module.register_buffer(PACKED, packed, persistent=False)
    # As parameters are: neither symbolic in shape nor copied.
    torch._dynamo.mark_static(packed)
    torch._dynamo.mark_static_address(packed)
    module.__class__ = _packed_class(PackedExperts if form.call is not None else PackedBlock, type(module))


def is_packed(module: nn.Module) -> bool:
    """Whether the module's experts are packed."""
    return isinstance(module, PackedModule)


@functools.cache
def _packed_class(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), names)
