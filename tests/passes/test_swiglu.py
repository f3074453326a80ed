"""The gated activation between projections becomes one op in every spelling; what is no SwiGLU stays as it was."""

from __future__ import annotations

import moe_blocks as blocks
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from torch import nn

H, I = 32, 24  # noqa: E741


class Mlp(nn.Module):
    """Projections in every layout; ``function(m, x)`` is the MLP."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()

        def linear(rows, columns, bias=False):
            return nn.Linear(columns, rows, bias=bias, dtype=dtype)

        self.gate, self.up, self.down = linear(I, H), linear(I, H), linear(H, I)
        self.gate_up, self.biased = linear(2 * I, H), linear(2 * I, H, bias=True)
        self.square = linear(H, H)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def check(function, counts, *, dtype=torch.float32, dynamic=False, x=None, **options):
    module = Mlp(function, dtype)
    x = torch.randn(2, 5, H).to(dtype) if x is None else x
    with torch.no_grad():
        want = module(x)
    compiled = compile_with_report(module, dynamic=dynamic, **options)
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=0)
    assert compiled.reports[0].unfused_reason == ""
    assert compiled.counts == counts, compiled.reasons
    return compiled


def merged(split, activation=lambda g, u: F.silu(g) * u):
    return lambda m, x: m.down(activation(*split(m.gate_up(x))))


def separate(activation):
    return lambda m, x: m.down(activation(m.gate(x), m.up(x)))


def chunk(h):
    return h.chunk(2, -1)


def oai(g, u):
    g, u = g.clamp(max=0.7), u.clamp(-0.7, 0.7)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def pairs(h):
    return h.unflatten(-1, (2, I))


# Spelling -> (function, attributes, form).
SPELLINGS = {
    "separate": (separate(lambda g, u: F.silu(g) * u), {}, "separate, silu"),
    "separate, up first": (separate(lambda g, u: u * F.silu(g)), {}, "separate, silu"),
    "module": (separate(lambda g, u: nn.SiLU()(g) * u), {}, "separate, silu"),
    "flattened rows": (lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).view(-1, I)), {}, "separate, silu"),
    "matmul": (lambda m, x: (F.silu(x @ m.gate.weight.t()) * m.up(x)) @ m.down.weight.t(), {}, "separate, silu"),
    "chunk": (merged(chunk), {}, "merged, silu"),
    "split": (merged(lambda h: h.split(I, -1)), {}, "merged, silu"),
    "split with sizes": (merged(lambda h: torch.split(h, [I, I], dim=-1)), {}, "merged, silu"),
    "slices": (merged(lambda h: (h[..., :I], h[..., I:])), {}, "merged, silu"),
    "narrow": (merged(lambda h: (h.narrow(-1, 0, I), h.narrow(-1, I, I))), {}, "merged, silu"),
    "view and select": (merged(lambda h: (pairs(h)[..., 0, :], pairs(h)[..., 1, :])), {}, "merged, silu"),
    "unbind": (merged(lambda h: h.view(*h.shape[:-1], 2, I).unbind(-2)), {}, "merged, silu"),
    "unbind interleaved": (
        merged(lambda h: h.view(*h.shape[:-1], I, 2).unbind(-1)), dict(layout="interleaved"), "merged, silu",
    ),
    "interleaved": (merged(lambda h: (h[..., ::2], h[..., 1::2])), dict(layout="interleaved"), "merged, silu"),
    "up first": (merged(lambda h: chunk(h)[::-1]), dict(layout="up_gate"), "merged, silu"),
    "biased": (lambda m, x: m.down(F.silu(chunk(m.biased(x))[0]) * chunk(m.biased(x))[1]), None, "separate, silu"),
    "gelu": (separate(lambda g, u: F.gelu(g) * u), dict(act="gelu"), "separate, gelu"),
    "gelu_tanh": (merged(chunk, lambda g, u: F.gelu(g, approximate="tanh") * u), dict(act="gelu_tanh"), "gelu_tanh"),
    "relu": (separate(lambda g, u: F.relu(g) * u), dict(act="relu"), "separate, relu"),
    "clamped": (
        merged(chunk, lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.3, 0.3)), dict(limit=0.3), "merged, silu",
    ),
    "clamped after": (
        separate(lambda g, u: F.silu(g).clamp(max=0.2) * u.clamp(min=-0.2, max=0.2)),
        dict(act="silu_then_clamp", limit=0.2),
        "silu_then_clamp",
    ),
    "oai": (
        merged(lambda h: (h[..., ::2], h[..., 1::2]), oai),
        dict(act="swiglu_oai", layout="interleaved", limit=0.7),
        "merged, swiglu_oai",
    ),
    "oai, separate": (separate(oai), dict(act="swiglu_oai", limit=0.7), "separate, swiglu_oai"),
    "oai, unclamped": (
        separate(lambda g, u: (u + 1) * (g * torch.sigmoid(1.5 * g))), dict(act="swiglu_oai", alpha=1.5), "swiglu_oai",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_matches_exactly(name, **variant):
    function, attributes, form = SPELLINGS[name]
    compiled = check(function, dict(swiglu=1), **variant)
    (node,) = compiled.ops("swiglu")
    assert attributes is None or node.kwargs == attributes
    assert form in compiled.forms[0]
    assert compiled.reasons == []


@pytest.mark.parametrize("name", ["separate", "chunk", "unbind", "oai", "clamped", "gelu_tanh"])
def test_spelling_matches_in_bf16_and_under_dynamic_shapes(name):
    test_spelling_matches_exactly(name, dtype=torch.bfloat16, dynamic=True)


def _sliced_weight(m, x):
    gate, up = F.linear(x, m.gate_up.weight[:I]), F.linear(x, m.gate_up.weight[I:])
    return m.down(F.silu(gate) * up)


def test_projections_by_slices_of_one_weight_are_merged():
    module, x = Mlp(_sliced_weight), torch.randn(3, H)
    compiled = compile_with_report(module)
    with torch.no_grad():
        assert relative_error(compiled(x), module(x)) <= 1e-6
    (node,) = compiled.ops("swiglu")
    assert len(node.args) == 1
    assert compiled.forms == ["sliced weight, merged, silu"]
    (site,) = compiled.reports[0].matched
    assert site.level.value == "tolerance"


def test_level_bitwise_keeps_the_projections_apart():
    compiled = check(_sliced_weight, dict(swiglu=1), level="bitwise")
    assert compiled.forms == ["separate, silu"]


@pytest.mark.parametrize(
    "bounds", [((0, I - 1), (I + 1, 2 * I)), ((1, I + 1), (I, 2 * I)), ((I, 2 * I), (0, I))], ids=str
)
def test_other_slices_of_one_weight_stay_apart(bounds):
    (a, b), (c, d) = bounds

    def function(m, x):
        gate, up = F.linear(x, m.gate_up.weight[a:b]), F.linear(x, m.gate_up.weight[c:d])
        return F.linear(F.silu(gate) * up, m.down.weight[:, : b - a])

    assert check(function, dict(swiglu=1)).forms == ["separate, silu"]


def test_shared_expert_beside_routed_experts():
    """The shared expert's output gate is no SwiGLU, and stays outside."""

    class Block(blocks.Block):
        def __init__(self):
            super().__init__(blocks.batched)
            self.gate, self.up, self.down = (nn.Linear(blocks.H, blocks.H, bias=False) for _ in range(3))
            self.shared_gate = nn.Linear(blocks.H, 1, bias=False)

        def forward(self, x):
            shared = self.down(F.silu(self.gate(x)) * self.up(x))
            return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * shared

    block, x = Block(), torch.randn(6, blocks.H)
    compiled = compile_with_report(block)
    with torch.no_grad():
        assert relative_error(compiled(x), block(x)) <= 1e-5
    assert compiled.counts == dict(router=1, experts=1, swiglu=1)
    assert compiled.reasons == []


