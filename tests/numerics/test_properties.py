"""Routers and experts on inputs nobody thought of: random sizes, ties, infinities, empty experts, repeated ids."""

from __future__ import annotations

import functools

import moe_blocks as blocks
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import moe_fx.lowering.ops  # noqa: F401

# The same examples in every run: a failure is a failure for everybody.
fixed = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

route, experts = torch.ops.moe_fx.route, torch.ops.moe_fx.experts
N_EXPERTS, TOP_K, N_GROUP, TOPK_GROUP = 8, 2, 4, 2


# --- Routers: the compiled block against the block itself -------------------------------------------------------------


class Router(nn.Module):
    """A routing function on given logits, and experts behind it."""

    def __init__(self, function, dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-0.3, 0.3, N_EXPERTS))
        self.identity = nn.Parameter(torch.eye(N_EXPERTS).to(dtype))
        self.experts = blocks.Weights(dtype)
        self.function = function

    def forward(self, z, x):
        weights, ids = self.function(self, z)
        return weights, ids, blocks.batched(self.experts, x, weights, ids)


def softmax(m, z):
    weights, ids = torch.topk(F.softmax(z, -1, dtype=torch.float), TOP_K)
    return (weights / weights.sum(-1, keepdim=True)).to(z.dtype), ids


def topk_softmax(m, z):
    """A top-k over bare logits is a router's only behind a projection."""
    weights, ids = torch.topk(F.linear(z, m.identity), TOP_K)
    return F.softmax(weights, -1), ids


