"""RMSNorm in every spelling becomes one op, bit for bit; what is no RMSNorm of the last dimension stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report
from torch import nn

D = 32
AFTER = dict(cast="after")


class Norm(nn.Module):
    """A norm given as a function of (module, x), between two projections so that x is no graph input."""

    def __init__(self, function, dtype=torch.bfloat16, weight_dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D).to(weight_dtype or dtype) + 0.5)
        self.matrix = nn.Parameter(torch.randn(1, D).to(dtype))
        self.eps = 1e-5
        self.proj, self.out = (nn.Linear(D, D, bias=False).to(dtype) for _ in range(2))
        self.function = function

    def forward(self, x):
        return self.function(self, self.proj(x))


def check(module, x, counts, *, dynamic=False):
    """Compile, compare bit for bit, and count matched sites."""
    with torch.no_grad():
        want = module(x)
    compiled = compile_with_report(module, dynamic=dynamic)
    got = compiled(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert compiled.reports[0].unfused_reason == ""
    assert compiled.counts == counts, compiled.reasons
    return compiled


def root(h, eps=1e-5):
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def llama(m, x):
    h = x.to(torch.float32)
    return m.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + m.eps)).to(x.dtype)


def weight_right(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype) * m.weight


def cast_after(m, x):
    h = x.float()
    return (m.weight * (h * root(h))).to(x.dtype)


def cast_after_upcast_weight(m, x):
    h = x.float()
    return ((h * root(h)) * m.weight.float()).type_as(x)


def negative_power(m, x):
    h = x.float()
    return m.weight * (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)).to(x.dtype)


def self_product(m, x):
    h = x.float()
    return m.weight * (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def square(m, x):
    h = x.float()
    return m.weight * (torch.rsqrt(1e-5 + h.square().mean([-1], keepdim=True)) * h).to(x.dtype)


def gemma(m, x):
    h = x.float()
    return (h * root(h) * (1.0 + m.weight.float())).type_as(x)


def narrow_offset(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype) * (1 + m.weight)


def weightless(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype)


def weightless_used_twice(m, x):
    y = weightless(m, x)
    return m.out(y), y


def left_in_fp32(m, x):
    h = x.float()
    return m.weight * (h * root(h))


def weightless_in_fp32(m, x):
    h = x.float()
    return h * root(h)


def t5(m, x):
    """The activation itself is scaled: the product with the fp32 root promotes it."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.weight * (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def cast_twice(m, x):
    return m.weight * (x.float() * root(x.float())).to(x.dtype)


def functional(m, x):
    return F.rms_norm(x, (D,), m.weight, 1e-5)


def functional_default_eps(m, x):
    return F.rms_norm(x, (D,), m.weight)


def functional_weightless(m, x):
    return F.rms_norm(x, (D,), None, 1e-5)


# Spelling -> (function, the op's attributes on bf16 activations and weights).
SPELLINGS = {
    "llama": (llama, {}),
    "weight right": (weight_right, {}),
    "cast after": (cast_after, AFTER),
    "cast after, weight upcast": (cast_after_upcast_weight, AFTER),
    "pow(-0.5)": (negative_power, {}),
    "x * x": (self_product, {}),
    "square": (square, {}),
    "gemma": (gemma, dict(cast="after", offset=1.0)),
    "narrow 1 + weight": (narrow_offset, {}),
    "no weight": (weightless, {}),
    "no weight, used twice": (weightless_used_twice, {}),
    "left in fp32": (left_in_fp32, dict(cast="after", out_dtype=torch.float32)),
    "no weight, left in fp32": (weightless_in_fp32, dict(cast="after", out_dtype=torch.float32)),
    "t5": (t5, {}),
    "cast twice": (cast_twice, {}),
    "functional": (functional, AFTER),
    "functional, default eps": (functional_default_eps, AFTER),
    "functional, no weight": (functional_weightless, AFTER),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_matches_exactly(name, dynamic=False):
    function, attributes = SPELLINGS[name]
    module = Norm(function)
    compiled = check(module, torch.randn(2, 5, D).bfloat16(), dict(norm=1), dynamic=dynamic)
    (node,) = compiled.ops("rms_norm")
    assert node.kwargs == attributes
    assert node.args[2] == pytest.approx(torch.finfo(torch.float32).eps if "default eps" in name else 1e-5, rel=1e-12)
    assert (node.args[1] is None) == ("no weight" in name)
    assert compiled.reasons == []


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "functional"])
def test_spelling_matches_under_dynamic_shapes(name):
    test_spelling_matches_exactly(name, dynamic=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SPELLINGS), *((n, torch.float16) for n in ("llama", "gemma", "left in fp32"))],
    ids=str,
)
def test_spelling_in_other_dtypes(name, dtype):
    compiled = check(Norm(SPELLINGS[name][0], dtype), torch.randn(3, D).to(dtype), dict(norm=1))
    if dtype == torch.float32:  # No cast stands anywhere: "after" says the same as "before" and rounds once.
        (node,) = compiled.ops("rms_norm")
        assert node.kwargs["cast"] == "after" and "out_dtype" not in node.kwargs