# --- Near misses ---------------------------------------------------------------------------------------------------


def _gate_used(m, x):
    gate = F.silu(m.gate(x))
    return m.down(gate * m.up(x)) + gate.sum()


def _inner_used(m, x):
    gate = m.gate(x)
    gate = gate * torch.sigmoid(gate * 1.702)
    return m.down((m.up(x) + 1) * gate) + gate.sum()


def _cast_between(m, x):
    return m.down((F.silu(m.gate(x).double()) * m.up(x)).float())


def _cast_around(m, x):
    return m.down(F.silu(m.gate(x).double()).float() * m.up(x))


def _halves_of_rows(m, x):
    gate, up = m.gate(x[0, :4]).view(2, 2, I).unbind(1)
    return m.down(F.silu(gate) * up)


NEAR_MISSES = {
    "activated gate used": (_gate_used, "has another consumer"),
    "scaled gate used": (_inner_used, "has another consumer"),
    "activated in fp64": (_cast_around, "computed in another dtype"),
    "different limits": (
        separate(lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.2, 0.2)), "clamped to different limits",
    ),
    "asymmetric limit": (separate(lambda g, u: F.silu(g.clamp(max=0.3)) * u.clamp(-0.1, 0.3)), "different limits"),
    "only gate limited": (separate(lambda g, u: F.silu(g.clamp(max=0.3)) * u), "different limits"),
    "gate clamped on both sides": (
        separate(lambda g, u: F.silu(g.clamp(-0.3, 0.3)) * u.clamp(-0.3, 0.3)), "known activation",
    ),
    "both halves the same": (merged(lambda h: (h[..., :I], h[..., :I])), "first and up the first half"),
    "spelled silu": (separate(lambda g, u: g * torch.sigmoid(g) * u), "rounds differently"),
    "scaled without + 1": (separate(lambda g, u: g * torch.sigmoid(1.7 * g) * u), "without the (up + 1)"),
    "+ 1 without scale": (separate(lambda g, u: F.silu(g) * (u + 1)), "without the scaled sigmoid"),
    "broadcast gate": (lambda m, x: m.down(F.silu(m.gate(x)[:, :1]) * m.up(x)), "differ in shape"),
}  # fmt: skip


def test_halves_of_rows_are_two_tensors_not_a_merged_projection():
    compiled = check(_halves_of_rows, {"swiglu": 1})
    assert compiled.forms == ["separate, silu"]


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_unfused_and_is_explained(name):
    function, reason = NEAR_MISSES[name]
    compiled = check(function, {})
    assert len(compiled.reasons) == 1 and reason in compiled.reasons[0], compiled.reasons


NO_SITES = {
    "tanh": separate(lambda g, u: torch.tanh(g) * u),
    "sigmoid gate": separate(lambda g, u: torch.sigmoid(g) * u),
    "no projection behind": lambda m, x: torch.tanh(F.silu(m.gate(x)) * m.up(x)),
    "product used twice": lambda m, x: (lambda h: m.down(h) + h.sum())(F.silu(m.gate(x)) * m.up(x)),
    "cast before the projection": _cast_between,
    "up is no projection": lambda m, x: m.down((F.silu(m.square(x)) * x)[..., :I]),
    "gate is no projection": lambda m, x: m.down((F.silu(x) * m.square(x))[..., :I]),
    "gate is an activation": lambda m, x: F.linear(F.silu(x) * m.square(x), m.square.weight),
    "ungated": lambda m, x: m.down(F.silu(m.gate(x))),
}


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_gated_projection_is_no_site(name):
    assert check(NO_SITES[name], {}).reasons == []
