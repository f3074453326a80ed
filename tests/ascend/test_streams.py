"""Shared experts on a second stream: which operators, in which order, with equal results; and what is left alone."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import re
import sys

import stream_races
import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from model_cases import build, inputs

from moe_fx.errors import UnsupportedError
from moe_fx.lowering.ascend import streams
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.options import Options

LABEL = streams.STREAM.encode()
# Constants, shapes and copies.
LEFT_OUT = (
    "Const", "Data", "NetOutput", "Shape", "Pack", "Gather", "Reshape", "Transpose", "Cast", "Identity", "TensorMove",
)  # fmt: skip
# Layers with a shared expert, and what computes one.
SHARED = {"deepseek_v3": 1, "glm4_moe": 1, "afmoe": 1}


def ge_graph(model, *args, dynamic=False, **options):
    """The one GE graph of a model, and the model's result."""
    torch._dynamo.reset()
    ge_interpreter.GRAPHS.clear()
    run = compile_with_report(
        model, dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True, cache=False, **options
    )
    result = run(*args)
    result = getattr(result, "logits", result)
    (graph,) = ge_interpreter.GRAPHS.values()
    return list(graph.op), result.cpu()


def on_stream(ops):
    return [op for op in ops if op.attr["_user_stream_label"].s == LABEL]


def work(ops):
    """Operators that compute something."""
    return sorted(op.type for op in ops if op.type not in LEFT_OUT)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SHARED)
def test_the_shared_expert_has_a_stream_of_its_own(name, dynamic):
    model = build(name).to("npu")
    plain, want = ge_graph(model, inputs().to("npu"), dynamic=dynamic)
    assert not on_stream(plain), "off by default"
    ops, got = ge_graph(model, inputs().to("npu"), dynamic=dynamic, ascend_shared_stream=True)
    assert torch.equal(got, want)
    assert work(ops) == work(plain), "the same operators, in another order"
    found = on_stream(ops)
    kinds = work(found)
    assert kinds.count("Mul") == kinds.count("Swish") == SHARED[name] and len(kinds) == 5 * SHARED[name]
    assert sum("MatMul" in kind for kind in kinds) == 3 * SHARED[name]
    # In the graph's order it stands in front of the routing that it runs beside, and needs nothing of it.
    places = {op.name: index for index, op in enumerate(ops)}
    routed = [op for op in ops if op.type.startswith("Moe") or op.type == "GroupedMatmul"]
    first = min(places[op.name] for op in routed)
    names = {op.name for op in routed}
    for op in found:
        assert places[op.name] < first
        assert not any(source.rpartition(":")[0] in names for source in op.input)
    # One addition takes both: GE waits there.
    last = max(found, key=lambda op: places[op.name])
    assert any(f"{last.name}:0" in op.input for op in ops if op not in found)
    assert not any(op.attr["_user_stream_label"].s for op in ops if op not in found)


def test_with_prefetch_and_from_the_cache(tmp_path):
    model = build("glm4_moe").to("npu")
    seen = []
    for _ in range(2):
        torch._dynamo.reset()
        ge_interpreter.GRAPHS.clear()
        run = compile_with_report(
            model, downstream="torchair", strict=True, cache_dir=str(tmp_path), ascend_prefetch=True,
            ascend_shared_stream=True, ascend_combine="token_unpermute",
        )  # fmt: skip
        result = run(inputs().to("npu")).logits.cpu()
        (graph,) = ge_interpreter.GRAPHS.values()
        streamed = work(on_stream(graph.op))
        seen.append((run.reports[0].cache.partition(":")[0], len(streamed), "Cmo" in streamed, result))
    assert [item[:3] for item in seen] == [("miss", 5, False), ("hit", 5, False)]
    assert torch.equal(seen[0][3], seen[1][3])


def test_models_without_a_shared_expert_have_one_stream():
    ops, _ = ge_graph(build("qwen3_moe").to("npu"), inputs().to("npu"), ascend_shared_stream=True)
    assert not on_stream(ops)


