"""Prefetch of expert weights: which of them, how much, from when on, and that nothing else changes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import stream_races
import torch
from compiling import compile_with_report, relative_error
from host_cann import ge_interpreter
from lowered_op import graph_of
from model_cases import build, inputs

from moe_fx.lowering.ascend import prefetch, streams
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.ascend.target import AscendTarget
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.options import Options

HIDDEN, EXPERTS = 64, 16


def ge_graph(model, *args, **options):
    """The one GE graph of a model, and the model's result."""
    ge_interpreter.GRAPHS.clear()
    run = compile_with_report(model, fullgraph=True, downstream="torchair", strict=True, cache=False, **options)
    result = run(*args)
    result = getattr(result, "logits", result)
    (graph,) = ge_interpreter.GRAPHS.values()
    return list(graph.op), result.cpu()


def prefetches(ops):
    return [op for op in ops if op.type == "Cmo"]


def after(op, ops):
    """The op that a prefetch waits for, by its control edge; torchair adds one from the prefetch before it."""
    edge = next(source for source in op.input if source.endswith(":-1"))
    return next(other for other in ops if other.name == edge.removesuffix(":-1"))


def test_weights_of_each_layer_are_read_from_its_start_on():
    model = build("qwen3_moe").to("npu")
    plain, want = ge_graph(model, inputs().to("npu"))
    assert not prefetches(plain), "off by default"
    torch._dynamo.reset()
    ops, got = ge_graph(model, inputs().to("npu"), ascend_prefetch=True)
    assert torch.equal(got, want)
    layers = model.config.num_hidden_layers
    found = prefetches(ops)
    assert len(found) == 2 * layers
    assert [op.type for op in ops if op.type != "Cmo"] == [op.type for op in plain], "all else is as before"
    waiting = {op.type for op in ops if any(f"{cmo.name}:-1" in op.input for cmo in found)}
    assert waiting <= {"Cmo", "NetOutput"}, "no other work waits for a prefetch"
    places = {op.name: index for index, op in enumerate(ops)}
    products = [op for op in ops if op.type == "GroupedMatmul"]
    attention = [op for op in ops if op.type == "SoftmaxV2"]
    assert len(attention) == layers and len(products) == 2 * layers
    for product, op in zip(products, found, strict=True):
        assert op.input[0] in product.input, "in the order of use"
        layer = products.index(product) // 2
        start = after(op, ops)
        assert op.attr["type"].i == 6
        assert places[start.name] < places[op.name] < places[attention[layer].name] < places[product.name]
        if layer:
            assert places[start.name] > places[products[2 * layer - 1].name], "a layer's weights, not all at once"


def test_the_limit_is_per_layer_and_serves_the_first_product_first():
    model = build("qwen3_moe", moe_intermediate_size=512).to("npu")
    ops, _ = ge_graph(model, inputs().to("npu"), ascend_prefetch=True, ascend_prefetch_mib=5)
    first, second = EXPERTS * HIDDEN * 1024 * 4, EXPERTS * HIDDEN * 512 * 4
    assert first < 5 << 20 < first + second
    assert sorted(op.attr["max_size"].i for op in prefetches(ops)) == [(5 << 20) - first] * 2 + [first] * 2
    torch._dynamo.reset()
    ops, _ = ge_graph(model, inputs().to("npu"), ascend_prefetch=True, ascend_prefetch_mib=1)
    assert [op.attr["max_size"].i for op in prefetches(ops)] == [1 << 20] * 2


@pytest.mark.parametrize("weights", ["prepared", "as_is"])
def test_a_block_on_its_own(weights):
    block = build("qwen3_moe").model.layers[1].mlp.to("npu")
    x = torch.randn(2, 3, HIDDEN)
    with torch.no_grad():
        want = block.to("cpu")(x)
    options = dict(ascend_prefetch=True, ascend_weights=weights, dynamic=True)
    ops, got = ge_graph(block.to("npu"), x.npu(), **options)
    found = prefetches(ops)
    gating = next(index for index, op in enumerate(ops) if op.type == "MoeGatingTopKSoftmax")
    assert len(found) == 2 and all(ops.index(op) < gating for op in found)
    assert relative_error(got, want) < 1e-5


