"""``qk_norm_rope``: per-head or full-width RMSNorm of queries and keys, then rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fx.lowering.ops.norms import rms_norm
from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

NORMS = ("head", "full")
ROPES = ("half", "half_split", "interleaved", "interleaved_to_half", "interleaved_full")
LAYOUTS = ("bnsd", "bsnd")

SCHEMA = (
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, *,"
    " Tensor? q_bias=None, Tensor? k_bias=None, str norm='head', str cast='before', float offset=0.0,"
    " str rope='half', ScalarType? rope_dtype=None, str layout='bnsd') -> (Tensor q_out, Tensor k_out)"
)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm: str = "head",
    cast: str = "before",
    offset: float = 0.0,
    rope: str = "half",
    rope_dtype: torch.dtype | None = None,
    layout: str = "bnsd",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise and rotate queries and keys.

    Args:
        q, k: [B, S, Nq, D] and [B, S, Nk, D]; views into separate or merged projections are fine.
        q_weight, k_weight: [D] with norm ``head``, [N * D] with norm ``full`` (OLMoE, MiniMax-M2); None for none.
        cos, sin: broadcastable to [B, S, R] (rope ``half`` and ``interleaved_full``: one value per rotated element) or
            [B, S, R/2] (the others: one per pair). R < D leaves the trailing D - R elements unrotated.
        eps, cast, offset: see ``rms_norm``.
        q_bias, k_bias: like the weights; added after them.
        rope: how pairs lie in the head and in the result. ``half``: (i, i + R/2), ``x * cos + rotate_half(x) * sin``
            (GPT-NeoX, Llama); ``half_split``: the same pairs from half-width tables (gpt-oss); ``interleaved``:
            (2i, 2i+1) kept in place (GPT-J); ``interleaved_to_half``: (2i, 2i+1) read, halves written (DeepSeek);
            ``interleaved_full``: (2i, 2i+1) from full-width tables (Cohere, GLM).
        rope_dtype: dtype the rotation is computed in before casting back; default the normalised value's.
        layout: of the results: ``bnsd`` transposes to [B, N, S, D], ``bsnd`` keeps [B, S, N, D].

    Returns:
        q_out and k_out, in q's and k's dtypes.
    """
    head_dim = 2 if layout == "bsnd" else 1

    def one(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        h = x.flatten(-2) if norm == "full" else x
        h = rms_norm(h, weight, eps, cast=cast, offset=offset)
        if bias is not None:
            h = h + bias
        if norm == "full":
            h = h.unflatten(-1, x.shape[-2:])
        if layout == "bnsd":
            h = h.transpose(1, 2)
        return rotate(h, cos.unsqueeze(head_dim), sin.unsqueeze(head_dim), rope, rope_dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str, rope_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rotate the leading R elements of the last dimension of x [..., D]; cos and sin broadcast as in the op."""
    rotary_dim = cos.shape[-1] if rope in ("half", "interleaved_full") else 2 * cos.shape[-1]
    head_dim = x.shape[-1]
    rotated, passed = (x, None) if rotary_dim == head_dim else (x[..., :rotary_dim], x[..., rotary_dim:])
    h = rotated if rope_dtype is None else rotated.to(rope_dtype)
    if rope in ("half", "half_split"):
        first, second = h[..., : rotary_dim // 2], h[..., rotary_dim // 2 :]
    else:
        first, second = h[..., ::2], h[..., 1::2]
    if rope == "half":
        h = h * cos + torch.cat((-second, first), dim=-1) * sin
    elif rope == "interleaved_full":
        h = h * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin
    else:
        pair = (first * cos - second * sin, second * cos + first * sin)
        h = torch.stack(pair, dim=-1).flatten(-2) if rope == "interleaved" else torch.cat(pair, dim=-1)
    if rope_dtype is not None:
        h = h.to(x.dtype)
    return h if passed is None else torch.cat((h, passed), dim=-1)


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    batch, heads_q, heads_k, dim = 2, 4, 2, 16
    for rope in ROPES:
        for norm in NORMS:
            for rotary_dim in (dim, dim // 2):
                for length in (1, 7):
                    angle = torch.rand(1, length, rotary_dim // 2, generator=rng) * 6.28
                    if rope == "half":
                        angle = torch.cat((angle, angle), dim=-1)
                    elif rope == "interleaved_full":
                        angle = angle.repeat_interleave(2, dim=-1)
                    q = torch.randn(batch, length, heads_q, dim, generator=rng).to(dtype)
                    k = torch.randn(batch, length, heads_k, dim, generator=rng).to(dtype)
                    widths = (dim, dim) if norm == "head" else (heads_q * dim, heads_k * dim)
                    q_weight, k_weight = (torch.randn(w, generator=rng).to(dtype) for w in widths)
                    args = (q, k, q_weight, k_weight, angle.cos().to(dtype), angle.sin().to(dtype), 1e-6)
                    yield Sample(f"{rope}-{norm}-R{rotary_dim}-S{length}", args, dict(rope=rope, norm=norm))


QK_NORM_ROPE = CanonicalOp(
    name="qk_norm_rope",
    schema=SCHEMA,
    reference=qk_norm_rope,
    tolerance=uniform_tolerance(
        fp32=Tolerance(1e-5, 1e-5, 1e-6), half=Tolerance(4e-3, 4e-3, 1e-3), bf16=Tolerance(3e-2, 3e-2, 8e-3)
    ),
    samples=_samples,
).register()
