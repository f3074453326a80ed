"""A pass of your own, from outside the package, for one compilation only.

python examples/own_pass.py
"""

import torch
from torch import nn

import moe_fx
from moe_fx.passes.graph import aten, is_op


class FuseScaledSiluPass(moe_fx.Pass):
    """x * sigmoid(x) to silu(x).

    Unfused::

        y = x * sigmoid(x)

    Fused::

        y = silu(x)
    """

    name = "fuse_silu"
    level = moe_fx.Level.TOLERANCE

    def run(self, ctx: moe_fx.MatchContext) -> None:
        for node in ctx.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            x, gate = node.args
            if not is_op(gate, aten.sigmoid):
                continue
            if gate.args[0] is not x:
                ctx.missed("silu", node, moe_fx.Miss("the gate is the sigmoid of another tensor", gate))
                continue
            silu = ctx.emit(aten.silu.default, (x,), like=node)
            ctx.replace(node, silu)
            ctx.matched("silu", node, silu, form="x * sigmoid(x)", replaced=[node])
        ctx.finish_pass()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return h * torch.sigmoid(h) + h * torch.sigmoid(h + 1)


print(moe_fx.explain(Model(), torch.randn(3, 16), options={"extra_passes": [FuseScaledSiluPass()]}))
