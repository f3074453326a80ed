"""What the target decided about one canonical node: the operators that will run it, or why none of them does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

# Replaces the node in its graph.
Rewrite = Callable[[fx.GraphModule, fx.Node], None]


class Refused(Exception):
    """No operator of torch_npu computes this node as the canonical op says; the message is the reason in words."""


@dataclass(frozen=True)
class Choice:
    """How a node is lowered.

    Attributes:
        kernel: what runs it, for people.
        rewrite: puts that into the graph.
    """

    kernel: str
    rewrite: Rewrite


def require(condition: bool, reason: str) -> None:
    """Refuse the node with ``reason`` unless the condition holds."""
    if not condition:
        raise Refused(reason)