@pytest.mark.parametrize("name", ["llama", "cast after", "gemma", "narrow 1 + weight", "left in fp32"])
def test_fp32_weight_on_bf16_activations(name):
    module = Norm(SPELLINGS[name][0], torch.bfloat16, weight_dtype=torch.float32)
    check(module, torch.randn(2, 5, D).bfloat16(), dict(norm=1))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_functional_norm_with_fp32_weight():
    check(Norm(functional, torch.bfloat16, torch.float32), torch.randn(5, D).bfloat16(), dict(norm=1))


def test_weight_that_was_rounded_is_not_read_past_its_cast():
    """``weight.bfloat16().float()`` is not the fp32 weight."""

    def rounded(m, x):
        h = x.float()
        return (h * root(h) * m.weight.bfloat16().float()).to(x.dtype)

    check(Norm(rounded, torch.bfloat16, torch.float32), torch.randn(5, D).bfloat16(), dict(norm=1))


@pytest.mark.parametrize("eps", [None, 1e-6, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nn_rms_norm(dtype, eps):
    module = nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D, eps=eps)).to(dtype)
    nn.init.uniform_(module[1].weight, 0.5, 1.5)
    # Small activations, so that the default eps matters.
    compiled = check(module, (torch.randn(4, D) * 1e-3).to(dtype), dict(norm=1))
    (node,) = compiled.ops("rms_norm")
    assert node.args[2] == (torch.finfo(torch.float32).eps if eps is None else eps)


def test_another_eps_recompiles_under_dynamic_shapes():
    """``dynamic=True`` makes a module's float symbolic; it is a constant of the op, under a guard."""
    module, x = Norm(llama), torch.randn(2, 5, D).bfloat16()
    compiled = compile_with_report(module, dynamic=True)
    for eps in (1e-5, 0.5):
        module.eps = eps
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
        assert compiled.ops("rms_norm")[-1].args[2] == eps


def test_dynamic_lengths_share_one_graph():
    module = Norm(llama)
    compiled = compile_with_report(module, dynamic=True)
    for length in (3, 7, 12):
        x = torch.randn(2, length, D).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
    assert len(compiled.reports) == 1


# --- Residual add --------------------------------------------------------------------------------------------------


def residual(m, x):
    total = x + m.out(x)
    return llama(m, total), total


def residual_of_graph_input(m, x):
    """One decoder layer compiled alone: the residual is the graph's input."""
    return llama(m, m.proj(x) + x)


def residual_not_kept(m, x):
    return cast_after(m, m.out(x) + x)


def two_norms_of_one_sum(m, x):
    total = x + m.out(x)
    return llama(m, total), gemma(m, total), total


RESIDUALS = {
    "sum used later": (residual, {}, 1),
    "sum not used": (residual_not_kept, AFTER, 1),
    "two norms": (two_norms_of_one_sum, None, 2),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_add_joins_the_norm(name, dynamic):
    function, attributes, norms = RESIDUALS[name]
    compiled = check(Norm(function), torch.randn(2, 5, D).bfloat16(), dict(norm=norms), dynamic=dynamic)
    (node,) = compiled.ops("add_rms_norm")
    assert attributes is None or node.kwargs == attributes
    assert len(compiled.ops("rms_norm")) == norms - 1
    assert any(form.startswith("add, ") for form in compiled.forms)


def test_residual_may_be_a_graph_input():
    class Layer(Norm):
        def forward(self, x):
            return self.function(self, x)

    compiled = check(Layer(residual_of_graph_input), torch.randn(2, 5, D).bfloat16(), dict(norm=1))
    assert len(compiled.ops("add_rms_norm")) == 1


def _scaled_add(m, x):
    return llama(m, torch.add(x, m.out(x), alpha=2))


def _broadcast_add(m, x):
    return llama(m, x + m.out(x).mean(1, keepdim=True))


def _scalar_add(m, x):
    return llama(m, x + 1.0)


def _bias_add(m, x):
    return llama(m, x + m.weight)


def _promoting_add(m, x):
    return llama(m, x + m.out(x).float())


@pytest.mark.parametrize("function", [_scaled_add, _broadcast_add, _scalar_add, _bias_add, _promoting_add])
def test_other_sums_stay_in_front_of_a_plain_norm(function):
    compiled = check(Norm(function), torch.randn(2, 5, D).bfloat16(), dict(norm=1))
    assert compiled.ops("add_rms_norm") == []
    assert len(compiled.ops("rms_norm")) == 1


# --- Near misses ---------------------------------------------------------------------------------------------------


def _spelled(m, x, scale):
    h = x.float()
    return m.weight * (h * scale(h)).to(x.dtype)


def _variance_used(m, x):
    h = x.float()
    variance = h.pow(2).mean(-1, keepdim=True)
    return m.weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype), variance


