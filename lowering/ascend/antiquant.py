"""Experts whose int8 or int4 weights ``npu_grouped_matmul`` widens as it reads them (W8A16, W4A16).

The operator computes ``x @ ((w + offset) * scale)``. It takes scales and offsets in x's dtype: scales kept in fp32 are
rounded to it, which the canonical ops' tolerances hold.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fx.lowering.ascend.experts import activated, grouped_matmul, run_routed


def widened(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_offset: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_offset: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    *,
    layout: str,
    act: str,
    alpha: float,
    limit: float | None,
    **routed: Any,
) -> torch.Tensor:
    """Experts [T, H] -> [T, H].

    Args:
        w13, w2: int8 [E, K, N], or int4 eight an int32 [E, K, N / 8].
        w13_scale, w13_offset, w2_scale, w2_offset: [E, N], or [E, G, N] for int4 in G groups along K; x's dtype.
        b13, b2: [E, N], fp32 for bf16 x.
        layout: of the first product: ``gate_up`` or ``none``.
        routed: see ``experts.run_routed``.
    """

    def project(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        def multiply(
            rows: torch.Tensor,
            weight: torch.Tensor,
            scale: torch.Tensor,
            offset: torch.Tensor,
            bias: torch.Tensor | None,
        ) -> torch.Tensor:
            return grouped_matmul(rows, weight, counts, bias, antiquant_scale=[scale], antiquant_offset=[offset])

        h = multiply(rows, w13, w13_scale, w13_offset, b13)
        return multiply(activated(h, layout, act, alpha, limit), w2, w2_scale, w2_offset, b2)

    return run_routed(x, weights, ids, w13.shape[0], project, **routed)
