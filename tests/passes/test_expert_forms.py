"""Every spelling of experts becomes one canonical op and gives the unfused result; near misses do not match."""

from __future__ import annotations

import moe_blocks as blocks
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from moe_blocks import FORMS, Block, H, K

_BF16_FORMS = ("grouped", "titan")


@pytest.fixture
def capture_loops():
    """Dynamo's switches that let data-dependent sizes into one graph."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORMS)
def test_form_matches(name, dynamic, capture_loops):
    experts, form = FORMS[name]
    block, x = Block(experts), torch.randn(6, H)
    with torch.no_grad():
        want = block(x)
    compiled = compile_with_report(block, dynamic=dynamic)
    got = compiled(x)
    assert compiled.reasons == []
    assert compiled.counts == dict(router=1, experts=1)
    assert form in compiled.forms
    bound = 2e-2 if name in _BF16_FORMS else 1e-5
    assert relative_error(got, want) <= bound


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("name", ["batched", "dense_bmm", "masked_loop"])
def test_token_counts(name, tokens):
    block, x = Block(FORMS[name][0]), torch.randn(tokens, H)
    compiled = compile_with_report(block)
    with torch.no_grad():
        assert relative_error(compiled(x), block(x)) <= 1e-5
    assert compiled.counts["experts"] == 1


def _extra_consumer(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1) + h.mean()


def _other_ids_for_down(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    down = m.w2[ids.flip(1).reshape(-1)]
    out = torch.bmm(down, (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def _other_permutation(m, x, w, ids):
    perm, offsets = blocks.sort_by_expert(ids)
    h = torch._grouped_mm(x[perm // K].bfloat16(), m.w13.bfloat16().transpose(-2, -1), offsets)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, m.w2.bfloat16().transpose(-2, -1), offsets)
    out = out * w.view(-1)[perm].unsqueeze(-1)
    return out[perm].view(-1, K, H).sum(1)  # the permutation itself, not its inverse


def _weights_unsorted(m, x, w, ids):
    perm, offsets = blocks.sort_by_expert(ids)
    h = torch._grouped_mm(x[perm // K].bfloat16(), m.w13.bfloat16().transpose(-2, -1), offsets)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, m.w2.bfloat16().transpose(-2, -1), offsets)
    out = out * w.view(-1).unsqueeze(-1)  # token-major weights on sorted rows
    return out[torch.argsort(perm)].view(-1, K, H).sum(1)


def _wrong_token_of_row(m, x, w, ids):
    perm, offsets = blocks.sort_by_expert(ids)
    h = torch._grouped_mm(x[perm // (K + 1)].bfloat16(), m.w13.bfloat16().transpose(-2, -1), offsets)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, m.w2.bfloat16().transpose(-2, -1), offsets)
    out = out * w.view(-1)[perm].unsqueeze(-1)
    return out[torch.argsort(perm)].view(-1, K, H).sum(1)


def _counts_not_offsets(m, x, w, ids):
    perm, _ = blocks.sort_by_expert(ids)
    counts = torch.histc(ids.view(-1).float(), bins=blocks.E, min=0, max=blocks.E - 1).int()
    offsets = counts.clamp(max=6)
    h = torch._grouped_mm(x[perm // K].bfloat16(), m.w13.bfloat16().transpose(-2, -1), offsets)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, m.w2.bfloat16().transpose(-2, -1), offsets)
    out = out * w.view(-1)[perm].unsqueeze(-1)
    return out[torch.argsort(perm)].view(-1, K, H).sum(1)


def _mean_over_slots(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).mean(1)


def _sum_over_tokens(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(0)


def _slots_as_tokens(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat(K, 1).unsqueeze(-1)).squeeze(-1)  # slot-major rows, token-major ids
    gate, up = h.chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (out * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def _unweighted(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    return torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1).view(-1, K, H).sum(1)


def _norm_before_sum(m, x, w, ids):
    flat = ids.reshape(-1)
    h = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (torch.tanh(out) * w.reshape(-1, 1)).view(-1, K, H).sum(1)


NEAR_MISSES = {
    "intermediate has another consumer": (_extra_consumer, "another consumer"),
    "down takes other ids": (_other_ids_for_down, "index that is not the router's ids|different expert ids"),
    "rows put back by the permutation itself": (_other_permutation, "not put back by the inverse"),
    "weights not sorted": (_weights_unsorted, "another order than the rows"),
    "rows of other tokens": (_wrong_token_of_row, "not tokens repeated"),
    "offsets are not cumulated counts": (_counts_not_offsets, "not the cumulated histogram"),
    "mean instead of sum": (_mean_over_slots, "stands between the down projection and the sum"),
    "sum over tokens": (_sum_over_tokens, "not over the slot dimension"),
    "slot-major rows": (_slots_as_tokens, "not tokens repeated per selected expert"),
    "no routing weights": (_unweighted, "no routing weights"),
    "an op before the sum": (_norm_before_sum, "tanh stands between|consumers"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_unfused_and_is_explained(name):
    import re

    experts, reason = NEAR_MISSES[name]
    block, x = Block(experts), torch.randn(6, H)
    compiled = compile_with_report(block)
    got = compiled(x)
    assert compiled.counts.get("experts", 0) == 0
    assert any(re.search(reason, text) for text in compiled.reasons), compiled.reasons
    if "offsets" not in name:  # Wrong offsets leave rows of a grouped product unwritten: nothing to compare.
        with torch.no_grad():
            assert relative_error(got, block(x)) < 1e-6


def _activation_block(activation):
    return Block(lambda m, x, w, ids: blocks.batched(m, x, w, ids, activation))


ACTIVATIONS = {
    "silu": (lambda g, u: F.silu(g) * u, dict(act="silu", layout="gate_up")),
    "swapped": (lambda g, u: F.silu(u) * g, dict(act="silu", layout="up_gate")),
    "spelled silu": (lambda g, u: u * (g * torch.sigmoid(g)), dict(act="silu", layout="gate_up")),
    "gelu": (lambda g, u: F.gelu(g) * u, dict(act="gelu", layout="gate_up")),
    "clamped": (
        lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.3, 0.3),
        dict(act="silu", layout="gate_up", limit=0.3),
    ),
    "clamped after": (
        lambda g, u: F.silu(g).clamp(max=0.2) * u.clamp(-0.2, 0.2),
        dict(act="silu_then_clamp", layout="gate_up", limit=0.2),
    ),
    "oai": (
        lambda g, u: (u.clamp(-0.4, 0.4) + 1) * (g.clamp(max=0.4) * torch.sigmoid(g.clamp(max=0.4) * 1.5)),
        None,  # gate is clamped twice: two different nodes
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_read_exactly(name):
    activation, attributes = ACTIVATIONS[name]
    block, x = _activation_block(activation), torch.randn(6, H)
    compiled = compile_with_report(block)
    with torch.no_grad():
        assert relative_error(compiled(x), block(x)) <= 1e-5
    if attributes is not None:
        (node,) = compiled.ops("experts")
        defaults = dict(act="silu", layout="gate_up")
        assert {**defaults, **node.kwargs} == attributes | {}


WRONG_ACTIVATIONS = {
    "unknown function": (lambda g, u: torch.tanh(g) * u, "no factor of the product is a known activation"),
    "different limits": (lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.2, 0.2), "different limits"),
    "asymmetric limit": (lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.1, 0.3), "different limits"),
    "gate clamped from below": (lambda g, u: F.silu(g.clamp(-0.3, 0.3)) * u, "known activation|limits"),
    "scaled without + 1": (lambda g, u: u * (g * torch.sigmoid(g * 1.702)), "without the (up + 1)"),
    "+ 2": (lambda g, u: (u + 2) * F.silu(g), "not an expert matmul's result|known activation"),
    "both halves the same": (lambda g, u: F.silu(g) * g, "first and up the first half"),
}


@pytest.mark.parametrize("name", WRONG_ACTIVATIONS)
def test_wrong_activation_does_not_match(name):
    activation, reason = WRONG_ACTIVATIONS[name]
    block, x = _activation_block(activation), torch.randn(6, H)
    compiled = compile_with_report(block)
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    assert compiled.counts.get("experts", 0) == 0
    assert any(part in text for text in compiled.reasons for part in reason.split("|")), compiled.reasons


def test_expert_parallel_sentinels_are_skipped():
    """Ids beyond the last expert (another rank's) are clamped and masked by the model, skipped by the op."""

    def experts(m, x, w, ids):
        flat = ids.reshape(-1)
        sentinel = flat >= blocks.E
        flat = flat.clamp(0, blocks.E - 1)
        gate, up = torch.bmm(m.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        out = torch.bmm(m.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        weights = w.reshape(-1).masked_fill(sentinel, 0.0)
        return (out * weights.unsqueeze(-1)).view(-1, K, H).sum(1)

    def router(m, x):
        weights, ids = blocks.softmax_router(m, x)
        return weights, torch.where(ids < 3, ids, blocks.E)

    block, x = Block(experts, router), torch.randn(9, H)
    compiled = compile_with_report(block)
    with torch.no_grad():
        assert relative_error(compiled(x), block(x)) <= 1e-5
    assert compiled.counts["experts"] == 1


def test_level_bitwise_excludes_experts():
    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block, level="bitwise")
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    assert compiled.counts == dict(router=1)
    assert any("level='bitwise'" in reason for reason in compiled.reasons)


def _batched_with(rows=None, flat_ids=None, out=None, weigh=None, combine=None, h=None):
    """transformers' batched_mm with one step replaced."""

    def experts(m, x, w, ids):
        ids_ = ids.reshape(-1) if flat_ids is None else flat_ids(ids)
        rows_ = x.repeat_interleave(K, 0) if rows is None else rows(x)
        up_ = torch.bmm(m.w13[ids_], rows_.unsqueeze(-1)).squeeze(-1)
        gate, up = (up_ if h is None else h(m, up_, ids_)).chunk(2, -1)
        out_ = torch.bmm(m.w2[ids_], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out_ = out_ if out is None else out(out_, ids_)
        weighed = out_ * w.reshape(-1, 1) if weigh is None else weigh(out_, w, ids_)
        return weighed.view(-1, K, H).sum(1) if combine is None else combine(x, weighed)

    return experts


def _tokens(x, per_token=K):
    return torch.arange(x.shape[0] * K) // per_token


def _scattered_duplicates(m, x, w, ids):
    return blocks.dense_einsum_with(m, x, x.new_zeros(x.shape[0], blocks.E).scatter_(1, ids // 2, w))


# Each of these once matched and gave other numbers than the model (found in review); none may match.
UNSOUND = {
    "ids clamped below the last expert": _batched_with(flat_ids=lambda ids: ids.reshape(-1).clamp(max=1)),
    "ids clamped, weights not zeroed": _batched_with(flat_ids=lambda ids: ids.reshape(-1).clamp(0, blocks.E - 1)),
    "ids filled by an unrelated mask": _batched_with(
        flat_ids=lambda ids: ids.reshape(-1).masked_fill(torch.arange(ids.numel()) % 3 == 0, 0)
    ),
    "ids cast to bool": _batched_with(flat_ids=lambda ids: ids.reshape(-1).bool().long()),
    "results filled for valid experts": _batched_with(
        out=lambda out, ids: out.masked_fill((ids >= 2).unsqueeze(-1), 0.0)
    ),
    "results filled with one": _batched_with(
        out=lambda out, ids: out.masked_fill((ids >= blocks.E).unsqueeze(-1), 1.0) + 0
    ),
    "results rounded before the sum": _batched_with(out=lambda out, ids: out.half().float()),
    "bias scaled by alpha": _batched_with(h=lambda m, h, ids: torch.add(h, m.b13[ids], alpha=3)),
    "rows from an arange that starts at -1": _batched_with(rows=lambda x: x[torch.arange(-1, x.shape[0] * K - 1) // K]),
    "index_add with alpha": _batched_with(
        combine=lambda x, out: torch.zeros_like(x).index_add(0, _tokens(x), out, alpha=0.5)
    ),
    "index_add to every other token": _batched_with(
        combine=lambda x, out: torch.zeros_like(x).index_add(0, _tokens(x, 2 * K), out)
    ),
    "index_add into a longer tensor": _batched_with(
        combine=lambda x, out: x.new_zeros(x.shape[0] + 2, H).index_add(0, _tokens(x), out)
    ),
    "scattered duplicates": _scattered_duplicates,
}


@pytest.mark.filterwarnings("ignore::moe_fx.errors.MoeFxWarning")
@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_match_is_refused(name):
    block, x = Block(UNSOUND[name]), torch.randn(6, H)
    compiled = compile_with_report(block)
    got = compiled(x)
    with torch.no_grad():
        torch.testing.assert_close(got, block(x), rtol=0, atol=0)
    assert compiled.counts.get("experts", 0) == 0


UNSOUND_ACTIVATIONS = {
    "tensor limit": lambda g, u: F.silu(g.clamp(max=torch.tensor(0.05))) * u,
    "clamped twice": lambda g, u: F.silu(g.clamp_max(0.5).clamp_max(0.05)) * u.clamp(-0.5, 0.5),
    "quantised to fp8": lambda g, u: (F.silu(g) * u).to(torch.float8_e4m3fn).to(g.dtype),
    "quantised to int8": lambda g, u: F.silu((g * 8).to(torch.int8).to(g.dtype)) * u,
}


@pytest.mark.parametrize("name", UNSOUND_ACTIVATIONS)
def test_unsound_activation_is_refused(name):
    block, x = _activation_block(UNSOUND_ACTIVATIONS[name]), torch.randn(6, H)
    compiled = compile_with_report(block)
    got = compiled(x)
    with torch.no_grad():
        torch.testing.assert_close(got, block(x), rtol=0, atol=0)
    assert compiled.counts.get("experts", 0) == 0


def test_autocast_region_runs_as_it_is():
    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(x)

    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(fn)
    with pytest.warns(UserWarning, match="autocast region"):
        got = compiled(x)
    with torch.no_grad():
        want = fn(x)
    assert got.dtype == want.dtype and torch.equal(got, want)
