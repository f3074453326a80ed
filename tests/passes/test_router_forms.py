"""Routers: every form matches with the model's own arithmetic, bit for bit; forms that would change results do not."""

from __future__ import annotations

import moe_blocks as blocks
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report
from moe_blocks import E, H, K
from torch import nn


class Router(nn.Module):
    """A routing function of (router, logits) behind a projection; returns sorted-by-id weights and ids."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H).to(dtype))
        self.bias = nn.Parameter(torch.randn(E) * 0.3)
        self.experts = blocks.Weights(dtype)
        self.function = function

    def forward(self, x):
        weights, ids = self.function(self, F.linear(x, self.weight))
        return weights, ids, blocks.batched(self.experts, x, weights, ids)


def softmax(m, z):
    return torch.topk(F.softmax(z, -1, dtype=torch.float), K)


def softmax_cast_first(m, z):
    return torch.topk(F.softmax(z.float(), -1), K)


def softmax_renormalised(m, z):
    w, ids = softmax(m, z)
    return w / w.sum(-1, keepdim=True), ids


def softmax_renormalised_cast(m, z):
    w, ids = softmax_renormalised(m, z)
    return w.to(z.dtype), ids


def cast_then_renormalised(m, z):
    w, ids = softmax(m, z)
    w = w.to(z.dtype)
    return w / w.sum(-1, keepdim=True), ids


def topk_softmax(m, z):
    w, ids = torch.topk(z, K)
    return F.softmax(w, -1), ids


def topk_sigmoid(m, z):
    w, ids = torch.topk(z, K)
    return torch.sigmoid(w.float()), ids


def sigmoid_biased(m, z):
    scores = z.float().sigmoid()
    ids = torch.topk(scores + m.bias, K, sorted=False)[1]
    w = scores.gather(1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def sqrt_softplus(m, z):
    scores = F.softplus(z.float()).sqrt()
    ids = torch.topk(scores + m.bias, K)[1]
    w = scores.gather(-1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-12), ids


def softmax_biased_clamped(m, z):
    scores = F.softmax(z.float(), -1)
    ids = torch.topk(scores + m.bias.unsqueeze(0), K)[1]
    w = scores.gather(-1, ids)
    return w / torch.clamp(w.sum(-1, keepdim=True), min=1e-3), ids


def biased_values(m, z):
    return torch.topk(z.float().sigmoid() + m.bias, K)


def grouped(m, z, fill=float("-inf"), group_scores=None, largest=True):
    scores = z.float().sigmoid()
    choice = scores + m.bias
    groups = choice.view(-1, 4, E // 4)
    best = groups.topk(2, -1)[0].sum(-1) if group_scores is None else group_scores(groups)
    picked = torch.topk(best, 2, dim=-1, sorted=False, largest=largest)[1]
    mask = torch.zeros_like(best).scatter_(1, picked, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(~mask.bool(), fill), K, sorted=False)[1]
    w = scores.gather(1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-20), ids


def grouped_max(m, z):
    return grouped(m, z, group_scores=lambda g: g.max(dim=-1).values)


def grouped_zero(m, z):
    return grouped(m, z, fill=0.0)


def grouped_where(m, z):
    scores = F.softmax(z.float(), -1)
    best = scores.view(-1, 4, E // 4).amax(-1)
    mask = torch.zeros_like(best).scatter(1, torch.topk(best, 2)[1], 1.0)
    mask = mask.repeat_interleave(E // 4, -1)
    return torch.topk(torch.where(mask.bool(), scores, 0.0), K)


def bias_cast_down(m, z):
    scores = z.sigmoid()
    ids = torch.topk(scores + m.bias.to(z.dtype).unsqueeze(0), K)[1]
    return scores.gather(1, ids), ids


def late_score_after_bias(m, z):
    w, ids = torch.topk(z + m.bias.to(z.dtype), K)
    return F.softmax(w.float(), -1), ids


def single_group(m, z):
    scores = z.float().sigmoid()
    choice = scores + m.bias
    best = choice.view(-1, 1, E).topk(2, -1)[0].sum(-1)
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, 1)[1], 1).unsqueeze(-1).expand(-1, 1, E).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), K)[1]
    return scores.gather(1, ids), ids


FORMS = {
    softmax: dict(score="softmax"),
    softmax_cast_first: dict(score="softmax"),
    softmax_renormalised: dict(renormalize="eps", eps=0.0),
    softmax_renormalised_cast: dict(renormalize="eps", out_dtype=torch.bfloat16),
    cast_then_renormalised: dict(renormalize="none", out_dtype=torch.bfloat16),
    topk_softmax: dict(order="after", score="softmax", score_dtype=torch.bfloat16),
    topk_sigmoid: dict(order="after", score="sigmoid", score_dtype=torch.float32),
    sigmoid_biased: dict(score="sigmoid", renormalize="eps", eps=1e-20, scale=2.5, sorted=False),
    sqrt_softplus: dict(score="sqrtsoftplus", renormalize="eps", eps=1e-12),
    softmax_biased_clamped: dict(renormalize="clamp", eps=1e-3),
    biased_values: dict(score="sigmoid", weight_source="choice"),
    grouped: dict(n_group=4, topk_group=2, group_score="top2sum", group_fill="-inf"),
    grouped_max: dict(n_group=4, topk_group=2, group_score="max"),
    grouped_zero: dict(n_group=4, group_fill="zero"),
    grouped_where: dict(score="softmax", n_group=4, group_score="max", group_fill="zero", weight_source="choice"),
    bias_cast_down: dict(score="sigmoid", score_dtype=torch.bfloat16),
    late_score_after_bias: dict(order="after", score="identity", score_dtype=torch.bfloat16),
    single_group: dict(n_group=1, score="sigmoid"),
}
DEFAULTS = dict(
    score="softmax", order="before", score_dtype=torch.float32, n_group=1, topk_group=1, group_score="max",
    group_fill="-inf", weight_source="scores", renormalize="none", eps=0.0, scale=1.0, out_dtype=None, sorted=True,
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_form_matches_bit_for_bit(function, dynamic):
    router = Router(function, torch.bfloat16)
    x = torch.randn(512, H).bfloat16()  # Enough tokens for a selection in another precision to show.
    with torch.no_grad():
        weights, ids, _ = router(x)
    compiled = compile_with_report(router, dynamic=dynamic)
    got_weights, got_ids, _ = compiled(x)
    assert compiled.reasons == []
    (node,) = compiled.ops("route")
    attributes = {**DEFAULTS, **node.kwargs}
    assert {k: attributes[k] for k in FORMS[function]} == FORMS[function]
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_weights, weights) and got_weights.dtype == weights.dtype


def near_miss(reason):
    def wrap(function):
        function.reason = reason
        return function

    return wrap


@near_miss("largest=False")
def smallest(m, z):
    return torch.topk(F.softmax(z, -1, dtype=torch.float), K, largest=False)


@near_miss("not over the last")
def over_tokens(m, z):
    w, ids = torch.topk(F.softmax(z, -1, dtype=torch.float), K, dim=0)
    return w.t()[:7].repeat(1, 1), ids.t()[:7].repeat(1, 1) % E


@near_miss("softmax is not over the expert dimension")
def softmax_over_tokens(m, z):
    return torch.topk(F.softmax(z.float(), 0), K)


@near_miss("cast to torch.bfloat16 before the top-k")
def selected_in_bf16(m, z):
    return torch.topk(F.softmax(z.float(), -1).bfloat16(), K)


@near_miss("neither a known score")
def unknown_score(m, z):
    return torch.topk(torch.sin(z.float()), K)


@near_miss("its own beta or threshold")
def sharp_softplus(m, z):
    return torch.topk(F.softplus(z.float(), beta=2.0), K)


@near_miss("filled with -1.0")
def other_fill(m, z):
    return grouped(m, z, fill=-1.0)


@near_miss("neither by their maximum nor")
def grouped_mean(m, z):
    return grouped(m, z, group_scores=lambda g: g.mean(-1))


@near_miss("not the sum of the two largest")
def grouped_top1_sum(m, z):
    return grouped(m, z, group_scores=lambda g: g.topk(1, -1)[0].sum(-1))


@near_miss("worst groups")
def worst_groups(m, z):
    return grouped(m, z, largest=False)


@near_miss("drops the best groups")
def inverted_mask(m, z):
    scores = F.softmax(z.float(), -1)
    best = scores.view(-1, 4, E // 4).amax(-1)
    mask = torch.zeros_like(best).scatter(1, torch.topk(best, 2)[1], 1.0).repeat_interleave(E // 4, -1)
    return torch.topk(scores.masked_fill(mask.bool(), 0.0), K)


@near_miss("groups are scored on another tensor")
def groups_of_other_scores(m, z):
    scores = F.softmax(z.float(), -1)
    best = torch.tanh(scores).view(-1, 4, E // 4).amax(-1)
    mask = torch.zeros_like(best).scatter(1, torch.topk(best, 2)[1], 1.0).repeat_interleave(E // 4, -1)
    return torch.topk(scores.masked_fill(~mask.bool(), 0.0), K)


@near_miss("both the top-k's values and gathered scores")
def both_weights(m, z):
    scores = z.float().sigmoid()
    values, ids = torch.topk(scores + m.bias, K)
    return values + scores.gather(1, ids), ids


NEAR_MISSES = [f for f in list(globals().values()) if hasattr(f, "reason")]


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss_stays_unfused_and_is_explained(function):
    router, x = Router(function), torch.randn(7, H)
    with torch.no_grad():
        want = router(x)
    compiled = compile_with_report(router)
    got = compiled(x)
    assert compiled.counts.get("router", 0) == 0
    assert any(function.reason in text for text in compiled.reasons), compiled.reasons
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# What stays behind the op, because absorbing it would change results: matched, but with these ops left in the graph.
def test_renormalisation_over_tokens_is_left_alone():
    def function(m, z):
        w, ids = softmax(m, z)
        return w / w.sum(0, keepdim=True), ids

    router, x = Router(function), torch.randn(7, H)
    compiled = compile_with_report(router)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], router(x)[0])
    (node,) = compiled.ops("route")
    assert "renormalize" not in node.kwargs


def test_renormalisation_with_another_consumer_of_the_sum_is_left_alone():
    def function(m, z):
        w, ids = softmax(m, z)
        total = w.sum(-1, keepdim=True)
        return w / total + total, ids

    router, x = Router(function), torch.randn(7, H)
    compiled = compile_with_report(router)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], router(x)[0])
    (node,) = compiled.ops("route")
    assert "renormalize" not in node.kwargs


def test_scores_used_elsewhere_stay_available():
    class WithScores(Router):
        def forward(self, x):
            scores = F.softmax(F.linear(x, self.weight), -1, dtype=torch.float)
            w, ids = torch.topk(scores, K)
            return scores, blocks.batched(self.experts, x, w, ids)

    router, x = WithScores(None), torch.randn(7, H)
    compiled = compile_with_report(router)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], router(x)[0])
    assert compiled.counts == dict(router=1, experts=1)


def test_a_sampler_is_no_router():
    head = nn.Linear(H, 4000, bias=False)

    def sample(x):
        return torch.topk(F.softmax(head(x), -1), 50)

    compiled = compile_with_report(sample)
    with pytest.warns(UserWarning, match="nothing in graph"):
        compiled(torch.randn(3, H))
    assert compiled.reasons == []


def test_hash_routing_is_reported_as_not_supported():
    class Hashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = blocks.Weights()
            self.register_buffer("table", torch.randint(0, E, (50, K)))

        def forward(self, x, tokens):
            ids = self.table[tokens]
            return blocks.batched(self.experts, x, torch.full((x.shape[0], K), 0.5), ids)

    compiled = compile_with_report(Hashed())
    compiled(torch.randn(6, H), torch.arange(6))
    assert compiled.counts == dict(experts=1)
    assert any("not from a top-k" in text for text in compiled.reasons)
