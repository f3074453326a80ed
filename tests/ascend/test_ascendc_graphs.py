"""A layer with int4 experts through moe_ascend and torchair, with the Ascend C kernels on the host model beneath.

Decode (at most 8 tokens) takes the project's own operator, more tokens the grouped product; both read one copy of the
weights. The reference is the same layer on the CPU. On hardware the results are compared; what the stand-in counts and
finds is not there.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from lowered_op import kernel
from npu_report import note, on_hardware

from moe_fx.lowering import prepared_inputs
from moe_fx.lowering.ascend import kernel_library, w4a16
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.options import Options

MODES = ("ge", "npugraph_ex")
BOUND = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
OWN = "moe_fx_ascend experts_w4a16 (Ascend C)"
HIDDEN, EXPERTS, TOP_K = 128, 8, 2


class Layer(torch.nn.Module):
    """A router and its experts, with a residual; weights [E, N, K / 2] as ``experts_int4`` has them."""

    def __init__(self, dtype, group=32, inner=64, zeros=True, masked=False, **route):
        super().__init__()

        def weight(name, rows, inputs):
            self.register_buffer(name, torch.randint(0, 256, (EXPERTS, rows, inputs // 2), dtype=torch.uint8))
            shape = (EXPERTS, rows, inputs // group)
            self.register_buffer(f"{name}_scale", (torch.rand(shape) + 0.5).div(8 * inputs**0.5).to(dtype))
            self.register_buffer(f"{name}_zero", torch.randint(4, 12, shape).to(torch.uint8) if zeros else None)

        self.register_buffer("gate", torch.randn(EXPERTS, HIDDEN).to(dtype))
        weight("w13", 2 * inner, HIDDEN)
        weight("w2", HIDDEN, inner)
        self.masked = masked
        self.route = dict(top_k=TOP_K, renormalize="eps", **route)

    def forward(self, x):
        weights, ids = torch.ops.moe_fx.route(x @ self.gate.t(), None, **self.route)
        if self.masked:  # As where other devices hold the last experts.
            ids = torch.where(ids < EXPERTS - 3, ids, -1)
        y = torch.ops.moe_fx.experts_int4(
            x, weights, ids, self.w13, self.w13_scale, self.w2, self.w2_scale, self.w13_zero, self.w2_zero
        )
        return x + y


def compiled(layer, mode, dynamic=False, **options):
    return compile_with_report(
        layer.npu(), dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": mode}, **options,
    )  # fmt: skip


def kernels_of(run, kind="experts"):
    return [site.kernel for report in run.reports for site in report.matched if site.kind == kind]


def close(got, want):
    assert got.dtype == want.dtype
    return note(relative_error(got.cpu(), want)) < BOUND[want.dtype]


@pytest.fixture
def in_mode(kernels, mode):
    """The library, with an operator for the mode."""
    if mode == "ge" and not w4a16.is_in_ge():
        pytest.skip("this CANN takes no operators as libraries into GE graphs")


@pytest.mark.npu
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("mode", MODES)
def test_few_tokens_take_the_kernel(in_mode, mode, tokens):
    dtype = torch.float16 if tokens == 2 else torch.bfloat16
    layer, x = Layer(dtype, zeros=tokens != 5), torch.randn(2, tokens, HIDDEN).to(dtype)
    want = [layer(rows) for rows in x]
    run = compiled(layer, mode)
    for rows, result in zip(x, want, strict=True):
        assert close(run(rows.npu()), result)
    assert kernels_of(run) == [OWN]
    if mode == "ge" and not on_hardware():
        assert ge_interpreter.COUNTS["MoeFxExpertsW4A16"] == 2 and not ge_interpreter.COUNTS["GroupedMatmul"]


@pytest.mark.npu
@pytest.mark.parametrize("group", [64, 128])
def test_group_sizes(kernels, group):
    layer, x = Layer(torch.bfloat16, group=group, inner=128), torch.randn(3, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, "npugraph_ex")
    assert close(run(x.npu()), want) and kernels_of(run) == [OWN]


@pytest.mark.npu
@pytest.mark.parametrize("mode", MODES)
def test_more_tokens_take_the_grouped_product(kernels, mode):
    layer, x = Layer(torch.bfloat16), torch.randn(9, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, mode)
    assert close(run(x.npu()), want)
    assert kernels_of(run) == ["torch_npu grouped_matmul (W4A16) + swiglu + finalize_routing"]


@pytest.mark.npu
@pytest.mark.parametrize("mode", MODES)
def test_a_dynamic_number_of_tokens(in_mode, mode):
    """One graph for all token counts that the kernel takes, if the user bounds them; otherwise the grouped product."""
    layer = Layer(torch.bfloat16)
    x = torch.randn(16, HIDDEN).bfloat16()
    want = {tokens: layer(x[:tokens]) for tokens in (3, 5, 8, 16)}
    run = compiled(layer, mode, dynamic=None)
    for tokens in (3, 5, 8):
        rows = x[:tokens].npu()
        torch._dynamo.mark_dynamic(rows, 0, min=2, max=8)
        assert close(run(rows), want[tokens])
    assert len(run.reports) == 1 and kernels_of(run) == [OWN]
    torch._dynamo.reset()
    run = compiled(layer, mode, dynamic=True)
    for tokens in (5, 16):
        assert close(run(x[:tokens].npu()), want[tokens])
    (kernel,) = kernels_of(run)
    assert "grouped_matmul" in kernel


@pytest.mark.npu
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(in_mode, mode):
    run = compiled(Layer(torch.bfloat16), mode)
    assert run(torch.empty(0, HIDDEN, dtype=torch.bfloat16).npu()).shape == (0, HIDDEN)


@pytest.mark.npu
@pytest.mark.parametrize("mode", MODES)
def test_pairs_without_an_expert_take_no_part(in_mode, mode):
    layer, x = Layer(torch.bfloat16, masked=True), torch.randn(6, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, mode)
    assert close(run(x.npu()), want) and kernels_of(run) == [OWN]


def test_prefill_and_decode_share_the_packed_weights(kernels):
    layer, x = Layer(torch.bfloat16), torch.randn(16, HIDDEN).bfloat16()
    prefill, decode = compiled(layer, "npugraph_ex"), compiled(layer, "npugraph_ex")
    prefill(x.npu())
    decode(x[:2].npu())
    assert ["grouped" in kernels_of(prefill)[0], *kernels_of(decode)] == [True, OWN]
    held = [value.tensor for value in prepared_inputs._shared.values() if value.tensor.dtype == torch.int32]
    assert [tensor.shape[0] for tensor in held] == [EXPERTS] * 2, "w13 and w2, once each"


def test_a_captured_graph_replays_the_kernel(kernels):
    layer, x = Layer(torch.bfloat16), torch.randn(3, 4, HIDDEN).bfloat16()
    want = [layer(rows) for rows in x]
    run = compiled(layer, "npugraph_ex")
    run(x[0].npu())
    eager_kernels.EVENTS.clear()
    for rows, result in zip(x, want, strict=True):
        assert close(run(rows.npu()), result)
    events = [event for event in eager_kernels.EVENTS if event != 3]  # Graphs of earlier tests go when they go.
    assert events == [2, 2, 2], "replays only"


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_in_a_graph_is_an_error(kernels, mode, monkeypatch):
    snapshot = torch.npu.memory_snapshot
    layer, x = Layer(torch.bfloat16), torch.randn(5, HIDDEN).bfloat16().npu()
    first, run = compiled(layer, mode), compiled(layer, mode)
    first(x)  # Prepares the weights, which the next graph shares.

    def halved():
        return [
            {"blocks": [{**block, "requested_size": block["requested_size"] // 2} for block in segment["blocks"]]}
            for segment in snapshot()
        ]

    monkeypatch.setattr(torch.npu, "memory_snapshot", halved)
    with pytest.raises(RuntimeError) as failure:
        run(x[:4].clone())
    # GE gives an error code.
    said = str(failure.value) if mode == "npugraph_ex" else str(ge_interpreter.LAST_ERROR[0])
    assert "the host model found faults in moe_w4a16_decode_bfloat16" in said


@pytest.mark.npu
def test_a_router_that_torch_npu_has_no_operator_for(kernels):
    layer, x = Layer(torch.bfloat16, score="sqrtsoftplus"), torch.randn(6, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, "npugraph_ex")
    assert close(run(x.npu()), want)
    assert kernels_of(run, "router") == ["moe_fx_ascend gating_topk (Ascend C)"]
    call = ("route", (torch.randn(6, EXPERTS), None), dict(top_k=TOP_K, score="sqrtsoftplus"))
    assert "no gating operator scores with sqrtsoftplus" in kernel(*call), "nor has GE"


def test_without_the_library_the_report_says_so(monkeypatch):
    monkeypatch.setattr(kernel_library, "loaded", lambda: None)
    layer, x = Layer(torch.bfloat16), torch.randn(4, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, "ge")
    assert close(run(x.npu()), want)
    assert kernels_of(run)[0].endswith(", for lack of the Ascend C kernel library")


def test_a_ge_without_the_operator_takes_the_grouped_product(kernels, monkeypatch):
    monkeypatch.setattr(w4a16, "is_in_ge", lambda: False)
    layer, x = Layer(torch.bfloat16), torch.randn(4, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, "ge")
    assert close(run(x.npu()), want)
    assert "this CANN takes no operator of the Ascend C kernel library into GE graphs" in kernels_of(run)[0]
    torch._dynamo.reset()
    run = compiled(layer, "npugraph_ex")
    assert close(run(x.npu()), want) and kernels_of(run) == [OWN]


def test_the_mode_of_torch_compile_counts_too():
    assert Settings.of(Options()).ge and not Settings.of(Options(), "npugraph_ex").ge


def test_shapes_that_the_kernel_refuses_take_the_grouped_product(kernels):
    layer, x = Layer(torch.bfloat16, group=16), torch.randn(4, HIDDEN).bfloat16()
    want = layer(x)
    run = compiled(layer, "npugraph_ex")
    assert close(run(x.npu()), want)
    assert "since the Ascend C kernel refuses: group" in kernels_of(run)[0]
