"""Query/key norm + rope becomes one op in every rotary form and layout, bit for bit; other pairs stay two norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report
from torch import nn

B, S, NQ, NK, D, H = 2, 6, 4, 2, 16, 32


def rms(x, weight, eps=1e-6):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


# --- Rotations of x [..., R] with tables that broadcast ---------------------------------------------------------------


def half(x, c, s):
    x1, x2 = x.chunk(2, -1)
    return x * c + torch.cat((-x2, x1), -1) * s


def half_sliced(x, c, s):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (c * x) + (s * torch.cat((-x2, x1), dim=-1))


def half_split(x, c, s):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)


def interleaved(x, c, s):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), -1).flatten(-2)


def interleaved_to_half(x, c, s):
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)


def interleaved_full(x, c, s):
    return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s


ROPES = {
    "half": (half, "half"),
    "half_sliced": (half_sliced, "half"),
    "half_split": (half_split, "half_split"),
    "interleaved": (interleaved, "interleaved"),
    "interleaved_to_half": (interleaved_to_half, "interleaved_to_half"),
    "interleaved_full": (interleaved_full, "interleaved_full"),
}


def in_fp32(rope):
    return lambda x, c, s: rope(x.float(), c.float(), s.float()).to(x.dtype)


def partial(rope, width=D // 2):
    return lambda x, c, s: torch.cat((rope(x[..., :width], c, s), x[..., width:]), -1)


class Attention(nn.Module):
    """Projections, norms and tables; ``queries_and_keys(m, x, cos, sin)`` is what is tested."""

    def __init__(self, queries_and_keys, dtype=torch.bfloat16, *, heads=(NQ, NK), bias=False):
        super().__init__()
        self.nq, self.nk = heads
        self.q = nn.Linear(H, self.nq * D, bias=bias, dtype=dtype)
        self.k = nn.Linear(H, self.nk * D, bias=bias, dtype=dtype)
        self.v = nn.Linear(H, self.nk * D, bias=bias, dtype=dtype)
        self.qkv = nn.Linear(H, (self.nq + 2 * self.nk) * D, bias=bias, dtype=dtype)
        self.same = nn.Linear(H, 3 * self.nq * D, bias=bias, dtype=dtype)

        def weight(n):
            return nn.Parameter((torch.rand(n) + 0.5).to(dtype))

        self.q_norm, self.k_norm = weight(D), weight(D)
        self.q_full, self.k_full, self.k_full_merged = weight(self.nq * D), weight(self.nk * D), weight(self.nk * D)
        self.q_bias, self.k_bias = weight(D), weight(D)
        self.queries_and_keys = queries_and_keys

    def project(self, x):
        q, k = self.q(x), self.k(x)
        return q.view(*x.shape[:-1], self.nq, D), k.view(*x.shape[:-1], self.nk, D)

    def forward(self, x, cos, sin):
        return self.queries_and_keys(self, x, cos, sin)


def tables(rope="half", width=D, length=S, dtype=torch.bfloat16, batch=1):
    angle = torch.rand(batch, length, width // 2) * 6.28
    if rope == "half":
        angle = torch.cat((angle, angle), -1)
    elif rope == "interleaved_full":
        angle = angle.repeat_interleave(2, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(module, counts, *, rope="half", width=D, batch=B, length=S, dtype=torch.bfloat16, dynamic=False):
    inputs = (torch.randn(batch, length, H).to(dtype), *tables(rope, width, length, dtype))
    with torch.no_grad():
        want = module(*inputs)
    compiled = compile_with_report(module, dynamic=dynamic)
    torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=0)
    assert compiled.reports[0].unfused_reason == ""
    assert compiled.counts == counts, compiled.reasons
    return compiled


def only_op(compiled):
    (node,) = compiled.ops("qk_norm_rope")
    assert compiled.reasons == []
    return node


def qwen3(rope):
    """Norm per head, transpose, rope on [B, N, S, D]."""

    def queries_and_keys(m, x, cos, sin):
        q, k = m.project(x)
        q, k = rms(q, m.q_norm).transpose(1, 2), rms(k, m.k_norm).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rope(q, cos, sin), rope(k, cos, sin)

    return queries_and_keys


def token_major(rope):
    """Rope on [B, S, N, D]."""

    def queries_and_keys(m, x, cos, sin):
        q, k = m.project(x)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return rope(rms(q, m.q_norm), cos, sin), rope(rms(k, m.k_norm), cos, sin)

    return queries_and_keys


def transposed_first(rope):
    """Transpose, then norm, then rope."""

    def queries_and_keys(m, x, cos, sin):
        q, k = (h.transpose(1, 2) for h in m.project(x))
        cos, sin = cos[:, None], sin[:, None]
        return rope(rms(q, m.q_norm), cos, sin), rope(rms(k, m.k_norm), cos, sin)

    return queries_and_keys


def full(rope):
    """OLMoE: the norm spans all heads."""

    def queries_and_keys(m, x, cos, sin):
        q, k = rms(m.q(x), m.q_full), rms(m.k(x), m.k_full)
        q = q.view(*x.shape[:-1], -1, D).transpose(1, 2)
        k = k.view(*x.shape[:-1], -1, D).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rope(q, cos, sin), rope(k, cos, sin)

    return queries_and_keys


LAYOUTS = {
    "qwen3": (qwen3, {}),
    "token_major": (token_major, dict(layout="bsnd")),
    "transposed_first": (transposed_first, {}),
    "full": (full, dict(norm="full")),
}


def attributes(**given):
    return {name: v for name, v in given.items() if v is not None and (name, v) != ("rope", "half")}


FORMS = [(name, "qwen3") for name in ROPES]
FORMS += [(name, layout) for name in ("half", "interleaved") for layout in LAYOUTS if layout != "qwen3"]


@pytest.mark.parametrize(("name", "layout"), FORMS)
def test_forms_and_layouts(name, layout):
    rope, form = ROPES[name]
    build, given = LAYOUTS[layout]
    node = only_op(check(Attention(build(rope)), dict(qk_norm_rope=1), rope=form))
    assert node.kwargs == attributes(rope=form, **given)


@pytest.mark.parametrize("name", ["half", "half_sliced", "interleaved", "interleaved_full"])
def test_partial(name):
    rope, form = ROPES[name]
    module = Attention(qwen3(partial(rope)))
    compiled = check(module, dict(qk_norm_rope=1), rope=form, width=D // 2)
    assert only_op(compiled).kwargs == attributes(rope=form)
    assert compiled.forms == [f"head norm, partial {form} rope"]


def test_partial_code_on_the_full_width():
    """GLM and others always write the partial form, also where nothing is left to pass through."""
    only_op(check(Attention(qwen3(partial(half, D))), dict(qk_norm_rope=1)))


@pytest.mark.parametrize("name", ["half", "half_split", "interleaved"])
def test_rotation_in_fp32(name):
    rope, form = ROPES[name]
    node = only_op(check(Attention(qwen3(in_fp32(rope))), dict(qk_norm_rope=1), rope=form))
    assert node.kwargs == attributes(rope=form, rope_dtype=torch.float32)


def test_partial_rotation_in_fp32():
    node = only_op(check(Attention(token_major(partial(in_fp32(half)))), dict(qk_norm_rope=1), width=D // 2))
    assert node.kwargs == dict(layout="bsnd", rope_dtype=torch.float32)


def pairs_of_one_table(m, x, cos, sin):
    """gpt-fast: the tables are one tensor of pairs, viewed and indexed anew for every product."""
    table = torch.stack((cos, sin), -1)

    def rotate(h):
        y = h.float().reshape(*h.shape[:-1], -1, 2)
        t = table.view(1, y.size(1), 1, y.size(3), 2)
        pair = (y[..., 0] * t[..., 0] - y[..., 1] * t[..., 1], y[..., 1] * t[..., 0] + y[..., 0] * t[..., 1])
        return torch.stack(pair, -1).flatten(3).type_as(h)

    q, k = m.project(x)
    return rotate(rms(q, m.q_norm)), rotate(rms(k, m.k_norm))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_views_written_anew_for_every_product(dynamic):
    module = Attention(pairs_of_one_table)
    node = only_op(check(module, dict(qk_norm_rope=1), rope="interleaved", dynamic=dynamic))
    assert node.kwargs == dict(rope="interleaved", rope_dtype=torch.float32, layout="bsnd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["qwen3", "full"])
def test_other_dtypes(layout, dtype):
    only_op(check(Attention(LAYOUTS[layout][0](half), dtype), dict(qk_norm_rope=1), dtype=dtype))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["qwen3", "full"])
def test_head_counts(layout, heads):
    only_op(check(Attention(LAYOUTS[layout][0](half), heads=heads), dict(qk_norm_rope=1)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token(layout, batch):
    """All of the tables' axes broadcast, so the tables do not tell heads from tokens."""
    node = only_op(check(Attention(LAYOUTS[layout][0](half)), dict(qk_norm_rope=1), batch=batch, length=1))
    q, k = (n.meta["val"].shape for n in node.args[:2])
    assert (q[1], k[1]) == (1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic_shapes(layout):
    module = Attention(LAYOUTS[layout][0](half))
    compiled = compile_with_report(module, dynamic=True)
    for batch, length in ((2, 6), (3, 9)):
        inputs = (torch.randn(batch, length, H).bfloat16(), *tables(length=length))
        with torch.no_grad():
            want = module(*inputs)
        torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=0)
    assert len(compiled.reports) == 1
    only_op(compiled)


