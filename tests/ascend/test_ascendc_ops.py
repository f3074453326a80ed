"""The Ascend C kernels as operators of PyTorch on ``npu:0``, by the host model or on hardware, against references."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import relative_error
from npu_report import note, on_hardware

from moe_fx.lowering.ascend import gating, repack, swiglu_quant, w4a16
from moe_fx.lowering.ascend.weights import int4_packed

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("kernels")]
HALF = [torch.float16, torch.bfloat16]
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def random_int4(experts, rows, columns, group, dtype, offsets):
    """[packed int32 [E, K, N / 8], scale and offset [E, G, N]] of rows by columns weights."""
    packed = torch.randint(-(2**31), 2**31 - 1, (experts, rows, columns // 8), dtype=torch.int32)
    scale = (torch.rand(experts, rows // group, columns) * 0.02 + 0.01).to(dtype)
    offset = torch.randint(-4, 5, scale.shape).to(dtype) if offsets else None
    return packed, scale, offset


def layer(
    tokens, dtype, *, weights_dtype=torch.float32, hidden=128, inner=64, experts=6, top_k=3, group=32, offsets=True
):
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(torch.int32)
    weights = torch.rand(tokens, top_k).softmax(-1).to(weights_dtype)
    first = random_int4(experts, hidden, 2 * inner, group, dtype, offsets)
    second = random_int4(experts, inner, hidden, group, dtype, offsets)
    return [x, weights, ids, *first, *second]


def on_npu(operands):
    return [operand if operand is None else operand.npu() for operand in operands]


def dense(operands):
    """The layer in fp64."""
    x, weights, ids, w13, s13, o13, w2, s2, o2 = operands

    def wide(packed, scale, offset):
        nibbles = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 0xF
        signed = torch.where(nibbles >= 8, nibbles - 16, nibbles).flatten(-2).double()
        grouped = signed.unflatten(1, (scale.shape[1], -1))
        grouped = grouped + (0 if offset is None else offset.double().unsqueeze(2))
        return (grouped * scale.double().unsqueeze(2)).flatten(1, 2)

    up, down = wide(w13, s13, o13), wide(w2, s2, o2)
    y = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for place, expert in enumerate(row):
            if 0 <= expert < len(up):
                g, u = (x[token].double() @ up[expert]).chunk(2)
                y[token] += weights[token, place].double() * ((torch.nn.functional.silu(g) * u) @ down[expert])
    return y


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_experts(tokens, dtype):
    operands = layer(tokens, dtype, offsets=tokens % 2 == 0, weights_dtype=dtype if tokens % 3 else torch.float32)
    y = torch.ops.moe_fx_ascend.experts_w4a16(*on_npu(operands))
    assert y.dtype == dtype and y.device.type == "npu"
    assert note(relative_error(y.cpu(), dense(operands))) < BOUND[dtype]


def test_experts_skip_ids_of_none_and_add_up_repeated_ones():
    operands = layer(4, torch.bfloat16)
    operands[2] = torch.tensor([[-1, 2, 0], [3, 3, -1], [-1, -1, -1], [5, 6, 1]], dtype=torch.int32)
    y = torch.ops.moe_fx_ascend.experts_w4a16(*on_npu(operands)).cpu()
    assert relative_error(y, dense(operands)) < BOUND[torch.bfloat16]
    assert not y[2].any()


def test_experts_without_the_kernel_compute_the_same():
    operands = on_npu(layer(4, torch.float16, offsets=False))
    operands[2][0, 0] = -1
    want = w4a16.experts_w4a16(*operands).cpu()
    assert relative_error(torch.ops.moe_fx_ascend.experts_w4a16(*operands).cpu(), want) < BOUND[torch.float16]


def test_activations_may_be_views_and_tokens_none():
    operands = on_npu(layer(3, torch.bfloat16))
    want = torch.ops.moe_fx_ascend.experts_w4a16(*operands).cpu()
    views = [operand.t().contiguous().t() for operand in operands[:3]]
    assert torch.equal(torch.ops.moe_fx_ascend.experts_w4a16(*views, *operands[3:]).cpu(), want)
    empty = [operand[:0] for operand in operands[:3]]
    assert torch.ops.moe_fx_ascend.experts_w4a16(*empty, *operands[3:]).shape == (0, 128)


@pytest.mark.skipif(on_hardware(), reason="calls the operator in GE's place")
def test_the_ge_operator_takes_no_tokens():
    """Torchair leaves out what it knows to be empty; a dynamic size it may not know."""
    from host_cann import custom_ops

    operands = layer(3, torch.bfloat16)
    y = custom_ops.run("MoeFxExpertsW4A16", operands)
    assert torch.equal(y, torch.ops.moe_fx_ascend.experts_w4a16(*on_npu(operands)).cpu())
    empty = custom_ops.run("MoeFxExpertsW4A16", [*(operand[:0] for operand in operands[:3]), *operands[3:]])
    assert (empty.shape, empty.dtype) == ((0, 128), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "experts_w4a16: x is Float; it must be one of"),
        (lambda a: a.__setitem__(2, a[2].long()), "ids is Long"),
        (lambda a: a.__setitem__(3, a[3][:, :64]), r"w13 is \[6, 64, 16\]; it must be \[6, 128, 16\]"),
        (lambda a: a.__setitem__(5, None), "give both offsets, or none"),
        (lambda a: a.__setitem__(4, a[4].cpu()), "w13_scale is on cpu, other operands on npu:0"),
        (lambda a: a.__setitem__(3, a[3].transpose(1, 2).contiguous().transpose(1, 2)), "give w13.contiguous()"),
    ],
)
def test_errors_teach(change, message):
    operands = on_npu(layer(2, torch.bfloat16))
    change(operands)
    with pytest.raises(ValueError, match=message):
        torch.ops.moe_fx_ascend.experts_w4a16(*operands)


def test_more_tokens_than_the_kernel_takes():
    with pytest.raises(ValueError, match="experts_w4a16: tokens"):
        torch.ops.moe_fx_ascend.experts_w4a16(*on_npu(layer(9, torch.bfloat16)))
    args = (8, 128, 64, 6, 3)
    refusal = torch.ops.moe_fx_ascend.experts_w4a16_refusal
    assert refusal(*args, 4, 2) == ""
    assert "group" in refusal(*args, 8, 4) and "not of one size" in refusal(*args, 4, 1)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gemv(tokens, dtype):
    packed, scale, offset = random_int4(1, 256, 384, 64, dtype, tokens != 3)
    operands = [torch.randn(tokens, 256).to(dtype), packed[0], scale[0], None if offset is None else offset[0]]
    wide = [operand if operand is None or operand.dtype == torch.int32 else operand.double() for operand in operands]
    y = torch.ops.moe_fx_ascend.gemv_w4a16(*on_npu(operands))
    assert y.dtype == dtype and note(relative_error(y.cpu(), w4a16.gemv_w4a16(*wide))) < BOUND[dtype]


ROUTERS = {
    "softmax": dict(top_k=8, renormalize="eps"),
    "sigmoid, bias, groups": dict(
        top_k=8,
        score="sigmoid",
        n_group=8,
        topk_group=4,
        group_score="top2sum",
        renormalize="eps",
        eps=1e-20,
        scale=2.5,
    ),
    "sqrtsoftplus": dict(top_k=6, score="sqrtsoftplus", renormalize="clamp", eps=1e-12, scale=1.5),
    "selected first": dict(top_k=4, order="after"),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gating(name, dtype):
    bias = torch.randn(128) * 0.1 if "bias" in name else None
    logits = torch.randn(50, 128).to(dtype)
    weights, ids = torch.ops.moe_fx_ascend.gating_topk(
        logits.npu(), None if bias is None else bias.npu(), **ROUTERS[name]
    )
    want, want_ids = gating.gating_topk(logits, bias, **ROUTERS[name])
    order = lambda w, i: (i.long().sort(-1).values, w.gather(-1, i.long().sort(-1).indices))  # noqa: E731
    (got_i, got_w), (want_i, want_w) = order(weights.cpu(), ids.cpu()), order(want, want_ids)
    tied = dtype != torch.float32  # Equal logits are common among halves, and either may be chosen.
    rows = (got_i == want_i).all(-1)
    assert rows.float().mean() > (0.8 if tied else 0.99)
    torch.testing.assert_close(got_w[rows], want_w[rows], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_swiglu_dynamic_quant(dtype, limit):
    x = torch.randn(7, 2 * 320).to(dtype) * 3
    y, scale = torch.ops.moe_fx_ascend.swiglu_dynamic_quant(x.npu(), limit)
    want, want_scale = swiglu_quant.swiglu_dynamic_quant(x, limit)
    torch.testing.assert_close(scale.cpu(), want_scale, atol=0, rtol=1e-2)
    assert (y.cpu().int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("layout", "shape"), [("awq", (3, 64, 16)), ("gptq", (3, 8, 128)), ("compressed_tensors", (3, 128, 8))]
)
def test_repack(layout, shape):
    gate, up = (torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32) for _ in range(2))
    want = repack.repack_int4([gate, up], layout)
    assert want.shape == (3, 64, 32)
    assert torch.equal(torch.ops.moe_fx_ascend.repack_int4([gate.npu(), up.npu()], layout).cpu(), want)


@pytest.mark.parametrize("layout", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_offsets(layout, dtype):
    zeros = [torch.randint(-(2**31), 2**31 - 1, (2, 3, 8), dtype=torch.int32) for _ in range(2)]
    want = repack.int4_offsets(zeros, layout, dtype)
    got = torch.ops.moe_fx_ascend.int4_offsets([words.npu() for words in zeros], layout, dtype)
    assert got.dtype == dtype and torch.equal(got.cpu(), want)


def test_the_recipe_of_int4_weights_takes_the_kernel():
    nibbles = torch.randint(0, 256, (2, 64, 48), dtype=torch.uint8)
    assert torch.equal(int4_packed(nibbles.npu()).cpu(), int4_packed(nibbles))


@pytest.mark.skipif(on_hardware(), reason="faults are the host model's to find")
def test_a_fault_of_the_kernel_is_an_error(monkeypatch):
    """Memory that ends early: the host model sees the kernel go beyond."""
    snapshot = torch.npu.memory_snapshot

    def halved():
        return [
            {"blocks": [{**block, "requested_size": block["requested_size"] // 2} for block in segment["blocks"]]}
            for segment in snapshot()
        ]

    operands = on_npu(layer(2, torch.bfloat16))
    monkeypatch.setattr(torch.npu, "memory_snapshot", halved)
    with pytest.raises(RuntimeError, match="the host model found faults in moe_w4a16_decode_bfloat16_float:\n  out of"):
        torch.ops.moe_fx_ascend.experts_w4a16(*operands)
    monkeypatch.undo()
    assert torch.ops.moe_fx_ascend.experts_w4a16(*operands).isfinite().all(), "the device still works"
