"""Every canonical op keeps its contract: schema, fake kernel, and a reference that agrees with float64 arithmetic."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_fx.lowering.ops import CANONICAL_OPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = list(CANONICAL_OPS)


def samples(name, dtype):
    return list(CANONICAL_OPS[name].samples(dtype, torch.Generator().manual_seed(0)))


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def every_sample(names=NAMES, dtypes=DTYPES):
    """(op, dtype, sample) with readable ids; samples share tensors of small size only."""
    return [
        pytest.param(name, dtype, sample, id=f"{name}-{str(dtype)[6:]}-{sample.name}")
        for name in names
        for dtype in dtypes
        for sample in samples(name, dtype)
    ]


# --- Schema -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_the_reference_signature(name):
    op = CANONICAL_OPS[name]
    declared = op.overload._schema.arguments
    signature = inspect.signature(op.reference).parameters.values()
    assert [a.name for a in declared] == [p.name for p in signature]
    for argument, parameter in zip(declared, signature, strict=True):
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY), argument.name
        assert argument.has_default_value() == (parameter.default is not parameter.empty), argument.name
        if isinstance(parameter.default, torch.dtype):
            # Schemas keep dtypes as numbers; a full call with the default left out tells which one it is.
            assert (argument.default_value, parameter.default) == (6, torch.float32), argument.name
        elif argument.has_default_value():
            assert argument.default_value == parameter.default, argument.name


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_documented(name):
    """The docstring is the op's specification: it names every argument and says what comes back."""
    doc = CANONICAL_OPS[name].doc
    assert "Returns:" in doc and "[" in doc
    if name == "add_rms_norm":
        doc += CANONICAL_OPS["rms_norm"].doc  # It refers to it.
    missing = [a.name for a in CANONICAL_OPS[name].overload._schema.arguments if a.name not in doc]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_to_or_aliased(name):
    schema = CANONICAL_OPS[name].overload._schema
    assert not schema.is_mutable
    assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for sample in samples(name, torch.float32):
        torch.library.opcheck(
            CANONICAL_OPS[name].overload,
            sample.args,
            dict(sample.kwargs),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(("name", "dtype", "sample"), every_sample())
def test_fake_results_are_like_real_ones(name, dtype, sample):
    op = CANONICAL_OPS[name].overload
    real = outputs(op(*sample.args, **sample.kwargs))
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in sample.args]
        fake = outputs(op(*args, **sample.kwargs))
    for is_real, is_fake in zip(real, fake, strict=True):
        assert (is_real.shape, is_real.dtype, is_real.stride()) == (is_fake.shape, is_fake.dtype, is_fake.stride())


