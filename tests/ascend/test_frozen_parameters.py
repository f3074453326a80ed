"""torchair's option frozen_parameter: weights that were prepared from parameters count as parameters."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from torch._subclasses.fake_tensor import FakeTensor, is_fake

from moe_fx import torchair_handoff
from moe_fx.lowering import prepared_inputs

FROZEN = {"experimental_config.frozen_parameter": True}
HIDDEN, INNER, EXPERTS = 32, 48, 8


class Layer(torch.nn.Module):
    """Experts whose weights are parameters, or buffers."""

    def __init__(self, kind=torch.nn.Parameter):
        super().__init__()
        shapes = dict(gate=(EXPERTS, HIDDEN), w13=(EXPERTS, 2 * INNER, HIDDEN), w2=(EXPERTS, HIDDEN, INNER))
        for name, shape in shapes.items():
            weight = torch.randn(shape) / shape[-1] ** 0.5
            if kind is torch.nn.Parameter:
                setattr(self, name, torch.nn.Parameter(weight))
            else:
                self.register_buffer(name, weight)

    def forward(self, x):
        weights, ids = torch.ops.moe_fx.route(x @ self.gate.t(), None, top_k=2, renormalize="eps")
        return x + torch.ops.moe_fx.experts(x, weights, ids, self.w13, self.w2)


def compiled(layer, mode="ge", **options):
    options = {"dynamic": True, "cache": False, **options}
    return compile_with_report(
        layer.npu(), fullgraph=True, downstream="torchair", strict=True,
        downstream_options={"mode": mode, **FROZEN}, **options,
    )  # fmt: skip


def frozen_weights():
    """Of each of GE's grouped products: whether its weight is an input that torchair calls frozen."""
    ((number, graph),) = ge_interpreter.GRAPHS.items()
    flags = ge_interpreter.OPTIONS[number]["frozenInput"].split(",")
    inputs = {op.name: op.attr["index"].i for op in graph.op if op.type == "Data"}
    products = [op for op in graph.op if op.type == "GroupedMatmul"]
    return [flags[inputs[op.input[1].rpartition(":")[0]]] == "1" for op in products]


@pytest.mark.parametrize("nz", [False, True], ids=["nd", "nz"])
@pytest.mark.parametrize("weights", ["prepared", "as_is"])
def test_weights_of_parameters_are_frozen(weights, nz):
    ge_interpreter.GRAPHS.clear()
    layer, x = Layer(), torch.randn(9, HIDDEN)
    with torch.no_grad():
        want = {tokens: layer(x[:tokens]) for tokens in (4, 9)}
    run = compiled(layer, ascend_weights=weights, ascend_nz=nz)
    for tokens, result in want.items():
        assert relative_error(run(x[:tokens].npu()).cpu(), result) < 1e-5
    if weights == "prepared":
        assert frozen_weights() == [True] * 2


def test_writes_reach_the_frozen_memory():
    layer, x = Layer(), torch.randn(5, HIDDEN)
    run = compiled(layer)
    first = run(x.npu()).cpu()
    with torch.no_grad():
        layer.w2.mul_(2)
    assert relative_error(run(x.npu()).cpu() - x, 2 * (first - x)) < 1e-5


def test_what_was_prepared_from_buffers_is_an_input_as_they_are():
    ge_interpreter.GRAPHS.clear()
    layer, x = Layer(kind=None), torch.randn(5, HIDDEN)
    want = layer(x)
    assert relative_error(compiled(layer)(x.npu()).cpu(), want) < 1e-5
    assert frozen_weights() == [False] * 2


def test_captured_graphs():
    layer, x = Layer(), torch.randn(3, 5, HIDDEN)
    with torch.no_grad():
        want = [layer(rows) for rows in x]
    eager_kernels.EVENTS.clear()
    run = compiled(layer, "npugraph_ex", dynamic=False)
    for rows, result in zip(x, want, strict=True):
        assert relative_error(run(rows.npu()).cpu(), result) < 1e-5
    assert 2 in eager_kernels.EVENTS


def test_from_the_cache(tmp_path):
    layer, x = Layer(), torch.randn(5, HIDDEN)
    with torch.no_grad():
        want = layer(x)
    for outcome in ("miss", "hit"):
        torch._dynamo.reset()
        ge_interpreter.GRAPHS.clear()
        run = compiled(layer, cache=True, cache_dir=str(tmp_path), ascend_combine="token_unpermute")
        assert relative_error(run(x.npu()).cpu(), want) < 1e-5
        assert run.reports[0].cache.partition(":")[0] == outcome
        assert frozen_weights() == [True] * 2


def test_only_torchair_is_given_parameters(monkeypatch):
    seen = []
    original = torchair_handoff.as_parameters

    def recording(given):
        seen.append((given, original(given)))
        return seen[-1][1]

    monkeypatch.setattr(torchair_handoff, "as_parameters", recording)
    compiled(Layer())(torch.randn(5, HIDDEN).npu())
    ((given, parameters),) = seen
    marked = [e for e in given if hasattr(e, prepared_inputs._FROM_PARAMETERS)]
    assert len(marked) == 2 and all(is_fake(e) and not isinstance(e, torch.nn.Parameter) for e in marked)
    new = [p for e, p in zip(given, parameters, strict=True) if e is not p]
    assert len(new) == 2 and all(isinstance(p, torch.nn.Parameter) and isinstance(p, FakeTensor) for p in new)
    assert not any(p.requires_grad for p in new)
