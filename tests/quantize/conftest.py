"""Modules of stacked experts as libraries write them, blocks that loop over lists of experts, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INTER, EXPERTS, TOP_K = 64, 32, 6, 2


class StackedExperts(nn.Module):
    """Experts over 3-D weights, in a form that dynamo captures; parameters have names of their own."""

    def __init__(self, hidden: int = HIDDEN, inter: int = INTER, n_experts: int = EXPERTS) -> None:
        super().__init__()
        self.lift = nn.Parameter(torch.randn(n_experts, 2 * inter, hidden) * hidden**-0.5)
        self.drop = nn.Parameter(torch.randn(n_experts, hidden, inter) * inter**-0.5)

    def activated(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        top_k = chosen.shape[-1]
        ids = chosen.reshape(-1)
        rows = tokens.repeat_interleave(top_k, dim=0).unsqueeze(-1)
        h = self.activated(torch.bmm(self.lift[ids], rows).squeeze(-1))
        out = torch.bmm(self.drop[ids], h.unsqueeze(-1)).squeeze(-1) * share.reshape(-1, 1)
        return out.view(tokens.shape[0], top_k, -1).sum(dim=1)


class Linears(nn.Module):
    """One expert of three Linears."""

    def __init__(self, hidden: int = HIDDEN, inter: int = INTER) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, inter, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LoopBlock(nn.Module):
    """A router and a Python loop over a list of experts."""

    def __init__(self, hidden: int = HIDDEN, inter: int = INTER) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Linears(hidden, inter) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class Layer(nn.Module):
    """A router in front of stacked experts."""

    def __init__(self, experts: nn.Module, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights)


class Model(nn.Module):
    """Layers one after another, each added to what it takes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
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
def routed() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``(tokens, ids, weights)`` for a module of experts."""

    def make(tokens: int, hidden: int = HIDDEN, n_experts: int = EXPERTS, dtype: torch.dtype = torch.bfloat16):
        ids = torch.stack([torch.randperm(n_experts)[:TOP_K] for _ in range(tokens)])
        return torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, TOP_K).to(dtype)

    return make
