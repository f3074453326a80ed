"""One expert's matrices as the packer takes them, wherever and however a model stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from moe_fx.lowering.ops.activation import split_gate_up
from moe_fx.preparation.recognise import ExpertForm
from moe_fx.preparation.weights import Slot

Pick = Callable[[int], torch.Tensor]


class Matrices(Protocol):
    """Floating-point weights, expert by expert."""

    gated: bool
    biases: bool

    def weight(self, expert: int, projection: str) -> torch.Tensor:
        """The ``gate``, ``up`` or ``down`` projection's weight [outputs, inputs]."""
        ...

    def bias(self, expert: int, projection: str) -> torch.Tensor | None:
        """Its bias [outputs], if it has one."""
        ...


class ModelMatrices:
    """The weights of a model, read where they are.

    Attributes:
        n_experts, hidden, intermediate: E, H and I.
        layout: of gate and up in one parameter; see ``moe_fx.experts``.
        gated: whether there is an up projection.
        biases: whether any projection has a bias.
        dtype: of the weights.
        nbytes: of all of them.
        parameters: every parameter that holds some, by its path in the block.
    """

    def __init__(
        self,
        n_experts: int,
        picks: Mapping[str, Pick],
        layout: str,
        transposed: bool,
        parameters: Mapping[str, nn.Parameter],
        slots: Mapping[str, Slot] | None = None,
    ) -> None:
        self._slots = slots or {}
        self._picks, self.layout, self._transposed = picks, layout, transposed
        self.n_experts = n_experts
        self.gated = layout != "none"
        self.biases = "b13" in picks or "b2" in picks
        self.parameters = dict(parameters)
        self.nbytes = sum(p.numel() * p.element_size() for p in self.parameters.values())
        down = self.weight(0, "down")
        self.hidden, self.intermediate = down.shape
        self.dtype = down.dtype

    @classmethod
    def of_operands(
        cls, module: nn.Module, n_experts: int, operands: Mapping[str, str], layout: str, transposed: bool
    ) -> ModelMatrices:
        """Stacked parameters ``operands[role]`` of a module; roles are the operands of ``moe_fx.experts``."""
        parameters = {name: module.get_parameter(name) for name in operands.values()}
        picks = {role: _of_stack(parameters[name]) for role, name in operands.items()}
        return cls(n_experts, picks, layout, transposed, parameters)

    @classmethod
    def of_slots(cls, block: nn.Module, form: ExpertForm) -> ModelMatrices:
        """The parameters of a block that was read by its execution."""
        slots = dict(
            w13=form.gate, w3=form.up, w2=form.down, b13=form.gate_bias, b3=form.up_bias, b2=form.down_bias
        )  # fmt: skip
        present = {role: slot for role, slot in slots.items() if slot is not None}
        parameters = {path: block.get_parameter(path) for slot in present.values() for path in slot.paths}
        picks = {role: _pick(slot, parameters) for role, slot in present.items()}
        layout = "split" if form.up is not None else form.attributes["layout"]
        return cls(form.gate.n_experts, picks, layout, form.transposed, parameters, present)

    def weight(self, expert: int, projection: str) -> torch.Tensor:
        """See :class:`Matrices`; a view where rows are stored as rows."""
        role = self._role("w", projection)
        stored = self._picks[role](expert)
        matrix = stored.t() if self._transposed else stored
        return matrix if role != "w13" else self._part(matrix.t(), projection).t()

    def bias(self, expert: int, projection: str) -> torch.Tensor | None:
        """See :class:`Matrices`."""
        role = self._role("b", projection)
        if role not in self._picks:
            return None
        bias = self._picks[role](expert)
        return bias if role != "b13" else self._part(bias, projection)

    def module_of(self, expert: int, projection: str) -> str | None:
        """Path of the Linear that holds a projection's weight; None where experts are stacked in one parameter."""
        slot = self._slots.get(self._role("w", projection))
        return None if slot is None or slot.stacked else slot.paths[expert % slot.n_experts].rpartition(".")[0]

    def _role(self, kind: str, projection: str) -> str:
        if projection == "down":
            return f"{kind}2"
        return f"{kind}3" if projection == "up" and self.layout == "split" else f"{kind}13"

    def _part(self, merged: torch.Tensor, projection: str) -> torch.Tensor:
        """The gate's or the up projection's share of the last dimension."""
        if self.layout == "split":
            return merged
        gate, up = split_gate_up(merged, self.layout)
        if projection == "gate":
            return gate
        assert up is not None
        return up


def projections(gated: bool) -> tuple[str, ...]:
    """The projections that there are."""
    return ("gate", "up", "down") if gated else ("gate", "down")


def _pick(slot: Slot, parameters: Mapping[str, nn.Parameter]) -> Pick:
    if slot.stacked:
        return _of_stack(parameters[slot.paths[0]])
    return lambda expert: parameters[slot.paths[expert]].detach()


def _of_stack(parameter: nn.Parameter) -> Pick:
    # Not a method of a detached tensor, which would keep the memory alive once the parameter has let go of it.
    return lambda expert: parameter.detach()[expert]