# --- Projections ------------------------------------------------------------------------------------------------------


def rotated(m, q, k, cos, sin):
    q, k = rms(q, m.q_norm).transpose(1, 2), rms(k, m.k_norm).transpose(1, 2)
    return half(q, cos.unsqueeze(1), sin.unsqueeze(1)), half(k, cos.unsqueeze(1), sin.unsqueeze(1))


def split_qkv(m, x, cos, sin):
    q, k, v = m.qkv(x).split([NQ * D, NK * D, NK * D], -1)
    return *rotated(m, q.view(B, -1, NQ, D), k.view(B, -1, NK, D), cos, sin), v


def split_heads(m, x, cos, sin):
    q, k, v = m.qkv(x).view(*x.shape[:-1], -1, D).split([NQ, NK, NK], 2)
    return *rotated(m, q, k, cos, sin), v


def sliced_qkv(m, x, cos, sin):
    qkv = m.qkv(x)
    q, k = qkv[..., : NQ * D], qkv[..., NQ * D : (NQ + NK) * D]
    return rotated(m, q.reshape(B, -1, NQ, D), k.reshape(B, -1, NK, D), cos, sin)


def chunked_qkv(m, x, cos, sin):
    q, k, v = m.same(x).chunk(3, -1)
    return *rotated(m, q.view(B, -1, NQ, D), k.view(B, -1, NQ, D), cos, sin), v


