"""Every canonical op on torch_npu's operators, against its reference; and why some calls keep the reference."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from lowered_op import difference, graph_of, kernel, run

from moe_fx.lowering.ascend.arguments import bound
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.ascend.target import AscendTarget
from moe_fx.lowering.ops import CANONICAL_OPS

pytestmark = pytest.mark.npu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]


def samples(op, dtype):
    return list(CANONICAL_OPS[op].samples(dtype, torch.Generator().manual_seed(0)))


def lowered(op, dtype, settings=None):
    """The kernels of an op's samples, after checking the results of those that are lowered."""
    kernels = {}
    for sample in samples(op, dtype):
        case = (op, sample.args, dict(sample.kwargs), settings)
        kernels[sample.name] = kernel(*case)
        if kernels[sample.name].startswith("torch_npu"):
            assert difference(*case) == "", sample.name
    return kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(dtype):
    kernels = lowered("route", dtype)
    by_family = {name.rsplit("-", 1)[0]: text for name, text in kernels.items()}
    assert by_family == {
        "qwen3_moe": "torch_npu npu_moe_gating_top_k_softmax",
        "mixtral": "torch_npu npu_moe_gating_top_k_softmax",
        "gpt_oss": "torch_npu npu_moe_gating_top_k_softmax_v2",
        "deepseek_v2": "torch_npu npu_moe_gating_top_k",
        "deepseek_v3": "torch_npu npu_moe_gating_top_k",
        "minimax_m2": "torch_npu npu_moe_gating_top_k",
        "deepseek_v4": "torchair (fused reference): no gating operator scores with sqrtsoftplus",
        "ernie4_5": "torch_npu npu_moe_gating_top_k",
    }


