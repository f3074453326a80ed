"""``attention``: softmax attention of queries over keys and values, with the key/value heads as the model stores them.

Why a canonical op, when PyTorch has one: models spell grouped-query attention in two ways around it (heads repeated in
memory, or ``enable_gqa``), and a kernel wants neither but the few heads themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

GQA = ("repeat", "native")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    gqa: str = "repeat",
) -> torch.Tensor:
    """``softmax(q @ k^T * scale + mask) @ v`` (Vaswani et al., 2017), without dropout.

    Args:
        q: [B, H, S, D] (bf16, fp16 or fp32).
        k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv] in q's dtype. Hkv divides H, and query head h reads key/value head
            ``h // (H / Hkv)`` (grouped-query attention, Ainslie et al., 2023).
        mask: broadcastable to [B, H, S, T]. Boolean: True is attended to; floating: added to the scaled products. A
            query with nothing to attend to gives zeros (since PyTorch 2.5).
        is_causal: query s attends to keys 0 to s, counted from the first key also where S and T differ. Only without
            a mask.
        scale: factor on ``q @ k^T``; default ``1 / sqrt(D)``.
        gqa: how the reference brings Hkv heads to H, with no effect on the result: ``repeat`` copies them (as
            ``repeat_kv`` of transformers' models), ``native`` leaves it to PyTorch (``enable_gqa=True``). Both keep
            the very ops that the model wrote, so that PyTorch picks the same kernel.

    Returns:
        [B, H, S, Dv] in q's dtype: what ``scaled_dot_product_attention`` gives. torch_npu's
        ``npu_fused_infer_attention_score`` computes the same from a boolean mask of the opposite sense.
    """
    native = gqa == "native"
    if not native:
        k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=native)


def _repeat_heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """[B, Hkv, T, D] as [B, n_heads, T, D], each head followed by its copies."""
    batch, n_kv, length, width = x.shape
    if n_kv == n_heads:
        return x
    copies = x[:, :, None].expand(batch, n_kv, n_heads // n_kv, length, width)
    return copies.reshape(batch, n_heads, length, width)


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    def case(n_kv: int, queries: int, keys: int, width: int = 16, v_width: int = 16) -> tuple[torch.Tensor, ...]:
        shapes = ((2, 4, queries, width), (2, n_kv, keys, width), (2, n_kv, keys, v_width))
        return tuple(torch.randn(*shape, generator=rng).to(dtype) for shape in shapes)

    allowed = torch.rand(2, 1, 5, 9, generator=rng) > 0.3
    allowed[:, :, :, 0] = True
    bias = torch.randn(2, 4, 5, 9, generator=rng).to(dtype)
    for gqa in GQA:
        for n_kv in (4, 2, 1):
            yield Sample(f"{gqa}-causal-Hkv{n_kv}", case(n_kv, 7, 7), dict(gqa=gqa, is_causal=True))
        yield Sample(f"{gqa}-mask", (*case(2, 5, 9), allowed), dict(gqa=gqa, scale=0.2))
        yield Sample(f"{gqa}-decode", (*case(2, 1, 9), allowed[:, :, :1]), dict(gqa=gqa))
    yield Sample("additive", (*case(4, 5, 9), bias))
    yield Sample("mla", case(4, 6, 6, width=24), dict(is_causal=True, scale=0.2))
    yield Sample("plain", case(2, 3, 8))


ATTENTION = CanonicalOp(
    name="attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, bool is_causal=False, float? scale=None,"
        " str gqa='repeat') -> Tensor"
    ),
    reference=attention,
    tolerance=uniform_tolerance(
        fp32=Tolerance(1e-5, 1e-5, 1e-6), half=Tolerance(2e-3, 4e-3, 2e-3), bf16=Tolerance(1.6e-2, 3e-2, 1e-2)
    ),
    samples=_samples,
).register()