def unbound_qkv(m, x, cos, sin):
    q, k, v = m.same(x).view(*x.shape[:-1], 3, NQ, D).unbind(2)
    return *rotated(m, q, k, cos, sin), v


def permuted_qkv(m, x, cos, sin):
    """ViT style: one permutation brings q, k and v to the front."""
    q, k, v = m.same(x).view(*x.shape[:-1], 3, NQ, D).permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return half(rms(q, m.q_norm), cos, sin), half(rms(k, m.k_norm), cos, sin), v


def full_norm_of_split(m, x, cos, sin):
    """MiniMax-M2 with a merged projection: the normalised parts are strided."""
    q, k, v = m.qkv(x).split([NQ * D, NK * D, NK * D], -1)
    q, k = rms(q, m.q_full).view(B, -1, NQ, D), rms(k, m.k_full).view(B, -1, NK, D)
    return half(q, cos.unsqueeze(2), sin.unsqueeze(2)), half(k, cos.unsqueeze(2), sin.unsqueeze(2)), v


def flat_tokens(m, x, cos, sin):
    """An engine's [T, N, D] rows, viewed as a batch only for the rope."""
    x = x.view(-1, H)
    q, k = rms(m.q(x).view(-1, NQ, D), m.q_norm), rms(m.k(x).view(-1, NK, D), m.k_norm)
    q, k = q.view(B, -1, NQ, D), k.view(B, -1, NK, D)
    return half(q, cos.unsqueeze(2), sin.unsqueeze(2)), half(k, cos.unsqueeze(2), sin.unsqueeze(2))


