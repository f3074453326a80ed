"""Lowered graphs as JSON: what is read back is what was written, and what cannot be kept is refused by name."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import compile_with_report
from moe_families import FAMILIES, token_ids
from torch import fx

from moe_fx import backend, downstream
from moe_fx.cache import graph_codec
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_identity import tensor_bytes
from moe_fx.errors import CacheError

aten = torch.ops.aten


def _through(gm: fx.GraphModule, given: fx.GraphModule | None = None) -> fx.GraphModule:
    given = given or fx.GraphModule({}, fx.Graph())
    data = json.loads(json.dumps(graph_codec.encode(gm, given, "cpu")))
    return graph_codec.decode(data, given)


def _graph(build: Callable[[fx.Graph, fx.Node], Any], constants: dict[str, Any] | None = None) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((build(graph, x),))
    return fx.GraphModule(constants or {}, graph)


@pytest.mark.parametrize(
    ("family", "dynamic"), [("qwen3_moe", False), ("qwen3_moe", True), ("deepseek_v3", False), ("qwen3_next", True)]
)
def test_lowered_models_come_back_the_same(family: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[fx.GraphModule] = []
    real = backend.lower

    def keep(gm: fx.GraphModule, *rest: Any) -> None:
        real(gm, *rest)
        lowered.append(gm)

    monkeypatch.setattr(backend, "lower", keep)
    compiled = compile_with_report(FAMILIES[family].build(), dynamic=dynamic)
    compiled(token_ids(), use_cache=False)
    for gm in lowered:
        back = _through(gm)
        assert _calls(back) == _calls(gm)
        frames = [node.meta.get("stack_trace", "") for node in back.graph.nodes if node.op == "call_function"]
        assert all(frame.lstrip().startswith('File "') and frame.count("File") == 1 for frame in frames if frame)
        assert sum(map(bool, frames)) > 10


def _calls(gm: fx.GraphModule) -> list[str]:
    return [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in gm.graph.nodes]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        -0.0,
        0.1,
        float("inf"),
        1e-300,
        "text",
        torch.bfloat16,
        torch.strided,
        torch.channels_last,
        torch.device("cuda", 1),
        torch.device("cpu"),
        slice(None, 3, None),
        Ellipsis,
        2 + 3j,
        (1, (2, [3, None])),
        [],
        (),
        {"node": 1, "tuple": [1]},
    ],
    ids=repr,
)
def test_values_come_back_the_same(value: Any) -> None:
    back = graph_codec.decode_value(json.loads(json.dumps(graph_codec.encode_value(value))), {})
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_nan_comes_back() -> None:
    back = graph_codec.decode_value(json.loads(json.dumps(graph_codec.encode_value(float("nan")))), {})
    assert back != back


def test_nodes_inside_arguments_come_back() -> None:
    gm = _graph(lambda g, x: g.call_function(aten.cat.default, ([x, g.call_function(aten.neg.default, (x,))], 1)))
    assert _calls(_through(gm)) == _calls(gm)
    x = torch.rand(3, 4)
    assert torch.equal(_through(gm)(x)[0], gm(x)[0])


@pytest.mark.parametrize(
    "constant",
    [
        torch.tensor(3.5),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.empty(0, 3),
    ],
    ids=str,
)
def test_small_constants_are_kept_bit_by_bit(constant: torch.Tensor) -> None:
    gm = _graph(lambda g, x: g.get_attr("c"), {"c": constant})
    (back,) = _through(gm)(torch.ones(1))
    assert back.dtype == constant.dtype and back.shape == constant.shape and back.stride() == constant.stride()
    assert tensor_bytes(back) == tensor_bytes(constant)


def test_constants_of_the_given_graph_are_kept_by_name() -> None:
    weight = torch.rand(1000, 1000)  # More than is kept by value.
    given = _graph(lambda g, x: g.get_attr("weight"), {"weight": weight})
    gm = _graph(lambda g, x: g.get_attr("renamed"), {"renamed": weight})
    assert _through(gm, given)(torch.ones(1))[0] is weight


@pytest.mark.parametrize(
    ("build", "constants", "message"),
    [
        (lambda g, x: g.call_function(len, (x,)), {}, "calls len, which is neither a registered op nor arithmetic"),
        (lambda g, x: g.call_method("relu", (x,)), {}, "has a call_method node"),
        (lambda g, x: g.call_function(torch.relu, (x,)), {}, "calls .*relu, which is neither"),
        (lambda g, x: g.call_function(aten.add.Tensor, (x, range(3))), {}, "an argument of type range"),
        (lambda g, x: g.get_attr("c"), {"c": torch.zeros(300_000)}, "a constant of 1171 KiB, and none above 1024"),
        (lambda g, x: g.get_attr("c"), {"c": torch.ones(2, dtype=torch.cfloat).conj()}, "a mark conjugates or negates"),
        (lambda g, x: g.get_attr("c"), {"c": torch._neg_view(torch.ones(2))}, "a mark conjugates or negates"),
        (lambda g, x: g.get_attr("c"), {"c": torch.nn.Parameter(torch.zeros(1))}, "a constant of type Parameter"),
        (lambda g, x: g.get_attr("c"), {"c": _graph(lambda g, x: x)}, "a constant of type GraphModule"),
        (lambda g, x: g.call_function(torch.ops.higher_order.cond, (x,)), {}, "calls cond"),
    ],
)
def test_what_cannot_be_kept_is_named(build: Any, constants: dict[str, Any], message: str) -> None:
    with pytest.raises(Uncacheable, match=message):
        _through(_graph(build, constants))


def _data(**changes: Any) -> dict[str, Any]:
    gm = _graph(lambda g, x: g.call_function(operator.add, (x, 1)))
    data = graph_codec.encode(gm, gm, "cpu")
    data.update(changes)
    return data


@pytest.mark.parametrize(
    "target",
    [
        "builtins.eval",
        "os.system",
        "operator.methodcaller",
        "operator.attrgetter",
        "torch.load",
        "torch.ops.aten.no_such.op",
    ],
)
def test_an_entry_can_name_nothing_but_ops_and_arithmetic(target: str) -> None:
    nodes = _data()["nodes"]
    nodes[1][2] = target
    with pytest.raises(CacheError, match="does not fit this process"):
        graph_codec.decode(_data(nodes=nodes), fx.GraphModule({}, fx.Graph()))


@pytest.mark.parametrize("target", ["torch.ops.import_module.os.system", "torch.ops.load_library.x.y"])
def test_an_entry_cannot_reach_through_the_namespace_of_ops(target: str) -> None:
    nodes = _data()["nodes"]
    nodes[1][2] = target
    with pytest.raises(CacheError):
        graph_codec.decode(_data(nodes=nodes), fx.GraphModule({}, fx.Graph()))


@pytest.mark.parametrize("module", ["os", "moe_fx.lowering", "antigravity", "moe_fx.lowering.nothing"])
def test_an_entry_can_import_nothing_but_lowerings(module: str) -> None:
    with pytest.raises(CacheError):
        graph_codec.decode(_data(modules=[module]), fx.GraphModule({}, fx.Graph()))


@pytest.mark.parametrize("value", [{"torch": "load"}, {"torch": "float32x"}, {"unknown": 1}, {"node": "no_such"}])
def test_an_entry_can_hold_nothing_but_plain_arguments(value: Any) -> None:
    nodes = _data()["nodes"]
    nodes[1][3] = [value]
    with pytest.raises(CacheError):
        graph_codec.decode(_data(nodes=nodes), fx.GraphModule({}, fx.Graph()))


def test_inductor_has_a_table_and_the_others_none() -> None:
    assert len(downstream.decompositions("inductor")) > 100
    assert downstream.decompositions("eager") == {}
