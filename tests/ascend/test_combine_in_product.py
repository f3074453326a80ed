"""Int8 experts whose second product combines too (npu_grouped_matmul_finalize_routing), and where it does not apply."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

from types import SimpleNamespace

import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from host_cann.npu_ops import npu_grouped_matmul_finalize_routing
from lowered_op import difference, graph_of, kernel, run
from model_cases import EXPERTS_INT8, HIDDEN_INT8, Int8Layer, quantised
from npu_report import on_hardware

from moe_fx.check import compare_outputs
from moe_fx.lowering.ascend import experts_int8
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.ascend.target import AscendTarget
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.options import Options

IN_PRODUCT = Settings(combine_in_product=True)
FUSED = "torch_npu grouped_matmul_swiglu_quant_v2 + grouped_matmul (W8A8) + grouped_matmul_finalize_routing"
HIDDEN, EXPERTS, INNER, TOP_K = HIDDEN_INT8, EXPERTS_INT8, 48, 2
W8A8 = dict(dynamic_activations=True)


def operands(dtype=torch.bfloat16, tokens=9, n_experts=EXPERTS, hidden=HIDDEN, inner=INNER):
    """Arguments of ``experts_int8``; the first expert gets no token."""
    ids = torch.stack([torch.randperm(n_experts - 1)[:TOP_K] + 1 for _ in range(tokens)]).to(torch.int32)
    weights = torch.rand(tokens, TOP_K)
    x = torch.randn(tokens, hidden).to(dtype)
    return (x, weights, ids, *quantised(n_experts, 2 * inner, hidden), *quantised(n_experts, hidden, inner))


@pytest.mark.npu
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_against_the_reference(dtype, tokens, layout):
    case = ("experts_int8", operands(dtype, tokens), dict(layout=layout, **W8A8), IN_PRODUCT)
    assert kernel(*case) == FUSED
    assert difference(*case) == ""
    assert run(*case).dtype == dtype


@pytest.mark.npu
def test_another_activation_with_a_bias_before_it():
    bias = torch.randn(EXPERTS, 2 * INNER).bfloat16()
    case = ("experts_int8", (*operands(), bias), dict(act="gelu_tanh", **W8A8), IN_PRODUCT)
    assert kernel(*case).endswith("+ grouped_matmul_finalize_routing")
    assert difference(*case) == ""


@pytest.mark.npu
def test_pairs_without_an_expert_and_weights_in_x_dtype():
    args = list(operands())
    args[1] = args[1].bfloat16()
    args[2][0, 0], args[2][1, 1], args[2][2, :] = EXPERTS, -1, 1000
    case = ("experts_int8", tuple(args), dict(out_dtype=torch.float32, **W8A8), IN_PRODUCT)
    assert difference(*case) == "" and run(*case).dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "attributes", "reason"),
    [
        (dict(), dict(dynamic_activations=False), "it takes int8 activations"),
        (dict(hidden=224), W8A8, "the weight is 48 x 224; it takes multiples of 16 and of 32 from 256 on"),
        (dict(hidden=272), W8A8, "the weight is 48 x 272"),
        (dict(inner=40), W8A8, "the weight is 40 x 256"),
        (dict(n_experts=257), W8A8, "257 experts, and it takes 256"),
    ],
    ids=str,
)
def test_where_it_does_not_apply(sizes, attributes, reason):
    case = ("experts_int8", operands(tokens=3, **sizes), attributes, IN_PRODUCT)
    assert f"+ finalize_routing (not in the product: {reason}" in kernel(*case)
    assert difference(*case) == ""


def test_a_bias_behind_it_and_other_experts_keep_the_combination():
    args = (*operands(), None, torch.randn(EXPERTS, HIDDEN).bfloat16())
    case = ("experts_int8", args, W8A8, IN_PRODUCT)
    assert kernel(*case).endswith("+ finalize_routing (not in the product: it takes no bias)")
    assert difference(*case) == ""
    for op in ("experts", "experts_int4"):
        *_, sample = CANONICAL_OPS[op].samples(torch.bfloat16, torch.Generator().manual_seed(0))
        attributes = {**sample.kwargs, "dynamic_activations": False} if op == "experts_int4" else dict(sample.kwargs)
        assert kernel(op, sample.args, attributes, IN_PRODUCT).endswith("+ finalize_routing")


def test_too_many_rows():
    gm, _ = graph_of("experts_int8", operands(tokens=16 * 1024 + 1, n_experts=3, inner=16), W8A8)
    (node,) = gm.graph.find_nodes(op="call_function", target=CANONICAL_OPS["experts_int8"].overload)
    assert "16385 tokens to 2 experts each" in AscendTarget(IN_PRODUCT).kernel_for(node, "torchair")


def test_the_option():
    chosen = Settings.of(Options(ascend_combine="grouped_matmul_finalize_routing"))
    assert (chosen.combine, chosen.combine_in_product) == ("finalize_routing", True)
    chosen = Settings.of(Options(ascend_combine="token_unpermute"))
    assert (chosen.combine, chosen.combine_in_product) == ("token_unpermute", False)


def test_its_weight_is_prefetched_too():
    gm, _ = graph_of("experts_int8", operands(), W8A8)
    AscendTarget(Settings(combine_in_product=True, prefetch_mib=1)).lower(gm, "torchair")
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_prefetch.default)) == 2


@pytest.mark.parametrize("name", ["row_index", "logit", "pertoken_scale", "scale", "shared_input"])
def test_a_wrong_operand_is_noticed(name, monkeypatch):
    args, real = operands(tokens=40), torch.ops.npu.npu_grouped_matmul_finalize_routing.default

    def changed(*given, **named):
        other = named[name] + 1 if name == "shared_input" else named[name].flip(0)
        return real(*given, **{**named, name: other})

    class Npu:
        npu_grouped_matmul_finalize_routing = SimpleNamespace(default=changed)

        def __getattr__(self, operator):
            return getattr(torch.ops.npu, operator)

    class Torch:
        ops = SimpleNamespace(npu=Npu())

        def __getattr__(self, attribute):
            return getattr(torch, attribute)

    want = CANONICAL_OPS["experts_int8"].reference(*args, **W8A8)
    monkeypatch.setattr(experts_int8, "torch", Torch())
    assert compare_outputs("experts_int8", run("experts_int8", args, W8A8, IN_PRODUCT), want) != ""


@pytest.mark.npu
@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_in_a_graph(mode):
    layer, x = Int8Layer(), torch.randn(3, 5, HIDDEN).bfloat16()
    want = [layer(rows) for rows in x]
    eager_kernels.EVENTS.clear()
    compiled = compile_with_report(
        layer.npu(), fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": mode}, ascend_combine="grouped_matmul_finalize_routing",
    )  # fmt: skip
    for rows, result in zip(x, want, strict=True):
        assert relative_error(compiled(rows.npu()).cpu(), result) < 2e-2
    assert [site.kernel for site in compiled.reports[0].matched if site.kind == "experts"] == [FUSED]
    if on_hardware():
        return
    if mode == "ge":
        assert ge_interpreter.COUNTS["GroupedMatmulFinalizeRouting"] == len(x)
        assert not ge_interpreter.COUNTS["GroupedMatmul"] and not ge_interpreter.COUNTS["MoeFinalizeRoutingV2"]
    else:
        assert 2 in eager_kernels.EVENTS, "nothing was replayed"


@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_a_dynamic_number_of_tokens_keeps_the_combination(mode):
    layer = Int8Layer()
    x = torch.randn(9, HIDDEN).bfloat16()
    want = {tokens: layer(x[:tokens]) for tokens in (4, 9)}
    compiled = compile_with_report(
        layer.npu(), dynamic=True, fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": mode}, ascend_combine="grouped_matmul_finalize_routing",
    )  # fmt: skip
    for tokens, result in want.items():
        assert relative_error(compiled(x[:tokens].npu()).cpu(), result) < 2e-2
    assert len(compiled.reports) == 1
    (site,) = [site for site in compiled.reports[0].matched if site.kind == "experts"]
    assert site.kernel.endswith(
        "finalize_routing (not in the product: its output_bs is a plain number, and the number of tokens is dynamic)"
    )


def test_the_stand_in_adds_a_shared_experts_result():
    x = torch.randint(-9, 9, (6, 16), dtype=torch.int8)
    w = torch.randint(-9, 9, (3, 16, 256), dtype=torch.int8)
    scale, row_scale, logit = torch.rand(3, 256), torch.rand(6), torch.rand(6)
    shared, index = torch.randn(2, 256).bfloat16(), torch.tensor([0, 3, 1, 0, 2, 3])
    counts = torch.tensor([2, 0, 4])
    got = npu_grouped_matmul_finalize_routing(
        x, w, counts, scale=scale, pertoken_scale=row_scale, shared_input=shared, logit=logit, row_index=index,
        shared_input_weight=0.5, shared_input_offset=1, output_bs=4,
    )  # fmt: skip
    want = torch.zeros(4, 256)
    want[1:3] += 0.5 * shared.float()
    for row, expert in enumerate([0, 0, 2, 2, 2, 2]):
        want[index[row]] += x[row].float() @ w[expert].float() * scale[expert] * row_scale[row] * logit[row]
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="come together"):
        npu_grouped_matmul_finalize_routing(
            x, w, counts, scale=scale, pertoken_scale=row_scale, logit=logit, row_index=index, output_bs=4
        )