def flat_full(m, x, cos, sin):
    """The same with [T, N * D] rows and a norm of the full width."""
    x = x.view(-1, H)
    q, k = rms(m.q(x), m.q_full).view(B, -1, NQ, D), rms(m.k(x), m.k_full).view(B, -1, NK, D)
    return half(q, cos.unsqueeze(2), sin.unsqueeze(2)), half(k, cos.unsqueeze(2), sin.unsqueeze(2))


def head_major_by_permute(m, x, cos, sin):
    q, k = (h.permute(0, 2, 1, 3) for h in m.project(x))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return half(rms(q, m.q_norm), cos, sin), half(rms(k, m.k_norm), cos, sin)


def keys_first(m, x, cos, sin):
    q, k = m.project(x)
    k, q = rms(k, m.k_norm).transpose(1, 2), rms(q, m.q_norm).transpose(1, 2)
    return half(k, cos.unsqueeze(1), sin.unsqueeze(1)), half(q, cos.unsqueeze(1), sin.unsqueeze(1))


def norm_bias(m, x, cos, sin):
    q, k = m.project(x)
    q, k = rms(q, m.q_norm) + m.q_bias, rms(k, m.k_norm) + m.k_bias
    return half(q, cos.unsqueeze(2), sin.unsqueeze(2)), half(k, cos.unsqueeze(2), sin.unsqueeze(2))


def weightless(m, x, cos, sin):
    q, k = (F.rms_norm(h, (D,), eps=1e-6).transpose(1, 2) for h in m.project(x))
    return half(q, cos.unsqueeze(1), sin.unsqueeze(1)), half(k, cos.unsqueeze(1), sin.unsqueeze(1))


def gemma_weight(m, x, cos, sin):
    def norm(h, weight):
        f = h.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, True) + 1e-6) * (1 + weight.float())).type_as(h)

    q, k = m.project(x)
    q, k = norm(q, m.q_norm).transpose(1, 2), norm(k, m.k_norm).transpose(1, 2)
    return half(q, cos.unsqueeze(1), sin.unsqueeze(1)), half(k, cos.unsqueeze(1), sin.unsqueeze(1))


def fp32_tables(m, x, cos, sin):
    """fp32 tables promote the product; the cast back stays behind the op."""
    q, k = rotated(m, *m.project(x), cos.float(), sin.float())
    return q.to(x.dtype), k.to(x.dtype)