class Block(torch.nn.Module):
    """Experts, and a projection added to their result; ``form`` says what is special about it."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.gate, self.shared = torch.randn(8, 64) / 8, torch.randn(64, 64) / 8
        self.w13, self.w2 = torch.randn(8, 96, 64) / 8, torch.randn(8, 64, 48) / 8
        for name in ("gate", "shared", "w13", "w2"):
            self.register_buffer(name, self.__dict__.pop(name))
        self.register_buffer("kept", torch.zeros(5, 64))

    def forward(self, x):
        weights, ids = torch.ops.moe_fx.route(x @ self.gate.t(), None, top_k=2)
        y = torch.ops.moe_fx.experts(x, weights, ids, self.w13, self.w2)
        if self.form == "residual":
            return y + x
        if self.form == "no product":
            return y + torch.sigmoid(x) * 2
        s = x @ self.shared
        if self.form == "used elsewhere":
            return y + s, s.sin()
        if self.form == "after the experts":
            return y + (y @ self.shared)
        if self.form == "writes":
            self.kept.copy_(s)
            return y + s, self.kept
        return y + torch.sigmoid(s) * s


@pytest.mark.parametrize(
    ("form", "moved"),
    [
        ("gated", True), ("residual", False), ("no product", False), ("used elsewhere", False),
        ("after the experts", False), ("writes", False),
    ],
)  # fmt: skip
def test_what_is_moved(form, moved):
    block, x = Block(form), torch.randn(5, 64)
    want = block(x)
    ops, got = ge_graph_of_block(block.npu(), x.npu())
    assert bool(on_stream(ops)) == moved
    for one, other in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert relative_error(one, other.cpu()) < 1e-5


def ge_graph_of_block(block, x):
    torch._dynamo.reset()
    ge_interpreter.GRAPHS.clear()
    run = compile_with_report(
        block, fullgraph=True, downstream="torchair", strict=True, cache=False, ascend_shared_stream=True
    )
    result = run(x)
    (graph,) = ge_interpreter.GRAPHS.values()
    return list(graph.op), [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]


def captured(monkeypatch, model, *args, dynamic=False, **options):
    """What is captured of a model on which stream, and the model's result when that is replayed."""
    torch._dynamo.reset()
    run = compile_with_report(
        model, dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": "npugraph_ex"}, **options,
    )  # fmt: skip
    with stream_races.watched(monkeypatch) as seen:
        run(*args)
    eager_kernels.EVENTS.clear()
    result = run(*args)
    assert 2 in eager_kernels.EVENTS, "nothing was replayed"
    result = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
    return seen, result.cpu()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SHARED)
def test_a_captured_shared_expert_has_a_stream_of_its_own(name, dynamic, monkeypatch):
    model = build(name, num_hidden_layers=3).to("npu")
    plain, want = captured(monkeypatch, model, inputs().to("npu"), dynamic=dynamic)
    assert {stream for stream, _ in plain.calls} == {stream_races.MAIN}, "off by default"
    seen, got = captured(monkeypatch, model, inputs().to("npu"), dynamic=dynamic, ascend_shared_stream=True)
    assert torch.equal(got, want)
    assert seen.on(streams.STREAM) == ["matmul", "matmul", "silu_", "mul_", "matmul"] * 2, "of both MoE layers"
    assert sorted(call for _, call in seen.calls) == sorted(call for _, call in plain.calls), "in another order"
    assert not seen.races
    # It is enqueued in front of the routing that it runs beside.
    first, gating = seen.calls.index((streams.STREAM, "matmul")), (stream_races.MAIN, "npu_moe_gating_top_k")
    assert first < seen.calls.index(gating)


WAITS, HOLD = "wait.default", "hold.default"


@pytest.mark.parametrize(
    ("mark", "which", "missing"),
    [
        (WAITS, 0, "on moe_fx_shared and add_ on main"),
        (WAITS, 1, "on main and matmul on moe_fx_shared"),
        (HOLD, 0, "matmul on moe_fx_shared and npu_[a-z_]+ on main"),
    ],
    ids=["the addition", "the start", "memory"],
)
def test_a_captured_graph_needs_each_of_its_marks(mark, which, missing, monkeypatch):
    call, met = streams._call, []

    def without(graph, target, *args):
        met.extend([target] if str(target).endswith(f".{mark}") else [])
        left_out = met and met[-1] is target and (len(met) - 1) % (2 if mark == WAITS else 1) == which
        return call(graph, target, *([[]] if left_out else args))

    monkeypatch.setattr(streams, "_call", without)
    seen, _ = captured(monkeypatch, build("glm4_moe").to("npu"), inputs().to("npu"), ascend_shared_stream=True)
    assert met and any(re.search(missing, race) for race in seen.races)


@pytest.mark.parametrize("form", ["gated", "writes"])
def test_captured_blocks_of_which_the_input_is_the_graphs(form, monkeypatch):
    block, x = Block(form), torch.randn(5, 64)
    want = block(x)
    want = want[0] if form == "writes" else want
    seen, got = captured(monkeypatch, block.npu(), x.npu(), ascend_shared_stream=True)
    assert bool(seen.on(streams.STREAM)) == (form == "gated") and not seen.races
    assert relative_error(got, want) < 1e-5


def test_both_modes_take_the_option():
    for mode in ("ge", "npugraph_ex"):
        assert Settings.of(Options(ascend_shared_stream=True), mode).shared_stream
        assert not Settings.of(Options(), mode).shared_stream


@pytest.mark.parametrize("module", ["torchair.scope", "torchair.ops"])
def test_a_torchair_without_streams_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),))
    graph.output(node)
    with pytest.raises(UnsupportedError, match="set ascend_shared_stream=False"):
        streams.put_on("other", graph, [node], captured=True, option="ascend_shared_stream")
