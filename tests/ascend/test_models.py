"""Real transformers families compiled for Ascend, in both modes of torchair, against the eager model on the CPU.

GE mode: torchair converts the graph, the stand-in interprets it. npugraph_ex: captured and replayed eager kernels.
On hardware the results are compared; what the stand-in counted is not there.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from model_cases import NAMES, RecordTopK, build, inputs, recorded_gating, same_sets
from moe_families import FAMILIES
from npu_report import note, on_hardware

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


def check(name, mode, dynamic, monkeypatch, dtype=torch.float32, **options):
    model = build(name, dtype)
    shapes = ((2, 6), (2, 6), (3, 5)) if dynamic else ((2, 6), (2, 6))
    wanted, record = [], RecordTopK()
    with torch.no_grad(), record:
        wanted = [model(inputs(*shape), use_cache=False).logits for shape in shapes]
    run = compiled(model.to("npu"), mode, dynamic, **options)
    with recorded_gating(monkeypatch) as found:
        for shape, want in zip(shapes, wanted, strict=True):
            got = run(inputs(*shape).to("npu"), use_cache=False).logits
            assert note(relative_error(got.cpu(), want)) <= BOUND[dtype]
    assert run.reasons == []
    assert all(report.count(kind) == n for report in run.reports for kind, n in FAMILIES[name].budget.items())
    kernels = {(site.kind, site.kernel) for report in run.reports for site in report.matched}
    assert {kernel for kind, kernel in kernels if kind == "router"} == {f"torch_npu {ROUTER[name]}"}
    assert all(kernel.startswith("torch_npu") for kind, kernel in kernels if kind in ("experts", "norm"))
    return run, found, record.ids


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_ge(name, dynamic, monkeypatch):
    run, found, wanted = check(name, "ge", dynamic, monkeypatch)
    assert len(run.reports) == 1, "a new length or batch recompiled"
    if on_hardware():
        return
    assert same_sets(found, wanted)
    layers = FAMILIES[name].budget["experts"]
    calls = 3 if dynamic else 2
    assert ge_interpreter.COUNTS["MoeInitRoutingV3"] == ge_interpreter.COUNTS["MoeFinalizeRoutingV2"] == layers * calls
    assert ge_interpreter.COUNTS["GroupedMatmul"] == 2 * layers * calls
    assert ge_interpreter.COUNTS["MoeGatingTopKSoftmaxV2"] == (layers * calls if name == "gpt_oss" else 0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_npugraph_ex(name, dynamic, monkeypatch):
    eager_kernels.EVENTS.clear()
    check(name, "npugraph_ex", dynamic, monkeypatch)
    assert on_hardware() or 2 in eager_kernels.EVENTS, "nothing was replayed"


@pytest.mark.parametrize("mode", MODES)
def test_bf16(mode, monkeypatch):
    check("qwen3_moe", mode, False, monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
def test_token_unpermute(name, mode, monkeypatch):
    check(name, mode, True, monkeypatch, ascend_combine="token_unpermute")
    if mode == "ge" and not on_hardware():
        assert ge_interpreter.COUNTS["MoeTokenUnpermute"] and not ge_interpreter.COUNTS["MoeFinalizeRoutingV2"]


@pytest.mark.parametrize("mode", MODES)
def test_weights_as_they_are(mode, monkeypatch):
    check("qwen3_moe", mode, False, monkeypatch, ascend_weights="as_is")