@pytest.mark.parametrize(
    "attributes",
    [
        dict(score="sigmoid"),
        dict(score="sigmoid", scale=2.5),
        dict(score="sigmoid", renormalize="clamp", eps=1e-9, scale=2.0),
        dict(score="softmax", n_group=4, topk_group=2, renormalize="eps", eps=1e-9, scale=2.0),
        dict(score="softmax", order="after", renormalize="eps", scale=0.5),
        dict(score="softmax", scale=3.0, out_dtype=torch.bfloat16),
        dict(score="sigmoid", n_group=4, topk_group=2, group_score="top2sum", renormalize="eps", eps=1e-20),
        dict(score="sigmoid", n_group=4, topk_group=1, group_score="max", group_fill="zero", renormalize="eps"),
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_route_attributes(attributes, biased):
    logits = torch.randn(9, 32)
    if biased and (attributes.get("order") == "after" or attributes.get("group_fill") == "zero"):
        pytest.skip("refused; see test_refusals")
    bias = torch.randn(32) * 0.1 if biased else None
    assert difference("route", (logits, bias), dict(top_k=4, **attributes)) == ""
    assert difference("route", (logits.view(3, 3, 32), bias), dict(top_k=4, **attributes)) == ""


@pytest.mark.parametrize(
    ("attributes", "biased", "reason"),
    [
        (dict(score="tanh"), False, "no gating operator scores with tanh"),
        (dict(score="sigmoid", order="after"), False, "selects first and scores with sigmoid"),
        (dict(order="after"), True, "biased or grouped logits"),
        (dict(order="after", n_group=4, topk_group=2), False, "biased or grouped logits"),
        (dict(score_dtype=torch.bfloat16), False, "rounded to torch.bfloat16"),
        (dict(score="sigmoid", weight_source="choice"), True, "weights are the biased scores"),
        (dict(score="sigmoid", n_group=16, topk_group=8), False, "groups of 2 experts"),
        (dict(score="sigmoid", n_group=8, topk_group=1, top_k=6), False, "more than the kept groups hold"),
        (dict(score="sigmoid", n_group=4, topk_group=2, group_fill="zero"), True, "beats a negative biased score"),
    ],
    ids=str,
)
def test_route_refusals(attributes, biased, reason):
    bias = torch.randn(32) if biased else None
    assert reason in kernel("route", (torch.randn(5, 32), bias), {"top_k": 4, **attributes})


@pytest.mark.parametrize("combine", ["finalize_routing", "token_unpermute"])
@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "as_is"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(dtype, prepare, combine):
    kernels = lowered("experts", dtype, Settings(combine=combine, prepare=prepare))
    assert all(text.startswith("torch_npu grouped_matmul") and text.endswith(combine) for text in kernels.values())
    assert "swiglu" in kernels["silu-T3"] and "clipped_swiglu" in kernels["gpt_oss-T3"]
    assert "activation in ATen" in kernels["up_gate-gelu_tanh-T3"]


def test_experts_with_ids_of_no_expert():
    args = list(samples("experts", torch.float32)[2].args)
    args[2] = args[2].clone()
    args[2][0, 0], args[2][1, 1], args[2][2, :] = 8, -1, 1000
    assert difference("experts", tuple(args), {}) == ""


def test_experts_with_biases_give_nothing_to_ids_of_no_expert():
    """A row of zeros comes out of an expert with biases as something else."""
    x, weights, ids, w13, w2, *_ = samples("experts", torch.float32)[2].args
    ids = ids.clone()
    ids[0, 0], ids[2, :] = 8, -1
    biases = torch.randn(w13.shape[:2]), torch.randn(w2.shape[:2])
    for weight_on in ("input", "output"):
        assert difference("experts", (x, weights, ids, w13, w2, *biases), dict(weight_on=weight_on)) == ""


def test_experts_with_weights_in_x_dtype():
    args = list(samples("experts", torch.bfloat16)[2].args)
    args[1] = args[1].bfloat16()
    assert difference("experts", tuple(args), {}) == ""
    assert run("experts", tuple(args), dict(out_dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("layout", ["interleaved", "up_gate"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_layouts_of_silu(layout, transposed):
    args = list(samples("experts", torch.float32)[2].args)
    if transposed:
        args[3], args[4] = args[3].transpose(1, 2).contiguous(), args[4].transpose(1, 2).contiguous()
    case = ("experts", tuple(args), dict(layout=layout, transposed=transposed))
    assert "swiglu" in kernel(*case)
    assert difference(*case) == ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_experts_int8(dtype):
    kernels = lowered("experts_int8", dtype)
    assert "swiglu_quant_v2" in kernels["W8A8-T9"] and "W8A16" in kernels["W8A16-T9"]
    assert all(text.startswith("torch_npu") for text in kernels.values())


@pytest.mark.parametrize("dynamic", [False, True], ids=["W8A16", "W8A8"])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_experts_int8_with_biases(layout, act, dynamic):
    args = [
        *samples("experts_int8", torch.bfloat16)[1].args,
        torch.randn(6, 64).bfloat16(),
        torch.randn(6, 64).bfloat16(),
    ]
    kwargs = dict(layout=layout, act=act, dynamic_activations=dynamic)
    assert difference("experts_int8", tuple(args), kwargs) == ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_experts_int4(dtype):
    kernels = lowered("experts_int4", dtype)
    assert kernels["W4A16-zeros-T9"] == "torch_npu grouped_matmul (W4A16) + swiglu + finalize_routing"
    assert "no int4 weights with int8 activations" in kernels["W4A8-zeros-T9"]


@pytest.mark.parametrize("layout", ["up_gate", "interleaved"])
def test_experts_int4_layouts(layout):
    args = samples("experts_int4", torch.float16)[3].args
    assert difference("experts_int4", args, dict(layout=layout)) == ""


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype, op):
    kernels = lowered(op, dtype)
    assert kernels["cast_before-2x5x128"] == kernels["cast_after-2x5x128"] == f"torch_npu npu_{op}"
    assert "added to the weight" in kernels["offset-2x5x128"] and "no weight" in kernels["no_weight-2x5x128"]


def test_norm_refusals():
    x, weight = torch.randn(3, 16), torch.randn(16)
    assert "the weight is" in kernel("rms_norm", (x.bfloat16(), weight, 1e-6), {})
    assert "the result is" in kernel("rms_norm", (x, weight, 1e-6), dict(cast="after", out_dtype=torch.float16))
    assert "rank 2" in kernel("rms_norm", (x[0], weight, 1e-6), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    kernels = lowered("swiglu", dtype)
    assert kernels["merged-2x5x48"] == "torch_npu npu_swiglu"
    assert kernels["interleaved_oai-2x5x48"] == "torch_npu npu_clipped_swiglu"
    assert (
        "two tensors" in kernels["separate-2x5x48"] and "no operator computes gelu_tanh" in kernels["gelu_tanh-2x5x48"]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope(dtype):
    kernels = lowered("qk_norm_rope", dtype)
    on_npu = {name for name, text in kernels.items() if text == "torch_npu rms_norm + rotary_mul"}
    assert on_npu == {name for name in kernels if name.startswith("half-")}
    assert "npu_rotary_mul rotates halves" in kernels["interleaved-head-R16-S7"]


@pytest.mark.parametrize("layout", ["bnsd", "bsnd"])
def test_qk_norm_rope_layouts(layout):
    sample = next(s for s in samples("qk_norm_rope", torch.float32) if s.name == "half-full-R8-S7")
    assert difference("qk_norm_rope", sample.args, dict(sample.kwargs, layout=layout)) == ""


def test_qk_norm_rope_refusals():
    sample = next(s for s in samples("qk_norm_rope", torch.bfloat16) if s.name == "half-head-R16-S7")
    assert "biases" in kernel("qk_norm_rope", sample.args, dict(q_bias=torch.randn(16).bfloat16()))
    assert "another dtype" in kernel("qk_norm_rope", sample.args, dict(rope_dtype=torch.float32))


TOKEN_INPUTS = dict(
    route=1, experts=3, experts_int8=3, experts_int4=3, rms_norm=1, add_rms_norm=2, swiglu=2, qk_norm_rope=2
)


@pytest.mark.parametrize("combine", ["finalize_routing", "token_unpermute"])
@pytest.mark.parametrize("op", TOKEN_INPUTS)
def test_the_number_of_tokens_stays_symbolic(op, combine):
    integers = []
    for sample in samples(op, torch.bfloat16):
        if sample.args[0].shape[0] < 2:  # Graphs for one are graphs of their own.
            continue
        gm, _ = graph_of(op, sample.args, dict(sample.kwargs), dynamic=TOKEN_INPUTS[op])
        tokens = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
        known = list(tokens.node.shape_env.guards)
        AscendTarget(Settings(combine=combine)).lower(gm, "torchair")
        assert tokens.node.maybe_as_int() is None and tokens.node.shape_env.guards == known, sample.name
        for node in gm.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "npu":
                kinds = {argument.name: str(argument.real_type) for argument in node.target._schema.arguments}
                given = bound(node)
                integers += [given[name] for name in given if kinds[name] in ("int", "Optional[int]")]
    assert all(given is None or isinstance(given, int) for given in integers)
    assert integers or "norm" in op
