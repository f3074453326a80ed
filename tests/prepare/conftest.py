"""MoE blocks as people write them, with loops over experts that dynamo cannot capture, and a way to compile them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INTER, EXPERTS, TOP_K = 32, 24, 8, 2


class GatedMlp(nn.Module):
    """Three projections under names of one's own."""

    def __init__(self, inter: int = INTER, bias: bool = False, act: nn.Module | None = None) -> None:
        super().__init__()
        self.act = act or nn.SiLU()
        self.lift = nn.Linear(HIDDEN, inter, bias=bias)
        self.drop = nn.Linear(inter, HIDDEN, bias=bias)
        self.door = nn.Linear(HIDDEN, inter, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.lift(x) * self.act(self.door(x)))


class MergedMlp(nn.Module):
    """Gate and up in one projection, tanh-gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, 2 * INTER)
        self.fc2 = nn.Linear(INTER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(gate, approximate="tanh") * up)


class PlainMlp(nn.Module):
    """No gate, squared relu."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, INTER, bias=False), nn.Linear(INTER, HIDDEN, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](F.relu(self.layers[0](x)).square())


class MaskedLoop(nn.Module):
    """Mixtral's shape: one-hot mask, ``torch.where`` per expert, ``index_add_``; returns the router's logits too."""

    def __init__(self, make: Callable[[], nn.Module] = GatedMlp, n_experts: int = EXPERTS) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, n_experts, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(n_experts))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x)

    def combine(self, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return output * weight

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, width = hidden.shape
        tokens = hidden.view(-1, width)
        logits = self.scores(tokens)
        weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), TOP_K, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden.dtype)
        out = torch.zeros((batch * length, width), dtype=hidden.dtype, device=hidden.device)
        mask = F.one_hot(ids, num_classes=len(self.experts)).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, row = torch.where(mask[e])
            found = self.combine(expert(tokens[None, row].reshape(-1, width)), weights[row, slot, None])
            out.index_add_(0, row, found.to(hidden.dtype))
        return out.reshape(batch, length, width), logits


