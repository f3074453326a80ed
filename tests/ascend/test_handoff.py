"""torchair's options by name, its modes, gears, and the user's own passes."""

from __future__ import annotations

import inspect
import sys

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
import torchair
from compiling import compile_with_report
from host_cann import ge_interpreter
from model_cases import build, inputs

import moe_fx
from moe_fx import torchair_handoff
from moe_fx.errors import OptionError, UnsupportedError
from moe_fx.lowering.ascend import ge_converters


def router(x, w):
    weights, ids = torch.softmax((x @ w).float(), -1).topk(2, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def compiled(dynamic=False, fn=router, **torchair_options):
    return compile_with_report(
        fn, dynamic=dynamic, fullgraph=True, downstream="torchair", cache=False, downstream_options=torchair_options
    )


def operands(tokens=4):
    return torch.randn(tokens, 8).npu(), torch.randn(8, 16).npu()


def test_options_reach_the_config_by_name():
    options = {"debug.graph_dump.type": "py", "experimental_config": {"frozen_parameter": True}}
    config = torchair_handoff.configure(torchair.CompilerConfig(), "ge", options)
    assert config.mode.value == "max-autotune" and config.debug.graph_dump.type.value == "py"
    assert config.experimental_config.frozen_parameter
    assert torchair_handoff.configure(torchair.CompilerConfig(), "npugraph_ex", {}).mode.value == "npugraph_ex"


def test_a_config_is_told_in_options(tmp_path):
    given = torchair.CompilerConfig()
    given.mode = "npugraph_ex"
    given.experimental_config.frozen_parameter = True
    given.debug.graph_dump.type, given.debug.graph_dump.path = "py", str(tmp_path)
    given.post_grad_custom_pre_pass = print
    options = torchair_handoff.options_of(given)
    assert options["mode"] == "npugraph_ex" and options["experimental_config.frozen_parameter"] is True
    assert options["post_grad_custom_pre_pass"] is print
    _, again = torchair_handoff.configured(None, options)
    assert again.debug.graph_dump.path == str(tmp_path)
    assert torchair_handoff.options_of(again) == options
    assert torchair_handoff.options_of(torchair.CompilerConfig()) == {"mode": "ge"}


def test_cache_compile_goes_by_a_config():
    class Router(torch.nn.Module):
        def decode(self, x, w):
            return router(x, w)

    def note(gm, inputs, config):
        seen.append(config.mode.value)

    seen = []
    config = torchair.CompilerConfig()
    config.mode, config.post_grad_custom_post_pass = "npugraph_ex", note
    with torch.no_grad():
        moe_fx.cache_compile(Router().decode, config=config)(*operands())
        options = {"downstream_options": {"mode": "ge"}}
        moe_fx.cache_compile(Router().decode, config=config, options=options)(*operands())
    assert seen == ["npugraph_ex", "max-autotune"]


def test_asking_for_torchair_does_not_import_it(monkeypatch):
    class NotYet:
        def __getattr__(self, name):
            pytest.fail(f"asked for {name}, which imports torchair")

    monkeypatch.setitem(sys.modules, "torchair", NotYet())
    assert torchair_handoff.is_installed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "which torchair's config does not have: CompilerConfig has debug"),
        ({"debug.no_such": 1}, "_DebugConfig has graph_dump"),
        ({"debug.graph_dump.type.deeper": 1}, "that is not a group of options"),
        ({"debug.graph_dump.type": "pdf"}, "downstream_options\\['debug.graph_dump.type'\\] = 'pdf'"),
        ({"mode": "fast"}, "valid modes: ge, npugraph_ex"),
        ({"gears": {"x": {0: [1, 2]}}}, "dimension 0 of 'x', which is fixed"),
        ({"gears": {"x": [1, 2]}}, "give {argument name: {dimension: \\[sizes\\]}}"),
        ({"gears": [1, 2]}, "give {argument name: {dimension: \\[sizes\\]}}"),
        ({"gears": {"x": {2: [1, 2]}}}, "names dimension 2; 'x' has 2 dimensions"),
        ({"gears": {"x": {"0": [1, 2]}}}, "names dimension '0'; 'x' has 2 dimensions"),
        ({"mode": "npugraph_ex", "gears": {"x": {0: [1, 2]}}}, "is for mode='ge'"),
    ],
    ids=str,
)
def test_bad_options_teach(options, message):
    with pytest.raises(Exception, match=message) as raised:
        compiled(**options)(*operands())
    assert "OptionError" in f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "npugraph_ex", "max-autotune": False},
        {"debug": {"graph_dump": {"type": "py"}}},
        {"gears": {"y": {0: [1, 2]}}},
        {"epilogue_fusion": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_auto_leaves_out_the_other_compilers_options(options, device, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = compile_with_report(router, downstream="auto", fullgraph=True, cache=False, downstream_options=options)
    run(*(operand.to(device) for operand in operands()))
    assert run.reports[0].downstream == {"npu": "torchair", "cpu": "inductor"}[device]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "names 'no_such', which Inductor's config does not have"),
        ({"mode": "fast"}, "valid modes: ge, npugraph_ex"),
        ({"debug": {"no_such": 1}}, "_DebugConfig has graph_dump"),
    ],
    ids=str,
)
def test_what_auto_leaves_out_is_checked(options, message):
    run = compile_with_report(router, downstream="auto", fullgraph=True, cache=False, downstream_options=options)
    with pytest.raises(Exception, match=message):
        run(*(operand.cpu() for operand in operands()))