def test_from_the_cache(tmp_path):
    model = build("qwen3_moe").to("npu")
    counts = []
    for _ in range(2):
        torch._dynamo.reset()
        ge_interpreter.COUNTS.clear()
        run = compile_with_report(
            model, downstream="torchair", strict=True, cache_dir=str(tmp_path), ascend_prefetch=True
        )
        run(inputs().to("npu"))
        counts.append((run.reports[0].cache.partition(":")[0], ge_interpreter.COUNTS["Cmo"]))
    assert counts == [("miss", 4), ("hit", 4)]


def captured(monkeypatch, model, *args, **options):
    """What is captured of a model on which stream, and the model's result when that is replayed."""
    run = compile_with_report(
        model, fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": "npugraph_ex"}, **options,
    )  # fmt: skip
    with stream_races.watched(monkeypatch) as seen:
        run(*args)
    result = run(*args)
    return seen, getattr(result, "logits", result).cpu()


def test_a_captured_graph_prefetches_on_a_stream_of_its_own(monkeypatch):
    model = build("glm4_moe", num_hidden_layers=3).to("npu")
    plain, want = captured(monkeypatch, model, inputs().to("npu"))
    torch._dynamo.reset()
    seen, got = captured(monkeypatch, model, inputs().to("npu"), ascend_prefetch=True)
    assert torch.equal(got, want)
    assert seen.on(stream_races.MAIN) == plain.on(stream_races.MAIN) and not seen.races
    assert seen.on(prefetch.STREAM) == ["npu_prefetch"] * 4, "two weights of each layer with experts"
    places = [index for index, (stream, _) in enumerate(seen.calls) if stream == prefetch.STREAM]
    scores = [index for index, (_, call) in enumerate(seen.calls) if call == "_softmax"]
    products = [index for index, (_, call) in enumerate(seen.calls) if call == "npu_grouped_matmul"]
    assert len(scores) == 3 and len(products) == 4
    assert scores[0] < places[0] < places[1] < scores[1] < products[0], "from the second layer's start on"
    assert products[1] < places[2] < places[3] < scores[2] < products[2], "and from the third's"


def test_a_captured_block_prefetches_beside_its_shared_expert(monkeypatch):
    block = build("glm4_moe").model.layers[1].mlp.to("npu")
    x = torch.randn(2, 3, HIDDEN).npu()
    _, want = captured(monkeypatch, block, x)
    torch._dynamo.reset()
    seen, got = captured(monkeypatch, block, x, ascend_prefetch=True, ascend_shared_stream=True)
    assert torch.equal(got, want) and not seen.races
    assert seen.on(prefetch.STREAM) == ["npu_prefetch"] * 2
    order = [stream for stream, _ in seen.calls[: seen.calls.index((stream_races.MAIN, "npu_moe_gating_top_k"))]]
    assert order.count(prefetch.STREAM) == 2 and streams.STREAM in order, "in front of the routing"


def test_both_modes_take_the_options():
    chosen = dict(ascend_prefetch=True, ascend_prefetch_mib=8)
    for mode in ("ge", "npugraph_ex"):
        assert Settings.of(Options(**chosen), mode).prefetch_mib == 8
        assert Settings.of(Options(ascend_prefetch_mib=8), mode).prefetch_mib == 0


@pytest.mark.parametrize("op", ["experts", "experts_int8", "experts_int4"])
def test_every_kind_of_weight(op):
    (sample, *_) = CANONICAL_OPS[op].samples(torch.bfloat16, torch.Generator().manual_seed(0))
    gm, _ = graph_of(op, sample.args, dict(sample.kwargs))
    AscendTarget(Settings(prefetch_mib=1)).lower(gm, "torchair")
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_prefetch.default)
    floating = {node.args[0].meta["val"].is_floating_point() for node in found}
    assert len(found) == 2 and floating == {op == "experts"}


def test_a_weight_that_the_graph_computes_is_left_alone():
    graph = torch.fx.Graph()
    weight = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("w"),))
    assert not prefetch._is_given(weight)