class HitLoop(nn.Module):
    """Loops only over experts that were hit; any rank of input; a sigmoid-gated shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MergedMlp() for _ in range(EXPERTS))
        self.common = GatedMlp(inter=40)
        self.common_gate = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = torch.topk(self.router(tokens).softmax(-1), TOP_K)
        out = torch.zeros_like(tokens)
        for e in ids.unique().tolist():
            row, slot = (ids == e).nonzero(as_tuple=True)
            out[row] += self.experts[e](tokens[row]) * weights[row, slot].unsqueeze(-1)
        out = out + torch.sigmoid(self.common_gate(tokens)) * self.common(tokens)
        return out.view(hidden.shape)


class BiasedGroups(nn.Module):
    """DeepSeek-V3's shape: fp32 sigmoid router with a selection bias and groups, guarded loop, shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) * 0.2)
        self.register_buffer("correction", torch.randn(EXPERTS) * 0.1)
        self.experts = nn.ModuleList(GatedMlp() for _ in range(EXPERTS))
        self.shared = GatedMlp(inter=INTER * 2)

    def select(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.view(-1, HIDDEN)
        scores = F.linear(tokens.float(), self.weight.float()).sigmoid()
        choice = scores + self.correction.unsqueeze(0)
        group_scores = choice.view(-1, 4, EXPERTS // 4).topk(2, dim=-1)[0].sum(dim=-1)
        best = torch.topk(group_scores, k=2, dim=-1, sorted=False)[1]
        keep = torch.zeros_like(group_scores).scatter_(1, best, 1)
        keep = keep.unsqueeze(-1).expand(-1, 4, EXPERTS // 4).reshape(-1, EXPERTS)
        ids = torch.topk(choice.masked_fill(~keep.bool(), 0.0), k=TOP_K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
        return ids, weights

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        ids, weights = self.select(hidden)
        tokens = hidden.view(-1, HIDDEN)
        out = torch.zeros_like(tokens, dtype=weights.dtype)
        mask = F.one_hot(ids, num_classes=len(self.experts)).permute(2, 0, 1)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(mask[e])
            if row.numel() > 0:
                out.index_add_(0, row, expert(tokens[row]) * weights[row, slot].unsqueeze(-1))
        return out.type(hidden.dtype).view(hidden.shape) + self.shared(hidden)


class SortedSplit(nn.Module):
    """DeepSeek-V2's shape: sort pairs by expert, split with ``tolist``, concatenate, weigh at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(PlainMlp() for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.view(-1, HIDDEN)
        weights, ids = torch.topk(self.router(tokens).softmax(-1), TOP_K)
        order = ids.view(-1).argsort()
        counts = F.one_hot(ids, EXPERTS).sum((0, 1)).tolist()
        begin, outputs = 0, []
        for e, count in enumerate(counts):
            if count:
                outputs.append(self.experts[e](tokens[order[begin : begin + count] // TOP_K]))
                begin += count
        pairs = torch.cat(outputs)
        restored = torch.empty_like(pairs)
        restored[order] = pairs
        return (restored.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view(hidden.shape)


class StackedLoop(nn.Module):
    """3-D parameters stored [in, out], biases, a loop over hit experts, the weight on the expert's input."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTER) * 0.2)
        self.b_in = nn.Parameter(torch.randn(EXPERTS, 2 * INTER) * 0.1)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) * 0.2)
        self.b_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN) * 0.1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, HIDDEN)
        top, ids = torch.topk(self.router(tokens), TOP_K, dim=-1)
        weights = torch.sigmoid(top.float()).to(top.dtype)
        out = torch.zeros_like(tokens)
        hit = F.one_hot(ids, EXPERTS).sum((0, 1)).nonzero()
        for e in hit:
            e = e[0]
            row, slot = torch.where(ids == e)
            rows = tokens[row] * weights[row, slot, None]
            gate_up = rows @ self.w_in[e] + self.b_in[e]
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            out.index_add_(0, row, (F.silu(gate) * up) @ self.w_out[e] + self.b_out[e])
        return out.reshape(hidden.shape)


class OntoShared(nn.Module):
    """The experts' results are added onto the shared expert's instead of zeros; split 3-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) * 0.2)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) * 0.2)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTER) * 0.2)
        self.shared = GatedMlp()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(self.router(tokens).softmax(-1), TOP_K)
        out = self.shared(tokens)
        for e in range(EXPERTS):
            row, slot = torch.where(ids == e)
            found = F.linear(F.gelu(F.linear(tokens[row], self.w1[e])) * F.linear(tokens[row], self.w3[e]), self.w2[e])
            out.index_add_(0, row, found * weights[row, slot, None])
        return out


class Model(nn.Module):
    """A few blocks between norms; the blocks' first results are chained."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            found = block(self.norm(x))
            x = x + (found[0] if isinstance(found, tuple) else found)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts from the same weights and with nothing compiled."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def zoo() -> SimpleNamespace:
    """The classes above, by name."""
    return SimpleNamespace(**{k: v for k, v in globals().items() if isinstance(v, type) and issubclass(v, nn.Module)})


@pytest.fixture
def fused() -> Callable[..., tuple[Callable[..., Any], list[Any]]]:
    """``(compiled model, reports)`` under moe_ascend, in one graph and without a downstream compiler."""

    def compile_model(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[Any]]:
        reports: list[Any] = []
        options = {"downstream": "eager", "report": reports.append, **options}
        return torch.compile(model, backend="moe_ascend", fullgraph=True, options=options), reports

    return compile_model


@pytest.fixture
def count_experts() -> Callable[[Any], int]:
    """How many ``moe_fx.experts`` a graph's report has."""

    def count(report: Any) -> int:
        return sum("moe_fx.experts" in str(node.target) for node in report.graph.graph.nodes)

    return count
