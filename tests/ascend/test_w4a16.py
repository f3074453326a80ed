"""The project's op for int4 experts at decode: when it is chosen, what runs without its kernel, and its GE form."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from compiling import compile_with_report
from host_cann import ge_interpreter, ge_ops
from host_cann.preload import LIBRARY
from lowered_op import difference, kernel

from moe_fx.check import compare_outputs
from moe_fx.errors import MissingToolchainError
from moe_fx.lowering.ascend import w4a16
from moe_fx.lowering.ops import CANONICAL_OPS

OPERANDS = ("x", "weights", "ids", "w13", "w13_scale", "w13_offset", "w2", "w2_scale", "w2_offset")


def sample(tokens):
    found = CANONICAL_OPS["experts_int4"].samples(torch.bfloat16, torch.Generator().manual_seed(0))
    return next(s.args for s in found if s.name == f"W4A16-zeros-T{tokens}")


@pytest.fixture
def library(monkeypatch):
    """As if the kernel library were there, and every id an expert's."""
    monkeypatch.setattr(w4a16, "kernel_library", lambda: Path("libmoe_fx_ascendc.so"))
    monkeypatch.setattr("moe_fx.lowering.ascend.target.ids_in_range", lambda node: True)


def test_few_tokens_take_it_where_the_library_is(library):
    assert "experts_w4a16" in kernel("experts_int4", sample(1), {})
    assert "grouped_matmul (W4A16)" in kernel("experts_int4", sample(9), {})
    assert "grouped_matmul (W4A16)" in kernel("experts_int4", sample(1), dict(act="gelu_tanh"))


def test_without_the_library_the_report_says_so(monkeypatch):
    monkeypatch.setattr("moe_fx.lowering.ascend.target.ids_in_range", lambda node: True)
    assert "for lack of the Ascend C kernel library" in kernel("experts_int4", sample(1), {})


def test_the_op_without_its_kernel_runs_the_grouped_product(library):
    assert difference("experts_int4", sample(1), {}) == ""


def test_a_library_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv(w4a16.LIBRARY_VARIABLE, "nowhere.so")
    w4a16.kernel_library.cache_clear()
    with pytest.raises(MissingToolchainError, match="MOE_FX_ASCENDC_LIBRARY names nowhere"):
        w4a16.kernel_library()


def test_ge_gets_one_operator(library, monkeypatch):
    description = "".join(f"in {name} required\n" for name in OPERANDS) + "out y required"
    LIBRARY.host_cann_register_ir(b"MoeFxExpertsW4A16", description.encode())
    want = CANONICAL_OPS["experts_int4"].reference(*sample(1))

    def computed(op, **operands):
        return w4a16.experts_w4a16(**{name: operand.npu() for name, operand in operands.items()}).cpu()

    monkeypatch.setitem(ge_ops.OPERATORS, "MoeFxExpertsW4A16", computed)
    run = compile_with_report(torch.ops.moe_fx.experts_int4, fullgraph=True, downstream="torchair", cache=False)
    args = [a.npu() if isinstance(a, torch.Tensor) else a for a in sample(1)]
    assert compare_outputs("experts_int4", run(*args).cpu(), want) == ""
    assert ge_interpreter.COUNTS["MoeFxExpertsW4A16"] == 1 and not ge_interpreter.COUNTS["GroupedMatmul"]
