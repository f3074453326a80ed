"""Targets: who runs the canonical ops. Each target is a leaf, loaded by name when a graph needs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import fx

from moe_fx.lowering.ops import CANONICAL_OPS

# Target name -> module that defines TARGET.
_MODULES = {
    "cpu": "moe_fx.lowering.cpu",
    "cuda": "moe_fx.lowering.cuda",
    "ascend": "moe_fx.lowering.ascend",
}
_TARGET_OF_DEVICE = {"cpu": "cpu", "cuda": "cuda", "npu": "ascend"}


class Target(Protocol):
    """What a target offers the pipeline."""

    name: str

    def configured(self, options: Any, mode: str | None = None) -> Target:
        """This target with the user's choices: the attributes of ``moe_fx.options.Options`` that bear its name.

        Args:
            mode: ``torch.compile``'s.
        """
        ...

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """Human-readable name of what will run a canonical node."""
        ...

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """Replace canonical nodes by the target's own ops, in place; what is left runs its reference."""
        ...


def load(name: str) -> Target:
    """The target of that name."""
    return importlib.import_module(_MODULES[name]).TARGET


def of_devices(values: Iterable[object]) -> str:
    """The target that serves the device of the given tensors (the first accelerator wins over the CPU)."""
    kinds = {v.device.type for v in values if isinstance(v, torch.Tensor)}
    for kind in sorted(kinds - {"cpu"}):
        if kind in _TARGET_OF_DEVICE:
            return _TARGET_OF_DEVICE[kind]
    return "cpu"


def canonical_name(node: fx.Node) -> str | None:
    """The canonical op a node calls, or None."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "moe_fx":
        name = node.target._schema.name.split("::")[1]
        return name if name in CANONICAL_OPS else None
    return None


class ReferenceTarget:
    """A target without kernels of its own: references run, and the downstream compiler fuses the composite ones."""

    def __init__(self, name: str) -> None:
        self.name = name

    def configured(self, options: Any, mode: str | None = None) -> Target:
        """See :class:`Target`; there is nothing to choose."""
        return self

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """See :class:`Target`."""
        name = canonical_name(node)
        if name is None:
            return downstream
        composite = CANONICAL_OPS[name].fake is None
        return f"{downstream} (fused reference)" if composite and downstream != "eager" else "reference"

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """See :class:`Target`."""
