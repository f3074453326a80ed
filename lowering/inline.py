"""Put a traced function in a node's place: how a target spells a canonical op in other ops of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def inline(
    gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any], operands: Sequence[fx.Node | None], **static: Any
) -> None:
    """Replace ``node`` by the ATen-level ops of ``function(*operands, **static)``, traced on the operands' FakeTensors.

    Args:
        operands: nodes before ``node``, None for an absent one.
        static: passed on as they are; no tensors.

    The function returns what the node returns: one tensor, or a tuple, whose ``getitem`` users are replaced one by one.
    Sizes stay symbolic. New nodes take over the node's source line and module.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [operand for operand in operands if operand is not None]
    fakes = [operand.meta["val"] for operand in inputs]

    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return function(*(None if operand is None else next(given) for operand in operands), **static)

    mode = torch._guards.detect_fake_mode(fakes)
    with mode or torch.no_grad(), torch.no_grad():
        traced = make_fx(call)(*fakes)
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(traced.graph, copies)
    for copy in copies.values():
        for key in ("stack_trace", "nn_module_stack"):
            if copy not in inputs and key in node.meta:
                copy.meta[key] = node.meta[key]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        assert isinstance(result, (tuple, list))
        for user in list(node.users):
            assert user.target is operator.getitem and isinstance(user.args[1], int)
            replacement = result[user.args[1]]
            assert isinstance(replacement, fx.Node)
            user.replace_all_uses_with(replacement)
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
