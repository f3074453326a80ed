"""The CPU target: every op goes back to Inductor in a form that it makes fast; other compilers run the references.

``experts`` has two such forms, by the number of tokens (``experts``); the other ops are composites, whose references
Inductor fuses as they are. A dedicated C++ engine takes its place here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moe_fx.lowering.cpu import experts
from moe_fx.lowering.targets import ReferenceTarget, canonical_name


class CpuTarget(ReferenceTarget):
    """See :class:`moe_fx.lowering.targets.Target`."""

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """See :class:`Target`."""
        form = _form(node, downstream)
        return super().kernel_for(node, downstream) if form is None else f"{downstream} ({form.__name__})"

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """See :class:`Target`."""
        for node in list(gm.graph.nodes):
            form = _form(node, downstream)
            if form is not None:
                experts.inline(gm, node, form)
        gm.graph.lint()
        gm.recompile()


def _form(node: fx.Node, downstream: str) -> Callable[..., torch.Tensor] | None:
    """How to spell an ``experts`` node; only Inductor keeps the gathered weights from being stored."""
    is_experts = canonical_name(node) == "experts"
    return experts.choose(node) if is_experts and downstream == "inductor" else None


TARGET = CpuTarget("cpu")
