"""Hand-written MoE blocks: every way that engines and models spell routers and experts, on one set of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

E, K, H, I = 8, 2, 16, 24  # experts, selected, hidden, intermediate  # noqa: E741


class Weights(nn.Module):
    """Expert weights in all the layouts that the forms below read."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape) * 0.2).to(dtype))

        self.gate = weight(E, H)
        self.bias = weight(E)
        self.w1, self.w3, self.w2 = weight(E, I, H), weight(E, I, H), weight(E, H, I)
        self.w13 = weight(E, 2 * I, H)
        self.w13_t, self.w2_t = weight(E, H, 2 * I), weight(E, I, H)
        self.b13, self.b2 = weight(E, 2 * I), weight(E, H)


def softmax_router(m: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3-MoE's router: fp32 softmax, top-k, renormalise, cast."""
    weights, ids = torch.topk(F.softmax(x @ m.gate.t(), dim=-1, dtype=torch.float), K, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), ids


class Block(nn.Module):
    """A router and experts given as functions of (weights, ...)."""

    def __init__(self, experts: Callable[..., torch.Tensor], router: Callable[..., object] = softmax_router) -> None:
        super().__init__()
        self.weights = Weights()
        self.experts, self.router = experts, router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(self.weights, x)
        return self.experts(self.weights, x, weights, ids)


def sort_by_expert(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(permutation, offsets) as transformers' grouped_mm computes them."""
    experts, perm = torch.sort(ids.view(-1))
    return perm, torch.cumsum(torch.histc(experts.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)


def grouped(m: Weights, x, w, ids):
    """Sorted rows, merged gate/up, unsorted through the inverse permutation."""
    perm, offsets = sort_by_expert(ids)
    h = torch._grouped_mm(x[perm // K].bfloat16(), m.w13.bfloat16().transpose(-2, -1), offsets)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, m.w2.bfloat16().transpose(-2, -1), offsets)
    out = out * w.view(-1)[perm].unsqueeze(-1)
    inverse = torch.argsort(perm)
    return out[inverse].view(-1, K, H).sum(1).to(x.dtype)


def titan(m: Weights, x, w, ids):
    """torchtitan: three grouped products, scatter_add of the results."""
    flat = ids.view(-1)
    perm = torch.argsort(flat, stable=True)
    offsets = torch.cumsum(torch.histc(flat.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
    token = (perm // K).reshape(-1, 1).expand(-1, H)
    rows = torch.gather(x, 0, token).bfloat16()
    h = F.silu(torch._grouped_mm(rows, m.w1.bfloat16().transpose(-2, -1), offsets))
    h = h * torch._grouped_mm(rows, m.w3.bfloat16().transpose(-2, -1), offsets)
    out = torch._grouped_mm(h, m.w2.bfloat16().transpose(-2, -1), offsets).type_as(x)
    return torch.zeros_like(x).scatter_add(0, token, out * w.view(-1)[perm].reshape(-1, 1))


def batched(m: Weights, x, w, ids, activation=lambda gate, up: F.silu(gate) * up):
    """transformers' batched_mm."""
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    out = torch.bmm(m.w2[flat], activation(*h.chunk(2, -1)).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def expanded_rows(m: Weights, x, w, ids):
    """Tokens repeated by expand + reshape, weights applied after the view."""
    flat = ids.flatten()
    rows = x[:, None, :].expand(-1, K, -1).reshape(-1, H)
    gate, up = torch.bmm(m.w13[flat], rows.unsqueeze(2)).squeeze(2).chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.gelu(gate, approximate="tanh") * up).unsqueeze(2)).squeeze(2)
    return (out.view(-1, K, H) * w[..., None]).sum(1)


def index_add(m: Weights, x, w, ids):
    """Results added back by token index."""
    flat, token = ids.flatten(), torch.arange(x.shape[0]).repeat_interleave(K)
    gate, up = torch.bmm(m.w13[flat], x[token].unsqueeze(2)).squeeze(2).chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(2)).squeeze(2) * w.flatten()[:, None]
    return torch.zeros_like(x).index_add_(0, token, out)


def biased_interleaved(m: Weights, x, w, ids):
    """gpt-oss: [E, in, out] weights, interleaved gate/up, biases, clamped swiglu."""
    flat = ids.reshape(-1)
    h = torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), m.w13_t[flat]).squeeze(1) + m.b13[flat]
    gate, up = h[..., ::2].clamp(max=0.5), h[..., 1::2].clamp(-0.5, 0.5)
    h = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    out = torch.bmm(h.unsqueeze(1), m.w2_t[flat]).squeeze(1) + m.b2[flat]
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def relu_squared(m: Weights, x, w, ids):
    """Nemotron-H: no gate."""
    flat = ids.reshape(-1)
    h = F.relu(torch.bmm(m.w1[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)).square()
    out = torch.bmm(m.w2[flat], h.unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def weighted_input(m: Weights, x, w, ids):
    """The routing weight multiplies the rows that enter the experts."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(K, 0) * w.reshape(-1, 1)
    gate, up = torch.bmm(m.w13[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    return torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1).view(-1, K, H).sum(1)


def gathered_einsum(m: Weights, x, w, ids):
    """gpt-fast: gathered weights and einsums."""
    h = F.silu(torch.einsum("ti,taoi->tao", x, m.w1[ids])) * torch.einsum("ti,taoi->tao", x, m.w3[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", h, m.w2[ids]), w)


def gathered_matmul(m: Weights, x, w, ids):
    """Gathered weights with a slot dimension and broadcast matmuls."""
    gate, up = (m.w13[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
    out = (m.w2[ids] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.unsqueeze(-1)).sum(1)


def dense_bmm(m: Weights, x, w, ids):
    """All experts for all tokens, weighed by a scattered table, with biases."""
    table = x.new_zeros(x.shape[0], E).scatter_(1, ids, w)
    h = torch.bmm(x.repeat(E, 1).view(E, -1, H), m.w13_t) + m.b13[..., None, :]
    gate, up = h.chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, m.w2_t) + m.b2[..., None, :]
    return (out.view(E, -1, H) * table.transpose(0, 1).view(E, -1)[..., None]).sum(0)


def dense_einsum(m: Weights, x, w, ids):
    """The same through einsum and one-hot."""
    return dense_einsum_with(m, x, (F.one_hot(ids, E).to(x.dtype) * w.unsqueeze(-1)).sum(1))


def dense_einsum_with(m: Weights, x, table):
    """All experts, weighed by a [T, E] table."""
    h = F.silu(torch.einsum("ti,eoi->teo", x, m.w1)) * torch.einsum("ti,eoi->teo", x, m.w3)
    return (torch.einsum("teo,eio->tei", h, m.w2) * table.unsqueeze(-1)).sum(1)


def _expert(m: Weights, e: int, rows: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(rows, m.w1[e])) * F.linear(rows, m.w3[e]), m.w2[e])


def where_loop(m: Weights, x, w, ids):
    """transformers 4.5x: one_hot, where, index_add."""
    mask, y = F.one_hot(ids, E).permute(2, 1, 0), torch.zeros_like(x)
    for e in range(E):
        slot, token = torch.where(mask[e])
        rows = _expert(m, e, x[None, token].reshape(-1, H)) * w[token, slot, None]
        y.index_add_(0, token, rows.to(x.dtype))
    return y


def assigning_loop(m: Weights, x, w, ids):
    """Mistral-style: where(ids == e) and an indexed +=."""
    y = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        y[token] += w[token, slot, None] * _expert(m, e, x[token])
    return y


def masked_loop(m: Weights, x, w, ids):
    """Every expert for every token, weighed by a masked sum."""
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + _expert(m, e, x) * (w * (ids == e)).sum(-1, keepdim=True)
    return y


def scattered_loop(m: Weights, x, w, ids):
    """Every expert for every token, weighed by a column of a scattered table."""
    table, y = x.new_zeros(x.shape[0], E).scatter_(1, ids, w), torch.zeros_like(x)
    for e in range(E):
        y += _expert(m, e, x) * table[:, e, None]
    return y


# Form -> (experts function, the form explain reports).
FORMS = {
    "grouped": (grouped, "grouped_mm"),
    "titan": (titan, "grouped_mm"),
    "batched": (batched, "batched_mm"),
    "expanded_rows": (expanded_rows, "batched_mm"),
    "index_add": (index_add, "batched_mm"),
    "biased_interleaved": (biased_interleaved, "batched_mm"),
    "relu_squared": (relu_squared, "batched_mm"),
    "weighted_input": (weighted_input, "batched_mm"),
    "gathered_einsum": (gathered_einsum, "einsum"),
    "gathered_matmul": (gathered_matmul, "batched_mm"),
    "dense_bmm": (dense_bmm, "dense"),
    "dense_einsum": (dense_einsum, "dense"),
    "where_loop": (where_loop, "where loop"),
    "assigning_loop": (assigning_loop, "where loop"),
    "masked_loop": (masked_loop, "masked loop"),
    "scattered_loop": (scattered_loop, "masked loop"),
}