def sigmoid_biased(m, z):
    scores = z.float().sigmoid()
    ids = torch.topk(scores + m.bias, TOP_K, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


def grouped(m, z):
    """DeepSeek-V3's selection."""
    scores = z.float().sigmoid()
    choice = scores + m.bias
    of_group = choice.view(-1, N_GROUP, N_EXPERTS // N_GROUP).topk(2, dim=-1)[0].sum(-1)
    best = torch.topk(of_group, TOPK_GROUP, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(of_group).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, N_GROUP, N_EXPERTS // N_GROUP).reshape(-1, N_EXPERTS)
    ids = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), TOP_K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


ROUTERS = {f.__name__: f for f in (softmax, topk_softmax, sigmoid_biased, grouped)}


@st.composite
def logits(draw, n_experts=N_EXPERTS):
    """[T, E] with ties (few distinct values), experts switched off by -inf, or plain random values."""
    tokens = draw(st.sampled_from([2, 3, 17, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z = torch.randn(tokens, n_experts, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    kind = draw(st.sampled_from(["random", "ties", "equal", "switched off"]))
    if kind == "ties":
        z = z.round()
    elif kind == "equal":
        z = torch.full_like(z, draw(st.sampled_from([0.0, -3.5, 100.0])))
    elif kind == "switched off":
        dropped = torch.rand(z.shape, generator=generator) < 0.5
        dropped[:, :TOP_K] = False  # At least k experts remain.
        z = z.masked_fill(dropped, float("-inf"))
    return z


def by_expert(weights, ids):
    ids, order = ids.sort(-1)
    return weights.gather(-1, order), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_compiled_router_is_the_eager_router(name, dtype):
    module = Router(ROUTERS[name], dtype)
    compiled = compile_with_report(module, dynamic=True)

    @fixed(max_examples=25)
    @given(z=logits())
    def check(z):
        z = z.to(dtype)
        if name == "topk_softmax":
            z = z.clamp(min=torch.finfo(dtype).min)  # Its projection would turn 0 * inf into NaN.
        x = torch.zeros(len(z), blocks.H, dtype=dtype)
        with torch.no_grad():
            want_weights, want_ids, _ = module(z, x)
        weights, ids, _ = compiled(z, x)
        for got, want in zip(by_expert(weights, ids), by_expert(want_weights, want_ids), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, check_dtype=True)

    check()
    assert compiled.reasons == []
    assert compiled.counts == dict(router=1, experts=1)
    assert len(compiled.reports) == 1, "an example recompiled"


def test_compiled_router_serves_one_token():
    for name, function in ROUTERS.items():
        module = Router(function, torch.float32)
        compiled = compile_with_report(module)
        z, x = torch.randn(1, N_EXPERTS), torch.randn(1, blocks.H)
        with torch.no_grad():
            want = by_expert(*module(z, x)[:2])
        got = by_expert(*compiled(z, x)[:2])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name
        assert compiled.counts["router"] == 1


# --- route: what holds for every router -------------------------------------------------------------------------------


@st.composite
def routings(draw):
    n_group = draw(st.sampled_from([1, 1, 2, 4]))
    n_experts = n_group * draw(st.integers(2, 16))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, min(8, topk_group * n_experts // n_group)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z = torch.randn(draw(st.integers(0, 9)), n_experts, generator=generator)
    if draw(st.booleans()):
        z = z.round()  # Ties.
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    bias = torch.randn(n_experts, generator=generator) if draw(st.booleans()) else None
    attributes = dict(
        top_k=top_k,
        score=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(["max", "top2sum"])),
        renormalize=draw(st.sampled_from(["none", "eps", "clamp"])),
        eps=draw(st.sampled_from([1e-20, 1e-12])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        sorted=draw(st.booleans()),
    )
    return z.to(dtype), bias, attributes


@fixed(max_examples=60)
@given(routings())
def test_route_selects_distinct_experts_of_the_best_groups(routing):
    z, bias, attributes = routing
    weights, ids = route(z, bias, **attributes)
    assert weights.shape == ids.shape == (len(z), attributes["top_k"])
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert ((ids >= 0) & (ids < z.shape[1])).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    per_group = z.shape[1] // attributes["n_group"]
    assert all(len({e // per_group for e in row}) <= attributes["topk_group"] for row in ids.tolist())
    assert (weights >= 0).all()
    if attributes["renormalize"] != "none" and len(z):
        torch.testing.assert_close(weights.sum(-1), torch.full((len(z),), attributes["scale"]), rtol=1e-5, atol=1e-6)


@fixed(max_examples=40)
@given(routings())
def test_route_treats_tokens_alone(routing):
    """A token's experts do not depend on the tokens beside it: batching changes nothing."""
    z, bias, attributes = routing
    weights, ids = route(z, bias, **attributes)
    for token in range(len(z)):
        one_weights, one_ids = route(z[token : token + 1], bias, **attributes)
        together = by_expert(weights[token], ids[token])
        alone = by_expert(one_weights[0], one_ids[0])
        assert torch.equal(together[1], alone[1])
        torch.testing.assert_close(together[0], alone[0], rtol=1e-6, atol=0)


# --- experts: the op against a loop over pairs ------------------------------------------------------------------------


def loop(x, weights, ids, w13, w2):
    """One pair at a time, in float64; ids outside the experts are skipped."""
    x, weights, w13, w2 = (t.double() for t in (x, weights, w13, w2))
    y = torch.zeros_like(x)
    for token in range(ids.shape[0]):
        for weight, e in zip(weights[token], ids[token].tolist(), strict=True):
            if 0 <= e < w13.shape[0]:
                gate, up = (w13[e] @ x[token]).chunk(2)
                y[token] += weight * (w2[e] @ (F.silu(gate) * up))
    return y


@st.composite
def expert_inputs(draw, ids_within=True):
    n_experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    tokens, hidden, inter = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pattern = draw(st.sampled_from(["any", "one expert", "few experts", "out of range"] if not ids_within else ["any"]))
    ids = torch.randint(0, n_experts, (tokens, top_k), generator=generator)  # Repeats within a row included.
    if pattern == "one expert":
        ids = torch.full_like(ids, n_experts - 1)
    elif pattern == "few experts":
        ids = ids % 2 % n_experts
    elif pattern == "out of range":
        ids = torch.randint(-2, n_experts + 3, (tokens, top_k), generator=generator)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    w13, w2 = normal(n_experts, 2 * inter, hidden) * 0.3, normal(n_experts, hidden, inter) * 0.3
    return normal(tokens, hidden), torch.rand(tokens, top_k, generator=generator), ids, w13, w2


@fixed(max_examples=60)
@given(expert_inputs(ids_within=False))
def test_experts_are_a_loop_over_pairs(inputs):
    y = experts(*inputs)
    assert y.shape == inputs[0].shape
    torch.testing.assert_close(y.double(), loop(*inputs), rtol=1e-4, atol=1e-5)


def test_experts_of_no_tokens():
    x, weights, ids = torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)
    assert experts(x, weights, ids, torch.zeros(3, 6, 4), torch.zeros(3, 4, 3)).shape == (0, 4)


@fixed(max_examples=25)
@given(expert_inputs(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_experts_in_half_precision(inputs, dtype):
    x, weights, ids, w13, w2 = inputs
    x, w13, w2 = (t.to(dtype) for t in (x, w13, w2))
    y = experts(x, weights, ids, w13, w2)
    assert y.dtype == dtype
    assert relative_error(y, loop(x, weights, ids, w13, w2)) <= (2e-2 if dtype == torch.bfloat16 else 4e-3)


@fixed(max_examples=25)
@given(expert_inputs(ids_within=False), st.randoms(use_true_random=False))
def test_experts_do_not_depend_on_the_order_of_tokens(inputs, random):
    x, weights, ids, w13, w2 = inputs
    order = list(range(len(x)))
    random.shuffle(order)
    shuffled = experts(x[order], weights[order], ids[order], w13, w2)
    torch.testing.assert_close(shuffled, experts(x, weights, ids, w13, w2)[order], rtol=1e-4, atol=1e-5)


@fixed(max_examples=25)
@given(expert_inputs(ids_within=False), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_not_a_number_stays_in_its_token(inputs, bad):
    """NaN and infinities reach the token's own result, as in eager code, and no other's."""
    x, weights, ids, w13, w2 = inputs
    spoilt = x.clone()
    spoilt[0, 0] = bad
    y, want = experts(spoilt, weights, ids, w13, w2), loop(spoilt, weights, ids, w13, w2)
    assert torch.equal(y[0].isnan(), want[0].isnan())
    torch.testing.assert_close(y[1:], experts(x, weights, ids, w13, w2)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["batched", "index_add", "dense_bmm"])
def test_compiled_experts_are_the_eager_experts(name):
    """One compiled block serves every number of tokens, whatever experts they go to."""
    block = blocks.Block(blocks.FORMS[name][0])
    compiled = compile_with_report(block, dynamic=True)

    @fixed(max_examples=25)
    @given(
        tokens=st.sampled_from([2, 3, 17, 64]),
        seed=st.integers(0, 10**6),
        kind=st.sampled_from(["random", "one expert", "nan", "inf"]),
    )
    def check(tokens, seed, kind):
        x = torch.randn(tokens, blocks.H, generator=torch.Generator().manual_seed(seed))
        if kind == "one expert":
            x = x[:1].expand_as(x).contiguous()
        with torch.no_grad():
            if kind in ("nan", "inf"):
                x[0, 0] = float(kind)
                got, want = compiled(x), block(x)
                # Where all experts run for all tokens, eager code multiplies NaN by zero weights: still NaN.
                assert got[0].isnan().all() == want[0].isnan().all()
                got, want = got[1:], want[1:]
            else:
                got, want = compiled(x), block(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    check()
    assert compiled.counts == dict(router=1, experts=1)
    assert len(compiled.reports) == 1, "an example recompiled"
