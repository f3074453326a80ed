"""Real transformers families compiled for Ascend, in both modes of torchair, against the eager model on the CPU.

GE mode: torchair converts the graph, the stand-in interprets it. npugraph_ex: captured and replayed eager kernels.
Models are as transformers loads them, with sdpa where they have it. Logits are compared, and which experts each token
went to. On hardware other sets are reported, since a router may score two experts alike; what the stand-in counts is
not there.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from model_cases import NAMES, Routed, build, inputs, rerouted
from moe_families import FAMILIES
from npu_report import note, note_rerouted, on_hardware

pytestmark = pytest.mark.npu
# An NPU may multiply fp32 with 11 bits (HF32): its bound is an assumption, not a measurement.
BOUND = {torch.float32: 2e-3 if on_hardware() else 1e-5, torch.bfloat16: 6e-2}
MODES = ("ge", "npugraph_ex")
# What each family's blocks must run on; all is matched, and nothing else keeps a reference.
ROUTER = {
    "qwen3_moe": "npu_moe_gating_top_k_softmax",
    "deepseek_v3": "npu_moe_gating_top_k",
    "glm4_moe": "npu_moe_gating_top_k",
    "minimax_m2": "npu_moe_gating_top_k",
    "afmoe": "npu_moe_gating_top_k",
    "gpt_oss": "npu_moe_gating_top_k_softmax_v2",
}


def compiled(model, mode="ge", dynamic=False, **options):
    return compile_with_report(
        model, dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True, cache=False,
        downstream_options={"mode": mode, **options.pop("torchair", {})}, **options,
    )  # fmt: skip


def check(name, mode, dynamic, dtype=torch.float32, attention=None, **options):
    model = Routed(build(name, dtype, attention=attention or FAMILIES[name].attention))
    shapes = ((2, 6), (2, 6), (3, 5)) if dynamic else ((2, 6), (2, 6))
    with torch.no_grad():
        wanted = [model(inputs(*shape)) for shape in shapes]
    run = compiled(model.to("npu"), mode, dynamic, **options)
    layers = FAMILIES[name].budget["experts"]
    for shape, (logits, ids) in zip(shapes, wanted, strict=True):
        got, chosen = run(inputs(*shape).to("npu"))
        assert note(relative_error(got.cpu(), logits)) <= BOUND[dtype]
        assert len(ids) == layers and all(of_layer.shape == (shape[0] * shape[1], 2) for of_layer in ids)
        # Where two experts score alike, another order of rounding may choose the other one.
        differ = note_rerouted(rerouted(chosen, ids), compared=layers * shape[0] * shape[1])
        assert differ == 0 or on_hardware() or dtype != torch.float32
    assert run.reasons == []
    assert all(report.count(kind) == n for report in run.reports for kind, n in FAMILIES[name].budget.items())
    kernels = {(site.kind, site.kernel) for report in run.reports for site in report.matched}
    assert {kernel for kind, kernel in kernels if kind == "router"} == {f"torch_npu {ROUTER[name]}"}
    assert all(kernel.startswith("torch_npu") for kind, kernel in kernels if kind in ("experts", "norm"))
    return run


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_ge(name, dynamic):
    run = check(name, "ge", dynamic)
    assert len(run.reports) == 1, "a new length or batch recompiled"
    if on_hardware():
        return
    layers = FAMILIES[name].budget["experts"]
    calls = 3 if dynamic else 2
    assert ge_interpreter.COUNTS["MoeInitRoutingV3"] == ge_interpreter.COUNTS["MoeFinalizeRoutingV2"] == layers * calls
    assert ge_interpreter.COUNTS["GroupedMatmul"] == 2 * layers * calls
    assert ge_interpreter.COUNTS["MoeGatingTopKSoftmaxV2"] == (layers * calls if name == "gpt_oss" else 0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_npugraph_ex(name, dynamic):
    eager_kernels.EVENTS.clear()
    run = check(name, "npugraph_ex", dynamic)
    assert len(run.reports) == 1, "a new length or batch recompiled"
    assert on_hardware() or 2 in eager_kernels.EVENTS, "nothing was replayed"


@pytest.mark.parametrize("mode", MODES)
def test_another_set_is_noticed(mode):
    """The ids come out of the compiled graph, call by call: they follow its router, not the eager model's."""
    model = Routed(build("qwen3_moe"))
    with torch.no_grad():
        _, wanted = model(inputs())
        run = compiled(model.to("npu"), mode)
        assert rerouted(run(inputs().to("npu"))[1], wanted) == 0 or on_hardware()
        router = model.model.model.layers[1].mlp.gate.weight
        router.copy_(router.roll(1, 0))  # Every token of this layer goes to the experts' neighbours.
    tokens = wanted[1].shape[0]
    assert rerouted(run(inputs().to("npu"))[1], wanted) == tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_bf16(name, mode):
    run = check(name, mode, True, torch.bfloat16)
    assert len(run.reports) == 1, "a new length or batch recompiled"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].attention != "eager"])
def test_attention_written_out_by_the_model(name, mode):
    run = check(name, mode, True, attention="eager")
    assert len(run.reports) == 1, "a new length or batch recompiled"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
def test_token_unpermute(name, mode):
    check(name, mode, True, ascend_combine="token_unpermute")
    if mode == "ge" and not on_hardware():
        assert ge_interpreter.COUNTS["MoeTokenUnpermute"] and not ge_interpreter.COUNTS["MoeFinalizeRoutingV2"]


@pytest.mark.parametrize("mode", MODES)
def test_weights_as_they_are(mode):
    check("qwen3_moe", mode, False, ascend_weights="as_is")


@pytest.mark.parametrize(
    "options", [dict(ascend_prefetch=True, ascend_shared_stream=True), dict(ascend_nz=True)], ids=["beside", "NZ"]
)
@pytest.mark.parametrize("mode", MODES)
def test_choices_that_only_hardware_feels(mode, options):
    check("glm4_moe", mode, False, torch.bfloat16, **options)
