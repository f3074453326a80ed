"""torchair's options by name, its modes, gears, and the user's own passes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
import torchair
from compiling import compile_with_report
from host_cann import ge_interpreter
from model_cases import build, inputs

from moe_fx import torchair_handoff
from moe_fx.errors import OptionError


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "which torchair's config does not have: CompilerConfig has debug"),
        ({"debug.no_such": 1}, "_DebugConfig has graph_dump"),
        ({"debug.graph_dump.type.deeper": 1}, "that is not a group of options"),
        ({"debug.graph_dump.type": "pdf"}, "downstream_options\\['debug.graph_dump.type'\\] = 'pdf'"),
        ({"mode": "fast"}, "valid modes: ge, npugraph_ex"),
        ({"gears": {"y": {0: [1, 2]}}}, "names 'y'; the graph's tensor arguments are: x, w"),
        ({"gears": {"x": {0: [1, 2]}}}, "dimension 0 of 'x', which is fixed"),
        ({"mode": "npugraph_ex", "gears": {"x": {0: [1, 2]}}}, "is for mode='ge'"),
    ],
    ids=str,
)
def test_bad_options_teach(options, message):
    with pytest.raises(Exception, match=message):
        compiled(**options)(*operands())


def test_mode_and_option_must_agree():
    with pytest.raises(OptionError, match="give one of them"):
        torchair_handoff._mode("ge", "npugraph_ex")


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


def test_the_users_passes_run():
    seen = []

    def before(gm, example_inputs, config):
        seen.append(("before", any("npu_moe_gating" in str(node.target) for node in gm.graph.nodes)))

    def after(gm, example_inputs, config):
        seen.append(("after", any("npu_moe_gating" in str(node.target) for node in gm.graph.nodes)))

    compiled(post_grad_custom_pre_pass=before, post_grad_custom_post_pass=after)(*operands())
    assert seen == [("before", True), ("after", True)]


def test_nothing_is_put_into_torchairs_patterns():
    from torchair.patterns import pattern_pass_manager

    before = {name: repr(value)[:2000] for name, value in vars(pattern_pass_manager).items()}
    compiled()(*operands())
    assert {name: repr(value)[:2000] for name, value in vars(pattern_pass_manager).items()} == before


def test_gears():
    ge_interpreter.OPTIONS.clear()
    run = compiled(dynamic=True, gears={"x": {0: [2, 4, 8]}})
    for tokens in (4, 8):
        x, w = operands(tokens)
        weights, _ = run(x, w)
        assert torch.allclose(weights.cpu(), router(x.cpu(), w.cpu())[0])
    (options,) = ge_interpreter.OPTIONS.values()
    assert sorted(options["ge.dynamicDims"].split(";")) == ["2", "4", "8"]


def test_a_model_has_one_graph_and_no_break():
    run = compile_with_report(build("qwen3_moe").npu(), downstream="torchair", fullgraph=True, cache=False)
    run(inputs().npu(), use_cache=False)
    assert len(run.reports) == 1
