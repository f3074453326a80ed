"""Attention becomes one op over the heads as the model stores them, when switched on; all else stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report

B, HEADS, KV, TOKENS, WIDTH = 2, 4, 2, 6, 16
REPEATS = HEADS // KV
ON = dict(passes={"attention": True})
ALLOWED = (torch.arange(TOKENS)[None, :] <= torch.arange(TOKENS)[:, None])[None, None].repeat(B, 1, 1, 1)
ALLOWED[0, :, :, 4:] = False


def operands(dtype=torch.float32, kv=KV, heads=HEADS):
    """Queries, keys and values [B, heads, TOKENS, WIDTH]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, TOKENS, WIDTH, generator=generator).to(dtype) for n in (heads, kv, kv)]


def check(function, counts, inputs=None, *, dtype=torch.float32, dynamic=False, options=None):
    inputs = operands(dtype) if inputs is None else inputs
    torch.manual_seed(0)
    want = function(*inputs)
    compiled = compile_with_report(function, dynamic=dynamic, **(ON if options is None else options))
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=0)
    assert compiled.reports[0].unfused_reason == ""
    assert compiled.counts == counts, compiled.reasons
    return compiled


def repeat_kv(x, n=REPEATS):
    """As in transformers' models."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


def repeated(repeat, **kwargs):
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), **kwargs)


def sdpa(**kwargs):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def heads_last(x):
    """The repeat of a model that keeps [B, T, H, D] and transposes last."""
    x = x.transpose(1, 2)
    x = x.unsqueeze(3).expand(-1, -1, -1, REPEATS, -1).reshape(B, TOKENS, HEADS, WIDTH)
    return x.transpose(1, 2)


# Spelling -> (function, attributes, form).
SPELLINGS = {
    "repeat_kv": (repeated(repeat_kv), {}, "sdpa, repeat_kv, full"),
    "repeat_kv, causal": (repeated(repeat_kv, is_causal=True), dict(is_causal=True), "sdpa, repeat_kv, causal"),
    "repeat_kv, masked": (
        repeated(repeat_kv, attn_mask=ALLOWED, scale=0.3), dict(scale=0.3), "sdpa, repeat_kv, masked",
    ),
    "repeat_kv, additive mask": (
        repeated(repeat_kv, attn_mask=torch.zeros(TOKENS, TOKENS).masked_fill(~ALLOWED[1, 0], -1e9)),
        {},
        "sdpa, repeat_kv, masked",
    ),
    "repeat_interleave": (
        repeated(lambda x: x.repeat_interleave(REPEATS, dim=1)), {}, "sdpa, repeat_kv, full",
    ),
    "repeat_interleave, dim from the end": (
        repeated(lambda x: x.repeat_interleave(REPEATS, -3)), {}, "sdpa, repeat_kv, full",
    ),
    "unsqueezed by view": (
        repeated(lambda x: x.view(B, KV, 1, TOKENS, WIDTH).expand(-1, -1, REPEATS, -1, -1).flatten(1, 2)),
        {},
        "sdpa, repeat_kv, full",
    ),
    "enable_gqa": (
        sdpa(enable_gqa=True, is_causal=True), dict(is_causal=True, gqa="native"), "sdpa, enable_gqa, causal",
    ),
    "integer scale": (repeated(repeat_kv, scale=1), dict(scale=1.0), "sdpa, repeat_kv, full"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_matches_exactly(name, **variant):
    function, attributes, form = SPELLINGS[name]
    compiled = check(function, dict(attention=1), **variant)
    (node,) = compiled.ops("attention")
    assert node.kwargs == attributes
    assert [x.meta["val"].shape[1] for x in node.args[:3]] == [HEADS, KV, KV]
    assert len(node.args) == (4 if "mask" in name else 3)
    assert compiled.forms == [form]
    assert compiled.reasons == []


@pytest.mark.parametrize("name", ["repeat_kv, causal", "repeat_kv, masked", "enable_gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_spelling_matches_in_half_precision(name, dtype):
    test_spelling_matches_exactly(name, dtype=dtype)


@pytest.mark.parametrize("name", ["repeat_kv, causal", "enable_gqa", "repeat_interleave"])
def test_spelling_matches_under_dynamic_shapes(name):
    function, attributes, _ = SPELLINGS[name]
    compiled = compile_with_report(function, dynamic=True, **ON)
    for tokens in (6, 9):
        inputs = [torch.randn(3, n, tokens, WIDTH) for n in (HEADS, KV, KV)]
        for x in inputs:
            torch._dynamo.mark_static(x, 1)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=0, atol=0)
    assert len(compiled.reports) == 1
    assert [node.kwargs for node in compiled.ops("attention")] == [attributes]
    assert compiled.reasons == []


def test_equal_heads_match_as_they_are():
    compiled = check(sdpa(is_causal=True), dict(attention=1), operands(kv=HEADS))
    assert compiled.forms == ["sdpa, causal"]
    assert compiled.ops("attention")[0].kwargs == dict(is_causal=True)


def test_values_may_have_another_width():
    q, k, v = operands(kv=HEADS)
    compiled = check(sdpa(scale=0.1), dict(attention=1), [q, k, v[..., :8].contiguous()])
    assert compiled.forms == ["sdpa, full"]


def test_repeats_go_away_with_what_made_them():
    compiled = check(repeated(repeat_kv), dict(attention=1))
    called = [n for n in compiled.reports[0].graph.graph.nodes if n.op == "call_function"]
    assert [str(n.target) for n in called] == ["moe_fx.attention.default"]


def test_a_repeat_that_something_else_reads_stays_for_it():
    def function(q, k, v):
        k = repeat_kv(k)
        return F.scaled_dot_product_attention(q, k, repeat_kv(v)) + k.mean()

    (node,) = check(function, dict(attention=1)).ops("attention")
    assert node.args[1].op == "placeholder"


def test_inductor_gets_the_same_attention():
    function, inputs = repeated(repeat_kv, is_causal=True), operands()
    compiled = compile_with_report(function, downstream="inductor", **ON)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert compiled.reports[0].matched[0].kernel == "inductor (fused reference)"


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
def test_off_by_default():
    compiled = check(repeated(repeat_kv), {}, options={})
    assert compiled.reasons == []
    assert "attention" not in compiled.reports[0].pass_seconds


def test_a_graph_that_needs_gradients_stays_as_it_was():
    inputs = [x.requires_grad_() for x in operands()]
    reports = []
    options = dict(downstream="eager", report=reports.append, **ON)
    compiled = torch.compile(repeated(repeat_kv), backend="moe_ascend", options=options)
    with pytest.warns(match="needs gradients"):
        compiled(*inputs).sum().backward()
    assert inputs[1].grad is not None
    assert reports[0].sites == [] and "inference-only" in reports[0].unfused_reason


# --- Repeats that are none: the call matches, but over the heads as they come ---------------------------------------


def tiled(x):
    """Heads in the order 0, 1, 0, 1: another head for each query head."""
    return x.repeat(1, REPEATS, 1, 1)


def expanded_before_the_heads(x):
    return x[:, None].expand(B, REPEATS, KV, TOKENS, WIDTH).reshape(B, HEADS, TOKENS, WIDTH)


def expanded_tokens(x):
    """As many elements, but copies of tokens take the place of copies of heads."""
    return x[:, :, :, None].expand(B, KV, TOKENS, REPEATS, WIDTH).reshape(B, HEADS, TOKENS, WIDTH)


def merged_otherwise(x):
    """The copies of a head, rearranged before they are merged."""
    copies = x[:, :, None].expand(B, KV, REPEATS, TOKENS, WIDTH)
    return copies.transpose(1, 2).reshape(B, HEADS, TOKENS, WIDTH)


def scaled_copies(x):
    copies = x[:, :, None].expand(B, KV, REPEATS, TOKENS, WIDTH) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    return copies.reshape(B, HEADS, TOKENS, WIDTH)


def different_heads(x):
    """Each head beside its neighbour, not beside itself."""
    return torch.stack((x, x.flip(1)), 2).reshape(B, HEADS, TOKENS, WIDTH)


def interleaved_tokens(x):
    return x.repeat_interleave(REPEATS, dim=2).view(B, HEADS, TOKENS, WIDTH)


def uneven_interleave(x):
    return x.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=HEADS)


NO_REPEATS = dict(
    tiled=tiled,
    expanded_before_the_heads=expanded_before_the_heads,
    expanded_tokens=expanded_tokens,
    merged_otherwise=merged_otherwise,
    scaled_copies=scaled_copies,
    different_heads=different_heads,
    interleaved_tokens=interleaved_tokens,
    uneven_interleave=uneven_interleave,
    heads_last=heads_last,
)


def assert_unfolded(function, inputs=None):
    compiled = check(function, dict(attention=1), inputs)
    (node,) = compiled.ops("attention")
    assert [x.meta["val"].shape[1] for x in node.args[:3]] == [HEADS] * 3
    assert compiled.forms == ["sdpa, full"]
    return compiled


@pytest.mark.parametrize("name", NO_REPEATS)
def test_what_is_no_repeat_of_heads_is_not_folded(name):
    assert_unfolded(repeated(NO_REPEATS[name]))


def each_token_twice(x):
    return x.repeat_interleave(2, dim=2)


def all_tokens_twice(x):
    return x[:, :, None].expand(B, HEADS, 2, TOKENS, WIDTH).reshape(B, HEADS, 2 * TOKENS, WIDTH)


@pytest.mark.parametrize("repeat", [each_token_twice, all_tokens_twice], ids=lambda f: f.__name__)
def test_repeated_tokens_are_no_repeated_heads(repeat):
    compiled = assert_unfolded(repeated(repeat), operands(kv=HEADS))
    assert compiled.ops("attention")[0].args[1].meta["val"].shape[2] == 2 * TOKENS


def test_heads_that_come_in_another_rank_are_not_folded():
    def heads(x):
        return x.view(B, KV, 1, TOKENS, WIDTH).expand(-1, -1, REPEATS, -1, -1).reshape(B, HEADS, TOKENS, WIDTH)

    q, k, v = operands()
    assert_unfolded(repeated(heads), [q, k.flatten(1), v.flatten(1)])


def test_keys_and_values_are_folded_together_or_not_at_all():
    q, k, v = operands()
    assert_unfolded(lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), v), [q, k, operands(kv=HEADS)[2]])
    assert_unfolded(lambda q, k, v: F.scaled_dot_product_attention(q, k, repeat_kv(v)), [q, operands(kv=HEADS)[1], v])
    other = lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v, HEADS))  # noqa: E731
    assert_unfolded(other, [q, k, v[:, :1].contiguous()])


# --- Near misses ----------------------------------------------------------------------------------------------------


def written_out(q, k, v, probabilities=lambda s: s.softmax(-1)):
    return probabilities(q @ repeat_kv(k).transpose(-1, -2) * 0.25 + torch.where(ALLOWED, 0.0, -1e9)) @ repeat_kv(v)


def with_sinks(scores):
    """gpt-oss: one learned column takes part in the softmax and is dropped after it."""
    sinks = torch.arange(HEADS).float().view(1, -1, 1, 1).expand(B, -1, TOKENS, 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


NEAR_MISSES = {
    "dropout": (repeated(repeat_kv, dropout_p=0.5), operands(), "dropout 0.5 is applied"),
    "rank 3": (sdpa(), [x[0] for x in operands(kv=HEADS)], "queries are of rank 3"),
    "rank 5": (sdpa(), [x[None] for x in operands(kv=HEADS)], "queries are of rank 5"),
    "keys of rank 3": (sdpa(), [operands(kv=HEADS)[0], *(x[0] for x in operands(kv=HEADS)[1:])], "keys are of rank 3"),
    "broadcast batch": (
        sdpa(), [operands(kv=HEADS)[0], *(x[:1].contiguous() for x in operands(kv=HEADS)[1:])], "differ in batch",
    ),
    "broadcast heads": (sdpa(), operands(kv=1), "heads are broadcast"),
    "values of fewer heads": (
        sdpa(enable_gqa=True), [*operands(kv=2)[:2], operands(kv=1)[2]], "keys and values differ in heads",
    ),
    "written out": (written_out, operands(), "attn_implementation='sdpa'"),
    "written out, in fp32": (
        lambda q, k, v: written_out(q, k, v, lambda s: s.softmax(-1, dtype=torch.float64).float()),
        operands(),
        "attn_implementation='sdpa'",
    ),
    "sinks": (lambda q, k, v: written_out(q, k, v, with_sinks), operands(), "attention sinks"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_unfused_and_is_explained(name):
    function, inputs, reason = NEAR_MISSES[name]
    compiled = check(function, {}, inputs)
    assert len(compiled.reasons) == 1 and reason in compiled.reasons[0], compiled.reasons


NO_SITES = {
    "softmax of no product": lambda q, k, v: q.softmax(-1) @ k.transpose(-1, -2),
    "weights of no values": lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1).exp(),
    "softmax over queries": lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-2) @ v,
    "router": lambda q, k, v: (q[0, 0] @ k[0, 0].t()).softmax(-1) @ v[0, 0],
}


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_attention_is_no_site(name):
    assert check(NO_SITES[name], {}, operands(kv=HEADS)).reasons == []
