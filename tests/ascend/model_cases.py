"""Tiny models of real families for ``npu:0``, and which experts a run of them chose."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from moe_families import FAMILIES, token_ids

NAMES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "minimax_m2", "afmoe", "gpt_oss")
# npu_moe_gating_top_k wants groups of more than two experts.
EXPERTS = 16
# npu_grouped_matmul_finalize_routing wants 256 columns.
HIDDEN_INT8, EXPERTS_INT8 = 256, 6


def build(
    name: str, dtype: torch.dtype = torch.float32, *, attention: str = "eager", **overrides: Any
) -> torch.nn.Module:
    """A seeded model; its attention is matmuls and a softmax unless told."""
    family = dataclasses.replace(FAMILIES[name], attention=attention)
    sizes = dict(num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS)
    return family.build(dtype=dtype, **{**sizes, **overrides})


def inputs(batch: int = 2, length: int = 6) -> torch.Tensor:
    """Token ids [batch, length] on the CPU."""
    return token_ids(batch, length)


def quantised(n_experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 weights [E, N, K] and their scales [E, N]."""
    weight = torch.randint(-127, 128, (n_experts, rows, columns), dtype=torch.int8)
    return weight, (torch.rand(n_experts, rows) + 0.5) / (64 * columns**0.5)


class Int8Layer(torch.nn.Module):
    """A router and its int8 experts with int8 activations, with a residual."""

    def __init__(self, inner: int = 48) -> None:
        super().__init__()
        self.register_buffer("gate", torch.randn(EXPERTS_INT8, HIDDEN_INT8).bfloat16())
        w13, w2 = quantised(EXPERTS_INT8, 2 * inner, HIDDEN_INT8), quantised(EXPERTS_INT8, HIDDEN_INT8, inner)
        for name, tensor in zip(("w13", "s13", "w2", "s2"), (*w13, *w2), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.ops.moe_fx.route(x @ self.gate.t(), None, top_k=2, renormalize="eps")
        y: torch.Tensor = torch.ops.moe_fx.experts_int8(
            x, weights, ids, self.w13, self.s13, self.w2, self.s2, dynamic_activations=True
        )
        return x + y


class Routed(torch.nn.Module):
    """A model that also returns which experts each token went to: the ids [T, k] that each layer's experts were given.

    Compiled, the ids come out of the graph that computes with them, in whichever mode and on whichever machine.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self._ids: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _, ids, _ = args
        self._ids.append(ids)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, S, V], and the ids of each layer with experts."""
        self._ids = []
        logits = self.model(tokens, use_cache=False).logits
        return logits, self._ids


def rerouted(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> int:
    """How many tokens, counted in each layer, went to another set of experts in one run than in the other."""
    pairs = zip(found, wanted, strict=True)
    sets = [[ids.cpu().long().sort(-1)[0] for ids in pair] for pair in pairs]
    return sum(int((one != other).any(-1).sum()) for one, other in sets)