PROJECTIONS = {
    f.__name__: f
    for f in (
        split_qkv, split_heads, sliced_qkv, chunked_qkv, unbound_qkv, permuted_qkv, full_norm_of_split, flat_tokens,
        flat_full, head_major_by_permute, keys_first, norm_bias, weightless, gemma_weight, fp32_tables,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_and_norms(name, bias=False):
    node = only_op(check(Attention(PROJECTIONS[name], bias=bias), dict(qk_norm_rope=1)))
    q, k = (n.meta["val"].shape for n in node.args[:2])
    assert q[:2] == k[:2] == (B, S)
    assert q[2] >= k[2]


@pytest.mark.parametrize("name", ["split_qkv", "flat_tokens", "keys_first"])
def test_projections_with_bias(name):
    test_projections_and_norms(name, bias=True)


@pytest.mark.parametrize("name", ["split_heads", "full_norm_of_split", "flat_tokens", "permuted_qkv"])
def test_projections_under_dynamic_shapes(name):
    only_op(check(Attention(PROJECTIONS[name]), dict(qk_norm_rope=1), dynamic=True))


def test_norm_bias_is_an_argument():
    node = only_op(check(Attention(norm_bias), dict(qk_norm_rope=1)))
    assert node.kwargs["q_bias"] is not node.kwargs["k_bias"]


def test_swapped_tables_are_just_other_tables():
    """``x * sin + rotate_half(x) * cos`` is the rotation by the tables in that order."""
    build = qwen3(lambda x, c, s: half(x, s, c))
    only_op(check(Attention(build), dict(qk_norm_rope=1)))


# --- Near misses: two norms, and the rope as it was -------------------------------------------------------------------


def _norm_after_rope(m, x, cos, sin):
    q, k = (half(h.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)) for h in m.project(x))
    return rms(q, m.q_norm), rms(k, m.k_norm)


def _both(rope_q, rope_k, eps=1e-6, tables_of_k=None):
    def queries_and_keys(m, x, cos, sin):
        q, k = m.project(x)
        q, k = rms(q, m.q_norm).transpose(1, 2), rms(k, m.k_norm, eps).transpose(1, 2)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        c_k, s_k = (c, s) if tables_of_k is None else tables_of_k(c, s)
        return rope_q(q, c, s), rope_k(k, c_k, s_k)

    return queries_and_keys


def _only_queries_normed(m, x, cos, sin):
    q, k = m.project(x)
    q, k = rms(q, m.q_norm).transpose(1, 2), k.transpose(1, 2)
    return half(q, cos.unsqueeze(1), sin.unsqueeze(1)), half(k, cos.unsqueeze(1), sin.unsqueeze(1))


def _normed_queries_used(m, x, cos, sin):
    q, k = m.project(x)
    q = rms(q, m.q_norm)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return half(q.transpose(1, 2), c, s), half(rms(k, m.k_norm).transpose(1, 2), c, s), q.sum()


def _copied_queries_used(m, x, cos, sin):
    q, k = m.project(x)
    q = rms(q, m.q_norm).transpose(1, 2).contiguous()
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return half(q, c, s), half(rms(k, m.k_norm).transpose(1, 2), c, s), q


def _other_inputs(m, x, cos, sin):
    q, k = m.q(x).view(B, -1, NQ, D), m.k(torch.tanh(x)).view(B, -1, NK, D)
    return rotated(m, q, k, cos, sin)


def _one_full_one_per_head(m, x, cos, sin):
    q, k = rms(m.q(x), m.q_full).view(B, -1, NQ, D), rms(m.k(x).view(B, -1, NK, D), m.k_norm)
    return half(q, cos.unsqueeze(2), sin.unsqueeze(2)), half(k, cos.unsqueeze(2), sin.unsqueeze(2))


def _three_branches(m, x, cos, sin):
    q, k, v = m.same(x).view(*x.shape[:-1], 3, NQ, D).unbind(2)
    return *rotated(m, q, k, cos, sin), half(rms(v, m.q_norm).transpose(1, 2), cos[:, None], sin[:, None])


def _heads_as_tokens(m, x, cos, sin):
    """A view, not a transpose: heads and tokens are mixed, on purpose or not."""
    q, k = rms(m.q(x), m.q_full).view(B, NQ, -1, D), rms(m.k(x), m.k_full).view(B, NK, -1, D)
    return half(q, cos.unsqueeze(1), sin.unsqueeze(1)), half(k, cos.unsqueeze(1), sin.unsqueeze(1))


def _left_in_fp32(m, x, cos, sin):
    q, k = (F.rms_norm(h.float(), (D,), eps=1e-6).transpose(1, 2) for h in m.project(x))
    c, s = cos[:, None].float(), sin[:, None].float()
    return half(q, c, s).to(x.dtype), half(k, c, s).to(x.dtype)


def _wide_norm(m, x, cos, sin):
    def norm(h, weight):
        f = h.float()
        return f * torch.rsqrt(f.pow(2).mean(-1, True) + 1e-6) * weight

    q, k = m.project(x)
    q, k = norm(q, m.q_norm).transpose(1, 2), norm(k, m.k_norm).transpose(1, 2)
    return half(q, cos[:, None], sin[:, None]), half(k, cos[:, None], sin[:, None])


NEAR_MISSES = {
    "only queries normed": (_only_queries_normed, 1, "no other branch of its projection's input"),
    "different eps": (_both(half, half, eps=1e-5), 2, "differ in eps"),
    "different cos": (_both(half, half, tables_of_k=lambda c, s: (c * 2, s)), 2, "differ in cos"),
    "different sin": (_both(half, half, tables_of_k=lambda c, s: (c, -s)), 2, "differ in sin"),
    "tables swapped for keys": (_both(half, half, tables_of_k=lambda c, s: (s, c)), 2, "differ in cos"),
    "different rotation dtype": (_both(half, in_fp32(half)), 2, "differ in cos|rotation dtype"),
    "different inputs": (_other_inputs, 2, "no other branch of its projection's input"),
    "different norm width": (_one_full_one_per_head, 2, "differ in norm width"),
    "three branches": (_three_branches, 3, "3 branches are normalised and rotated alike"),
    "normalised queries used": (_normed_queries_used, 2, "a consumer besides the rope"),
    "copied queries used": (_copied_queries_used, 2, "a consumer besides the rope"),
    "heads as tokens": (_heads_as_tokens, 2, "not of whole heads per token"),
    "wide norm": (_wide_norm, 2, "not rounded to its input's dtype"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_norms_and_is_explained(name):
    function, norms, reason = NEAR_MISSES[name]
    compiled = check(Attention(function), dict(norm=norms))
    assert compiled.reasons
    assert any(part in text for text in compiled.reasons for part in reason.split("|")), compiled.reasons


def _wrong_sign(x, c, s):
    x1, x2 = x.chunk(2, -1)
    return x * c + torch.cat((x2, -x1), -1) * s


def _wrong_order(x, c, s):
    x1, x2 = x.chunk(2, -1)
    return x * c + torch.cat((x1, -x2), -1) * s


def _not_halves(x, c, s):
    x1, x2 = x[..., :4], x[..., 4:]
    return x * c + torch.cat((-x2, x1), -1) * s


def _rotated_other(x, c, s):
    x1, x2 = torch.tanh(x).chunk(2, -1)
    return x * c + torch.cat((-x2, x1), -1) * s


def _difference(x, c, s):
    x1, x2 = x.chunk(2, -1)
    return x * c - torch.cat((-x2, x1), -1) * s


def _swapped_within(x, c, s):
    x1, x2 = x.chunk(2, -1)
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((x1 * c - x2 * s, x2 * s + x1 * c), -1)


def _negative_pair(x, c, s):
    x1, x2 = x.chunk(2, -1)
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((x2 * s - x1 * c, x2 * c + x1 * s), -1)


def _same_table_negative(x, c, s):
    x1, x2 = x.chunk(2, -1)
    c = c[..., : D // 2]
    return torch.cat((x2 * c - x1 * c, x2 * c + x1 * c), -1)


def _pair_in_the_wrong_order(x, c, s):
    x1, x2 = x.chunk(2, -1)
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((x2 * c + x1 * s, x1 * c - x2 * s), -1)


def _stacked_halves(x, c, s):
    x1, x2 = x.chunk(2, -1)
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).flatten(-2)


def _trailing_part(x, c, s):
    """MLA's order: the unrotated part first."""
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((x[..., D // 2 :], half(x[..., : D // 2], c, s)), -1)


def _overlapping_rest(x, c, s):
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((half(x[..., : D // 2], c, s), x[..., D // 2 - 2 :]), -1)


WRONG_ROPES = {
    f.__name__[1:]: f
    for f in (
        _wrong_sign, _wrong_order, _not_halves, _rotated_other, _difference, _swapped_within, _negative_pair,
        _same_table_negative, _pair_in_the_wrong_order, _stacked_halves, _trailing_part, _overlapping_rest,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ROPES)
def test_what_is_no_known_rotation_leaves_two_norms(name):
    check(Attention(qwen3(WRONG_ROPES[name])), dict(norm=2))


def test_norm_after_the_rope_stays_a_norm():
    assert check(Attention(_norm_after_rope), dict(norm=2)).reasons == []


def test_fp32_rotation_of_an_fp32_norm():
    """The norm reads and writes fp32 here: nothing is rounded in between, and the cast back stays behind the op."""
    only_op(check(Attention(_left_in_fp32), dict(qk_norm_rope=1)))


def test_tables_per_head_are_no_rope():
    """Tables [1, N, S, D] broadcast over the batch, not over heads."""

    def queries_and_keys(m, x, cos, sin):
        q, k = m.q(x).view(B, -1, NQ, D), m.same(x)[..., : NQ * D].view(B, -1, NQ, D)
        q, k = rms(q, m.q_norm).transpose(1, 2), rms(k, m.k_norm).transpose(1, 2)
        scale = torch.arange(1, NQ + 1).view(1, NQ, 1, 1).bfloat16()
        return half(q, cos[:, None] * scale, sin[:, None]), half(k, cos[:, None] * scale, sin[:, None])

    check(Attention(queries_and_keys), dict(norm=2))


def test_heads_as_tokens_in_square_shapes_keep_their_meaning():
    """With as many heads as tokens, tables over axis 2 of [B, S, N, D] rotate by head: still what the op computes."""

    def queries_and_keys(m, x, cos, sin):
        q, k = m.q(x).view(B, -1, NQ, D), m.same(x)[..., : NQ * D].view(B, -1, NQ, D)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return half(rms(q, m.q_norm), cos, sin), half(rms(k, m.k_norm), cos, sin)

    compiled = compile_with_report(module := Attention(queries_and_keys))
    inputs = (torch.randn(B, NQ, H).bfloat16(), *tables(length=NQ))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=0, atol=0)


def test_rope_in_one_layer_only():
    """Layers without rope (Llama-4, SmolLM3) keep their norms; the others fuse."""

    def plain(m, x, cos, sin):
        q, k = m.project(x)
        return rms(q, m.q_norm).transpose(1, 2), rms(k, m.k_norm).transpose(1, 2)

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention(f) for f in (qwen3(half), plain, qwen3(half)))

        def forward(self, x, cos, sin):
            outputs = []
            for layer in self.layers:
                q, k = layer(x, cos, sin)
                x = x + q.sum(1).repeat(1, 1, H // D)
                outputs += [q, k]
            return outputs

    assert check(Layers(), dict(qk_norm_rope=2, norm=2)).reasons == []


def test_complex_rotation_leaves_two_norms():
    """Llama-4's view_as_complex rotation is no form of the op; the norms before it match alone."""

    def queries_and_keys(m, x, cos, sin):
        q, k = m.project(x)
        freqs = torch.complex(cos.float(), sin.float())[:, :, None, :]

        def rotate(h):
            pairs = torch.view_as_complex(h.float().reshape(*h.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * freqs).flatten(3).type_as(h)

        return rotate(rms(q, m.q_norm)), rotate(rms(k, m.k_norm))

    assert check(Attention(queries_and_keys), dict(norm=2), rope="interleaved").reasons == []
