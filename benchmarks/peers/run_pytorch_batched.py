"""PyTorch's batched form under Inductor: every token's experts gathered, and one batched product per projection."""

from __future__ import annotations

import torch
from layer import Routed, Shape, Weights
from serving import Form, Layer, serve, stored_bytes

# Beyond, the form would gather gigabytes.
_MAX_TOKENS = 16


def _batched(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    tokens, top_k = ids.shape
    expert = ids.reshape(-1)
    rows = x.repeat_interleave(top_k, dim=0).unsqueeze(-1)
    gate, up = torch.bmm(w13[expert], rows).squeeze(-1).chunk(2, dim=-1)
    rows = torch.bmm(w2[expert], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (rows * weights.reshape(-1, 1)).view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


_compiled = torch.compile(_batched, dynamic=False)


def _bf16(weights: Weights, shape: Shape, threads: int) -> Layer:
    def call(operands: Routed) -> torch.Tensor:
        return _compiled(operands.x, operands.weights, operands.ids, weights.w13, weights.w2)

    return Layer(call, stored_bytes(shape, weights.w13, weights.w2))


if __name__ == "__main__":
    serve({"bf16": Form("bmm of gathered weights under Inductor", _bf16, _MAX_TOKENS)})
