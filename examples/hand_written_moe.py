"""A hand-written MoE with a Python loop over its experts: prepare it once, then compile it as usual.

Dynamo cannot put a data-dependent loop into a graph. ``moe_fx.prepare`` reads what the block computes, checks it
against the block itself, and gives the compiler (and only the compiler) a form that it can capture.

    python examples/hand_written_moe.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import moe_fx


class Expert(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, intermediate, bias=False)
        self.w3 = nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoe(nn.Module):
    def __init__(self, hidden: int = 128, intermediate: int = 256, n_experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(n_experts))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=-1, dtype=torch.float), self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                y[token] += weights[token, slot, None] * expert(x[token])
        return y


model = SparseMoe().eval()
x = torch.randn(10, 128)

print(moe_fx.prepare(model))
with torch.no_grad():
    y = torch.compile(model, backend="moe_ascend", fullgraph=True)(x)
    print(f"largest difference from eager: {(y - model(x)).abs().max():.1e}")