# Arguments whose first dimension counts tokens.
TOKEN_ARGUMENTS = dict(
    route=("logits",),
    experts=("x", "weights", "ids"),
    experts_int8=("x", "weights", "ids"),
    experts_int4=("x", "weights", "ids"),
    rms_norm=("x",),
    add_rms_norm=("x", "residual"),
    qk_norm_rope=("q", "k"),
    swiglu=("gate", "up"),
    attention=("q", "k", "v"),
)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_tokens_may_be_symbolic(name):
    """One symbol goes in, the same one comes out, and nothing is assumed about it."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    op = CANONICAL_OPS[name]
    sample = samples(name, torch.float32)[-1]
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    from torch._dynamo.source import ConstantSource

    args = []
    for i, (argument, given) in enumerate(zip(op.overload._schema.arguments, sample.args, strict=False)):
        if not isinstance(given, torch.Tensor):
            args.append(given)
            continue
        dims = [DimDynamic.STATIC] * given.dim()
        if argument.name in TOKEN_ARGUMENTS[name]:
            dims[0] = DimDynamic.DUCK
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        args.append(mode.from_tensor(given, symbolic_context=context, source=ConstantSource(f"arg{i}")))
    with mode:
        fake = outputs(op.overload(*args, **sample.kwargs))
    real = outputs(op.overload(*sample.args, **sample.kwargs))
    for is_real, is_fake in zip(real, fake, strict=True):
        assert isinstance(is_fake.shape[0], torch.SymInt)
        assert is_fake.shape[0].node.expr == args[0].shape[0].node.expr
        assert is_fake.shape[1:] == is_real.shape[1:]
    assert [g for g in env.guards if "Eq" in str(g.expr)] == []


# --- The references against float64, written another way --------------------------------------------------------------


def _norm64(x, weight, eps, *, cast="before", offset=0.0, out_dtype=None):
    y = x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return y if weight is None else y * (weight + offset)


def _add_norm64(x, residual, weight, eps, **kwargs):
    return _norm64(x + residual, weight, eps, **kwargs), x + residual


def _rope64(x, cos, sin, rope):
    """Rotation of pairs as complex numbers."""
    full = rope in ("half", "interleaved_full")
    width = cos.shape[-1] * (1 if full else 2)
    if rope == "half":
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    elif rope == "interleaved_full":
        cos, sin = cos[..., ::2], sin[..., ::2]
    head, rest = x[..., :width], x[..., width:]
    by_half = rope in ("half", "half_split")
    pairs = torch.stack(head.chunk(2, -1), -1) if by_half else head.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    kept = rope in ("interleaved", "interleaved_full")
    head = turned.flatten(-2) if kept else torch.cat(turned.unbind(-1), -1)
    return torch.cat((head, rest), -1)


def _qk_norm_rope64(q, k, q_weight, k_weight, cos, sin, eps, *, norm="head", rope="half"):
    def one(x, weight):
        y = _norm64(x.flatten(-2) if norm == "full" else x, weight, eps).view(x.shape)
        return _rope64(y, cos.unsqueeze(-2), sin.unsqueeze(-2), rope).transpose(1, 2)

    return one(q, q_weight), one(k, k_weight)


def _attention64(q, k, v, mask=None, *, is_causal=False, scale=None, gqa="repeat"):
    """One query of one head at a time."""
    n_batch, n_heads, n_queries, width = q.shape
    group = n_heads // k.shape[1]
    scale = width**-0.5 if scale is None else scale
    bias = torch.zeros(n_batch, n_heads, n_queries, k.shape[2], dtype=q.dtype)
    if is_causal:
        bias += torch.full_like(bias, -torch.inf).triu(1)
    elif mask is not None:
        bias += (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
    y = torch.empty(n_batch, n_heads, n_queries, v.shape[-1], dtype=q.dtype)
    for batch in range(n_batch):
        for head in range(n_heads):
            keys, values = k[batch, head // group], v[batch, head // group]
            for i in range(n_queries):
                e = ((keys @ q[batch, head, i]) * scale + bias[batch, head, i]).exp()
                y[batch, head, i] = e @ values / e.sum()
    return y


def _activate64(gate, up, act, alpha, limit):
    if act == "silu_then_clamp":
        return (gate / (1 + (-gate).exp())).clamp(max=limit) * up.clamp(-limit, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if act == "swiglu_oai":
        return gate / (1 + (-alpha * gate).exp()) * (up + 1)
    if act == "relu2":
        return gate.clamp(min=0) ** 2
    if act == "gelu_tanh":
        return 0.5 * gate * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) * up
    return gate / (1 + (-gate).exp()) * up


def _halves64(h, layout):
    if layout == "none":
        return h, None
    if layout == "interleaved":
        return h.unflatten(-1, (-1, 2)).unbind(-1)
    first, second = h.unflatten(-1, (2, -1)).unbind(-2)
    return (second, first) if layout == "up_gate" else (first, second)


def _swiglu64(gate, up=None, *, act="silu", layout="gate_up", alpha=1.702, limit=None):
    if up is None:
        gate, up = _halves64(gate, layout)
    return _activate64(gate, up, act, alpha, limit)


def _experts64(
    x, weights, ids, w13, w2, b13=None, b2=None, w3=None, b3=None, *, act="silu", layout="gate_up", transposed=False,
    weight_on="output", alpha=1.702, limit=None,
):  # fmt: skip
    """One pair of token and expert at a time."""
    y = torch.zeros_like(x)
    for token in range(ids.shape[0]):
        for weight, e in zip(weights[token], ids[token].tolist(), strict=True):
            row = x[token] * weight if weight_on == "input" else x[token]
            up_matrix, down_matrix = (w[e].T if transposed else w[e] for w in (w13, w2))
            gate = up_matrix @ row + (0 if b13 is None else b13[e])
            gate, up = (gate, w3[e] @ row) if w3 is not None else _halves64(gate, layout)
            out = down_matrix @ _activate64(gate, up, act, alpha, limit) + (0 if b2 is None else b2[e])
            y[token] += out * weight if weight_on == "output" else out
    return y


def _experts_int8_64(x, weights, ids, w13, w13_scale, w2, w2_scale, *, dynamic_activations=False):
    """W8A16 by widening the weights; W8A8 by rounding every row to its own 255 steps first."""
    if not dynamic_activations:
        return _experts64(x, weights, ids, w13.double() * w13_scale[..., None], w2.double() * w2_scale[..., None])

    def rounded(row):
        step = row.abs().max() / 127
        return (row / step).round() * step

    y = torch.zeros_like(x)
    for token in range(ids.shape[0]):
        for weight, e in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = ((w13[e].double() * w13_scale[e][:, None]) @ rounded(x[token])).chunk(2)
            h = gate / (1 + (-gate).exp()) * up
            y[token] += (w2[e].double() * w2_scale[e][:, None]) @ rounded(h) * weight
    return y


def _experts_int4_64(
    x, weights, ids, w13, w13_scale, w2, w2_scale, w13_zero=None, w2_zero=None, *, dynamic_activations=False
):
    """Nibble by nibble; W4A8 by rounding every group of a row to its own 255 steps first."""

    def widen(packed, scale, zero):
        size = packed.shape[-1] * 2
        group = size // scale.shape[-1]
        columns = []
        for i in range(size):
            nibble = (packed[..., i // 2].int() >> (4 * (i % 2))) % 16
            middle = 8 if zero is None else zero[..., i // group].int()
            columns.append((nibble - middle).double() * scale[..., i // group])
        return torch.stack(columns, -1)

    w13, w2 = widen(w13, w13_scale, w13_zero), widen(w2, w2_scale, w2_zero)
    if not dynamic_activations:
        return _experts64(x, weights, ids, w13, w2)

    def rounded(row, n_groups):
        parts = row.chunk(n_groups)
        steps = [part.abs().max() / 127 for part in parts]
        return torch.cat([(part / step).round() * step for part, step in zip(parts, steps, strict=True)])

    y = torch.zeros_like(x)
    for token in range(ids.shape[0]):
        for weight, e in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (w13[e] @ rounded(x[token], w13_scale.shape[-1])).chunk(2)
            h = gate / (1 + (-gate).exp()) * up
            y[token] += w2[e] @ rounded(h, w2_scale.shape[-1]) * weight
    return y


IN_FLOAT64 = dict(
    experts_int8=_experts_int8_64,
    experts_int4=_experts_int4_64,
    rms_norm=_norm64,
    add_rms_norm=_add_norm64,
    qk_norm_rope=_qk_norm_rope64,
    swiglu=_swiglu64,
    attention=_attention64,
    experts=_experts64,
)


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_within_tolerance(got, want, tolerance):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance.rtol, atol=tolerance.atol)
    assert (got.double() - want.double()).norm() <= tolerance.rel_l2 * want.double().norm()


@pytest.mark.parametrize(("name", "dtype", "sample"), every_sample(list(IN_FLOAT64)))
def test_reference_agrees_with_float64(name, dtype, sample):
    op = CANONICAL_OPS[name]
    got = outputs(op.overload(*sample.args, **sample.kwargs))
    want = outputs(IN_FLOAT64[name](*map(_wide, sample.args), **sample.kwargs))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        assert_within_tolerance(one, other, op.tolerance[dtype])


def _scores64(z, score):
    return {
        "softmax": lambda: z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + (-z).exp()),
        "sqrtsoftplus": lambda: (1 + z.exp()).log().sqrt(),
    }[score]()


def _choice64(logits, bias, kwargs):
    """What experts are selected on, with those outside the best groups filled, and the tokens whose groups tie."""
    scores = logits if kwargs.get("order") == "after" else _scores64(logits, kwargs.get("score", "softmax"))
    choice = scores if bias is None else scores + bias
    n_group = kwargs.get("n_group", 1)
    if n_group == 1:
        return choice, torch.zeros(len(choice), dtype=torch.bool)
    groups = choice.view(*choice.shape[:-1], n_group, -1)
    best_two = groups.sort(-1, descending=True).values[..., :2]
    of_group = best_two.sum(-1) if kwargs.get("group_score") == "top2sum" else best_two[..., 0]
    rank = of_group.argsort(-1, descending=True).argsort(-1)
    fill = 0.0 if kwargs.get("group_fill") == "zero" else float("-inf")
    last_in, first_out = of_group.sort(-1, descending=True).values[:, kwargs["topk_group"] - 1 :][:, :2].unbind(-1)
    return groups.masked_fill((rank >= kwargs["topk_group"]).unsqueeze(-1), fill).flatten(-2), last_in == first_out


@pytest.mark.parametrize(("name", "dtype", "sample"), every_sample(["route"]))
def test_route_agrees_with_float64(name, dtype, sample):
    logits, bias = map(_wide, sample.args)
    kwargs, tolerance = sample.kwargs, CANONICAL_OPS["route"].tolerance[dtype]
    weights, ids = CANONICAL_OPS["route"].overload(*sample.args, **kwargs)
    choice, tied = _choice64(logits, bias, kwargs)
    picked = choice.gather(-1, ids.long())
    best = choice.sort(-1, descending=True).values[..., : kwargs["top_k"]]
    # Equal sets of experts, up to those that are chosen on equal values (half-precision logits repeat).
    assert tied.double().mean() <= 0.1
    torch.testing.assert_close(picked.sort(-1, descending=True).values[~tied], best[~tied], rtol=1e-6, atol=1e-9)
    assert all(len(set(row)) == kwargs["top_k"] for row in ids.tolist())
    if kwargs.get("sorted", True):
        assert (picked[~tied].diff(dim=-1) <= 1e-9).all()
    if kwargs.get("order") == "after":
        want = _scores64(logits.gather(-1, ids.long()), kwargs.get("score", "softmax"))
    else:
        want = _scores64(logits, kwargs.get("score", "softmax")).gather(-1, ids.long())
    if kwargs.get("renormalize", "none") != "none":
        want = want / want.sum(-1, keepdim=True)
    assert weights.dtype == kwargs.get("out_dtype", kwargs.get("score_dtype", torch.float32))
    assert_within_tolerance(weights, want * kwargs.get("scale", 1.0), tolerance)


# --- The downstream compiler on the references ------------------------------------------------------------------------

COMPOSITES = [name for name, op in CANONICAL_OPS.items() if op.fake is None]
# The widest samples: several dimensions, grouped selection, partial rotation.
INDUCTOR = dict(
    route=("qwen3_moe-T5", "deepseek_v3-T64"),
    rms_norm=("cast_before-2x5x128", "offset-3x4x2x16"),
    add_rms_norm=("cast_after-2x5x128",),
    qk_norm_rope=("half-head-R8-S7", "interleaved-full-R16-S1"),
    swiglu=("merged-2x5x48", "interleaved_oai-2x5x48"),
    attention=("repeat-causal-Hkv2", "native-mask", "mla"),
)


def test_composites_are_all_listed():
    assert sorted(INDUCTOR) == sorted(COMPOSITES)


@pytest.mark.parametrize("name", COMPOSITES)
def test_inductor_stays_within_tolerance(name):
    """Composite ops are handed to Inductor as their references; it fuses and may keep intermediates wider."""
    op = CANONICAL_OPS[name]
    chosen = [s for s in samples(name, torch.bfloat16) if s.name in INDUCTOR[name]]
    assert len(chosen) == len(INDUCTOR[name])

    def run_all():
        return [op.overload(*sample.args, **sample.kwargs) for sample in chosen]

    for got, want in zip(torch.compile(run_all)(), run_all(), strict=True):
        for one, other in zip(outputs(got), outputs(want), strict=True):
            if one.dtype == torch.int32:
                assert torch.equal(one.sort(-1).values, other.sort(-1).values)
            else:
                assert_within_tolerance(one, other, op.tolerance[torch.bfloat16])