def test_mode_and_option_must_agree():
    with pytest.raises(OptionError, match="give one of them"):
        torchair_handoff._mode("ge", "npugraph_ex")


@pytest.mark.parametrize(("mode", "device"), [("npugraph_ex", "cpu"), ("max-autotune-no-cudagraphs", "npu")])
def test_auto_leaves_out_the_other_compilers_mode(mode, device):
    x, w = (operand.to(device) for operand in operands())
    fn = torch.compile(router, backend="moe_ascend", mode=mode, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(fn(x, w)[0].cpu(), router(x.cpu(), w.cpu())[0])


def test_mode_of_torch_compile():
    fn = torch.compile(router, backend="moe_ascend", mode="npugraph_ex", fullgraph=True)
    ge_interpreter.GRAPHS.clear()
    with torch.no_grad():
        fn(*operands())
    assert not ge_interpreter.GRAPHS, "nothing went to GE"


def test_torchair_is_the_default_on_npu():
    run = compile_with_report(router, downstream="auto", fullgraph=True, cache=False)
    run(*operands())
    assert (run.reports[0].target, run.reports[0].downstream) == ("ascend", "torchair")
    assert ge_interpreter.COUNTS["MoeGatingTopKSoftmax"] == 1


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("mode", torchair_handoff.MODES)
def test_the_users_passes_run(mode, cache):
    seen = []

    def note(when):
        return lambda gm, inputs, config: seen.append(
            (when, any("npu_moe_gating" in str(node.target) for node in gm.graph.nodes))
        )

    passes = {"post_grad_custom_pre_pass": note("before"), "post_grad_custom_post_pass": note("after")}
    for _ in range(2):
        torch._dynamo.reset()
        run = compile_with_report(
            router, fullgraph=True, downstream="torchair", cache=cache, downstream_options={"mode": mode, **passes}
        )
        run(*operands())
        assert seen == [("before", True), ("after", True)]
        seen.clear()
    why = "post_grad_custom_pre_pass is a function, whose changes the key would not show"
    assert run.reports[0].cache == f"off: {why if cache else 'cache=False'}"


def test_nothing_is_put_into_torchairs_patterns():
    from torchair.patterns.pattern_pass_manager import _pattern_manager

    def counts():
        return {key: len(entries) for key, entries in _pattern_manager().pass_dict.patterns.items()}

    before = counts()
    compiled()(*operands())
    assert counts() == before


def registered(monkeypatch, **converters):
    """``register``'s choice for ops of ``torch.ops.npu``, as if for the first time, with these converters there."""
    ops = [getattr(torch.ops.npu, name).default for name in converters]
    for op, converter in zip(ops, converters.values(), strict=True):
        monkeypatch.setattr(op, "_ge_converter", converter, raising=False)
    ge_converters.register.__wrapped__()
    return [op._ge_converter for op in ops]


def test_a_users_converter_stays(monkeypatch):
    def users(*args, **kwargs):
        pass

    found = registered(monkeypatch, npu_moe_gating_top_k_softmax_v2=users, npu_moe_token_unpermute=users)
    assert found == [users, users]


def test_torchairs_broken_converter_does_not_stay(monkeypatch):
    def own(*args, **kwargs):
        pass

    own.__module__ = "torchair._ge_concrete_graph.ge_converter.custom.npu_moe_gating_top_k_softmax_v2"
    (found,) = registered(monkeypatch, npu_moe_gating_top_k_softmax_v2=own)
    assert inspect.unwrap(found).__module__ == ge_converters.__name__


def test_a_default_of_torchairs_is_the_operators(monkeypatch):
    """Seen in the golden of int8 experts: dequant_dtype=0 is fp32 in GE, where torchair alone writes uint8."""

    def users(*args, **kwargs):
        pass

    assert registered(monkeypatch, npu_grouped_matmul_swiglu_quant_v2=users) == [users]
    given = {}

    def own(*args, meta_outputs=None, **kwargs):
        given.update(kwargs)

    own.__module__ = "torchair._ge_concrete_graph.ge_converter.custom.grouped_matmul_swiglu_quant_v2"
    (found,) = registered(monkeypatch, npu_grouped_matmul_swiglu_quant_v2=own)
    inspect.unwrap(found)(meta_outputs=None)
    assert given == {"dequant_dtype": 6}


def test_a_torchair_of_another_shape_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchair._ge_concrete_graph.fx2ge_converter", None)
    with pytest.raises(UnsupportedError, match="use mode='npugraph_ex', which needs none"):
        ge_converters.register.__wrapped__()


def test_npugraph_ex_compiles_without_converters(monkeypatch):
    monkeypatch.setattr(ge_converters, "register", lambda: pytest.fail("registered"))
    fn = torch.compile(lambda x: x + 1, backend="moe_ascend", mode="npugraph_ex", fullgraph=True)
    with torch.no_grad():
        fn(torch.randn(4).npu())


def test_gears():
    ge_interpreter.OPTIONS.clear()
    run = compiled(dynamic=True, gears={"x": {0: [2, 4, 8]}})
    for tokens in (4, 8):
        x, w = operands(tokens)
        weights, _ = run(x, w)
        assert torch.allclose(weights.cpu(), router(x.cpu(), w.cpu())[0])
    (options,) = ge_interpreter.OPTIONS.values()
    assert sorted(options["ge.dynamicDims"].split(";")) == ["2", "4", "8"]


def test_graphs_without_the_argument_have_no_gears():
    def two_graphs(x, w):
        y = x @ w
        torch._dynamo.graph_break()
        del x
        return torch.sigmoid(y)

    run = compile_with_report(
        two_graphs, dynamic=True, downstream="torchair", cache=False, downstream_options={"gears": {"x": {0: [2, 4]}}}
    )
    x, w = operands(4)
    assert torch.allclose(run(x, w).cpu(), torch.sigmoid(x.cpu() @ w.cpu()), atol=1e-5)
    assert len(run.reports) == 2


def test_gears_leave_other_examples_as_they_are():
    def fn(x, w):
        return x @ w

    seen = []

    def backend(gm, inputs):
        seen.append((inputs, torchair_handoff._with_gears(gm, inputs, {"x": {0: [2, 4]}})))
        return gm.forward

    torch.compile(fn, backend=backend, dynamic=True)(*operands(4))
    ((examples, marked),) = seen
    assert [m.dim_gears for m in marked if hasattr(m, "dim_gears")] == [{0: [2, 4]}]
    assert sum(m is not e for m, e in zip(marked, examples, strict=True)) == 1
    assert not any(hasattr(e, "dim_gears") for e in examples)


def test_a_model_has_one_graph_and_no_break():
    run = compile_with_report(build("qwen3_moe").npu(), downstream="torchair", fullgraph=True, cache=False)
    run(inputs().npu(), use_cache=False)
    assert len(run.reports) == 1
