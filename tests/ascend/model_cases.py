"""Tiny models of real families on ``npu:0`` of the stand-in, and which experts each run selected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from host_cann import ge_ops
from moe_families import FAMILIES, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "minimax_m2", "afmoe", "gpt_oss")
# npu_moe_gating_top_k wants groups of more than two experts.
EXPERTS = 16
# npu_grouped_matmul_finalize_routing wants 256 columns.
HIDDEN_INT8, EXPERTS_INT8 = 256, 6


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    """A seeded model; attention is plain matmuls, since torch_npu's fused one has no GE converter."""
    family = dataclasses.replace(FAMILIES[name], attention="eager")
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


class RecordTopK(TorchDispatchMode):
    """Records the ids of every top-k over all experts: what the eager model selects."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Group stages rank experts of a group, in three dimensions.
        if func is torch.ops.aten.topk.default and args[0].dim() == 2 and args[0].shape[-1] == EXPERTS:
            self.ids.append(result[1])
        return result


@contextmanager
def recorded_gating(monkeypatch: Any) -> Iterator[list[torch.Tensor]]:
    """The ids that gating operators select in GE graphs and in eager kernels."""
    found: list[torch.Tensor] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            found.append(result[1])
            return result

        return record

    for kind in ("MoeGatingTopKSoftmax", "MoeGatingTopKSoftmaxV2", "MoeGatingTopK"):
        monkeypatch.setitem(ge_ops.OPERATORS, kind, recording(ge_ops.OPERATORS[kind]))
    yield found


def same_sets(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether both runs selected the same experts for every token of every layer."""
    sets = [[ids.long().reshape(-1, ids.shape[-1]).sort(-1)[0] for ids in run] for run in (found, wanted)]
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(*sets, strict=True))
