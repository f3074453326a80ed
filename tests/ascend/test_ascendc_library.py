"""The library of Ascend C kernels: built by `moe-fx build-ascend`, loaded when named, and not needed otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from host_cann.kernels import TOOLKIT
from lowered_op import difference, kernel

from moe_fx import ascend_build, ascend_library, cli
from moe_fx.ascend_library import VARIABLE
from moe_fx.errors import MissingToolchainError
from moe_fx.lowering.ascend import kernel_library, w4a16
from moe_fx.lowering.ops import CANONICAL_OPS


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(kernel_library, "loaded", lambda: None)


def sample(tokens):
    found = CANONICAL_OPS["experts_int4"].samples(torch.bfloat16, torch.Generator().manual_seed(0))
    return next(s.args for s in found if s.name == f"W4A16-zeros-T{tokens}")


def test_the_command_tells_where_it_wrote(monkeypatch, tmp_path, capsys):
    """What is built by CMake is tested with the kernels; here CMake only seems to run."""
    commands = []

    def run(command, cann):
        commands.append(command)
        if "--build" in command:
            (tmp_path / "build" / "libmoe_fx_ascendc.so").write_bytes(b"built")

    monkeypatch.setenv("ASCEND_HOME_PATH", str(TOOLKIT))
    monkeypatch.setattr(shutil, "which", lambda name, path: name)
    monkeypatch.setattr(ascend_build, "_run", run)
    (tmp_path / "build").mkdir()
    output = tmp_path / "kernels.so"
    arguments = ["build-ascend", "--output", str(output), "--build-dir", str(tmp_path / "build")]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(output)} and output.read_bytes() == b"built"
    assert f"-DASC_DIR={TOOLKIT}/compiler/tikcpp/ascendc_kernel_cmake" in commands[0]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"set {VARIABLE}={output} where moe-fx runs\n"


# With torch_npu's queue on, which the stand-in's other kernels would overtake. An operand is let go before it is read.
IN_QUEUE = """
import os, threading
import host_cann.preload
os.environ["TASK_QUEUE_ENABLE"] = "1"
import torch
import host_cann
from host_cann import eager_kernels
from moe_fx.lowering.ascend import kernel_library, swiglu_quant

threads, allocation = set(), eager_kernels._allocation
eager_kernels._allocation = lambda *args: (threads.add(threading.get_ident()), allocation(*args))[1]
host_cann.install()
kernel_library.loaded()
x = torch.randn(4, 256).bfloat16()
on_npu = x.npu()
torch.npu.synchronize()
y, scale = torch.ops.moe_fx_ascend.swiglu_dynamic_quant(on_npu)
del on_npu
torch.npu.synchronize()
want, _ = swiglu_quant.swiglu_dynamic_quant(x)
print((y.cpu().int() - want.int()).abs().max().item() <= 1, threads and threading.get_ident() not in threads)
"""


def test_launches_go_through_the_task_queue(kernels):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IN_QUEUE], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("True True\n"), done.stderr


def test_few_tokens_take_the_kernel_where_it_computes_the_call(kernels):
    assert kernel("experts_int4", sample(1), {}) == "moe_fx_ascend experts_w4a16 (Ascend C)"
    assert difference("experts_int4", sample(1), {}) == ""
    assert "grouped_matmul (W4A16)" in kernel("experts_int4", sample(9), {})
    assert "grouped_matmul (W4A16)" in kernel("experts_int4", sample(1), dict(act="gelu_tanh"))


def test_without_the_library_the_report_says_so(no_library):
    assert kernel("experts_int4", sample(1), {}).endswith(", for lack of the Ascend C kernel library")
    assert "lack" not in kernel("experts_int4", sample(9), {})
    assert difference("experts_int4", sample(1), {}) == ""


def test_a_library_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nowhere.so")
    with pytest.raises(MissingToolchainError, match="MOE_FX_ASCENDC_LIBRARY names nowhere"):
        kernel_library.loaded.__wrapped__()


def test_a_library_that_cannot_be_loaded_names_the_way_out(monkeypatch, tmp_path):
    library = tmp_path / "broken.so"
    monkeypatch.setattr(kernel_library, "misfit", lambda library: "")
    library.write_bytes(b"not a library")
    monkeypatch.setenv(VARIABLE, str(library))
    with pytest.raises(
        MissingToolchainError, match=r"broken\.so cannot be loaded .*: .*; build it .*moe-fx build-ascend"
    ):
        kernel_library.loaded.__wrapped__()


def test_a_library_says_what_it_was_built_from(kernels, monkeypatch, tmp_path):
    assert ascend_library.misfit(kernels) == "", "CMake and Python digest alike"
    shutil.copytree(ascend_library.sources(), tmp_path / "ascendc")
    (tmp_path / "ascendc" / "tiling" / "w4a16_plan.cpp").write_text("// changed")
    monkeypatch.setattr(ascend_library, "_SOURCES", (tmp_path / "ascendc",))
    with pytest.raises(MissingToolchainError, match=r"was built from other sources .*; build it anew with `moe-fx"):
        kernel_library.loaded.__wrapped__()


# The graph of a hit is not lowered, and so nobody asks whether its operators have kernels.
FROM_CACHE = """
import host_cann.preload
import torch
import host_cann
host_cann.install()
from compiling import compile_with_report
import moe_fx.lowering.ops

def router(x):
    return torch.ops.moe_fx.route(x, None, top_k=2, score="sqrtsoftplus")

options = dict(downstream="torchair", downstream_options={"mode": "npugraph_ex"})
run = compile_with_report(router, dynamic=False, fullgraph=True, **options)
run(torch.randn(4, 8).npu())
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("moe_fx_ascend::gating_topk", "PrivateUse1")
print(run.reports[0].cache.split(":")[0], has_kernel)
"""


def test_a_graph_from_the_cache_takes_the_kernels_too(kernels):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'support'}"}
    for outcome in ("miss", "hit"):
        command = [sys.executable, "-W", "ignore", "-c", FROM_CACHE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.endswith(f"{outcome} True\n"), done.stderr


def test_operators_are_defined_without_the_library():
    names = ("experts_w4a16", "gemv_w4a16", "gating_topk", "swiglu_dynamic_quant", "repack_int4", "int4_offsets")
    for name in names:
        operator = getattr(torch.ops.moe_fx_ascend, name).default
        assert torch.Tag.pt2_compliant_tag in operator.tags
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    packed, scale = torch.empty(64, 16, dtype=torch.int32, device="meta"), x.new_empty(2, 128)
    assert torch.ops.moe_fx_ascend.gemv_w4a16(x, packed, scale).shape == (3, 128)
    y, scales = torch.ops.moe_fx_ascend.swiglu_dynamic_quant(x)
    assert (y.shape, y.dtype, scales.shape) == ((3, 32), torch.int8, (3,))
    assert w4a16.MAX_TOKENS == 8