def _root_used(m, x):
    h = x.float()
    scale = root(h)
    return m.weight * (h * scale).to(x.dtype), scale


def _square_used(m, x):
    h = x.float()
    squares = h.pow(2)
    return m.weight * (h * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-5)).to(x.dtype), squares.sum()


def _no_upcast(m, x):
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def _in_double(m, x):
    h = x.double()
    return m.weight * (h * root(h)).to(x.dtype)


def _changed_in_between(m, x):
    x = x.clone()
    scale = root(x.float())
    x.add_(1)
    return m.weight * (x.float() * scale).to(x.dtype)


def _divides(m, x):
    h = x.float()
    return m.weight * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _eps_outside(m, x):
    h = x.float()
    return m.weight * (h / (torch.sqrt(h.pow(2).mean(-1, keepdim=True)) + 1e-5)).to(x.dtype)


def _scales_another(m, x):
    h = x.float()
    return m.weight * (m.out(x).float() * root(h)).to(x.dtype)


def _no_keepdim(m, x):
    x = x[0, :1].expand(D, D)  # Square, so that the lost dimension broadcasts to another one.
    return _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean(-1) + 1e-5))


NEAR_MISSES = {
    "mean over tokens": (
        lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5)),
        "mean is not over the last dimension",
    ),
    "mean over two dimensions": (
        lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + 1e-5)),
        "mean is not over the last dimension",
    ),
    "mean over everything": (
        lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean() + 1e-5)),
        "mean is not over the last dimension",
    ),
    "mean loses its dimension": (_no_keepdim, "mean does not keep its dimension"),
    "no eps": (lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True))), "no eps is added"),
    "eps outside the root": (_eps_outside, "no eps is added"),
    "eps per token": (
        lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).mean(-1, True) + h.abs().amax(-1, True))),
        "eps is not a constant",
    ),
    "eps times alpha": (
        lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(torch.add(h.pow(2).mean(-1, True), 1e-5, alpha=3))),
        "eps is scaled",
    ),
    "divides by the root": (_divides, "divides by a square root"),
    "scales another tensor": (_scales_another, "reciprocal root does not scale x"),
    "changed in between": (_changed_in_between, "reciprocal root does not scale x"),
    "variance used": (_variance_used, "another consumer"),
    "root used": (_root_used, "another consumer"),
    "squares used": (_square_used, "another consumer"),
    "in bf16": (_no_upcast, "computed in torch.bfloat16, not fp32"),
    "in fp64": (_in_double, "computed in torch.float64, not fp32"),
    "functional over two dimensions": (
        lambda m, x: F.rms_norm(x, tuple(x.shape[-2:])),
        "more than the last dimension",
    ),
    "functional in fp64": (lambda m, x: F.rms_norm(x.double(), (D,)), "computed in torch.float64"),
}


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_unfused_and_is_explained(name):
    function, reason = NEAR_MISSES[name]
    compiled = check(Norm(function), torch.randn(2, 5, D).bfloat16(), {})
    assert len(compiled.reasons) == 1 and reason in compiled.reasons[0], compiled.reasons


def _layer_norm(m, x):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return m.weight * (h * root(h)).to(x.dtype)


NO_SITES = {
    "sum instead of mean": lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-5)),
    "layer norm": _layer_norm,
    "mean of cubes": lambda m, x: _spelled(m, x, lambda h: torch.rsqrt(h.pow(3).mean(-1, keepdim=True).abs() + 1e-5)),
}


@pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_rms_norm_is_no_site(name):
    assert check(Norm(NO_SITES[name]), torch.randn(2, 5, D).bfloat16(), {}).reasons == []


def _matrix_weight(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype) * m.matrix


def _scalar_weight(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype) * m.weight[:1]


def _activation_weight(m, x):
    h = x.float()
    return (h * root(h)).to(x.dtype) * m.out(x)


@pytest.mark.parametrize("function", [_matrix_weight, _scalar_weight, _activation_weight])
def test_factor_that_is_no_weight_stays_outside(function):
    compiled = check(Norm(function), torch.randn(2, 5, D).bfloat16(), dict(norm=1))
    (node,) = compiled.ops("rms_norm")
    assert node.args[1] is None
    assert compiled.forms == ["no weight"]
