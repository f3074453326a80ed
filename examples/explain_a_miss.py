"""A router with one odd step: explain names the predicate that failed and the line that wrote it.

python examples/explain_a_miss.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import moe_fx


class OddMoe(nn.Module):
    def __init__(self, hidden: int = 64, intermediate: int = 96, n_experts: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, n_experts, bias=False)
        self.w13 = nn.Parameter(torch.randn(n_experts, 2 * intermediate, hidden) * 0.1)
        self.w2 = nn.Parameter(torch.randn(n_experts, hidden, intermediate) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(scores.square(), 2, dim=-1)  # no router in the field squares its scores
        flat = ids.reshape(-1)
        h = torch.bmm(self.w13[flat], x.repeat_interleave(2, dim=0).unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        y = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(x.shape[0], 2, -1).sum(dim=1)


explanation = moe_fx.explain(OddMoe(), torch.randn(5, 64))
print(explanation)
for site in explanation.missed:
    print(f"missed: {site.kind} in {site.module or 'the model'}\n  why:   {site.reason}\n  where: {site.source}")
