"""The gate itself: each way for a kernel to fail on Ascend is told, and sound kernels pass."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from triton_cases.case import Case
from triton_compile import TRITON_ASCEND, Result, ascend_compilers_missing, compile_ascend

ADD = {"x": "*bf16", "out": "*bf16", "n": "i32"}
IDS = {"x": "*bf16", "ids": "*i32", "out": "*bf16"}
CASES = [
    Case("sound", "gate_kernels:add_one", ADD, {"BLOCK": 1024}),
    Case("too-large", "gate_kernels:add_one", ADD, {"BLOCK": 65536}),
    Case("less", "gate_kernels:less", {"x": "*i32", "y": "*i32", "out": "*fp32"}, {"BLOCK": 256}),
    Case("gather", "gate_kernels:gather", IDS, {"BLOCK": 128}),
    Case("scatter", "gate_kernels:scatter", IDS, {"BLOCK": 128}),
    Case("rows", "gate_kernels:gather_rows", IDS, {"BLOCK": 256}),
    Case("product", "gate_kernels:product", {"a": "*bf16", "b": "*bf16", "out": "*fp32"}, {"BLOCK": 64}),
    Case("misspelt", "gate_kernels:misspelt", {"x": "*fp32"}, {"BLOCK": 256}),
    Case("crash", "gate_crash:kernel", {}, {}),
    Case("after-crash", "gate_kernels:add_one", ADD, {"BLOCK": 512}),
]


@pytest.fixture(scope="module")
def gate(ascend_compilers: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return compile_ascend(CASES, tmp_path_factory.mktemp("gate"), package="")


@pytest.mark.parametrize("name", ["sound", "rows", "product", "after-crash"])
def test_sound_kernels_pass(name: str, gate: dict[str, Result]) -> None:
    assert gate[name].error is None
    assert gate[name].loops == gate[name].warnings == []
    assert 0 < gate[name].memory.get("ub", 1) < 192 * 1024


def test_product_reports_the_memory_of_the_cube_unit(gate: dict[str, Result]) -> None:
    assert gate["product"].memory["cbuf"] == 2 * 64 * 64 * 2
    assert gate["product"].memory["cc"] == 64 * 64 * 4


def test_overflow_of_the_unified_buffer_is_told_in_bytes(gate: dict[str, Result]) -> None:
    assert gate["too-large"].error.startswith("UB overflow: needs ")
    assert gate["too-large"].error.endswith(f"the core has {192 * 1024}")


@pytest.mark.parametrize(
    "name, loop", [("less", "arith.cmpi i64 x 256"), ("gather", "gather x 128"), ("scatter", "scatter x 128")]
)
def test_scalar_loops_are_found(name: str, loop: str, gate: dict[str, Result]) -> None:
    assert gate[name].error is None
    assert [str(found) for found in gate[name].loops] == [loop]


def test_what_the_compiler_warns_of_is_kept(gate: dict[str, Result]) -> None:
    assert gate["less"].warnings == ["hivm.hir.vcmp"]


def test_parse_error_gives_the_message_of_the_compiler(gate: dict[str, Result]) -> None:
    assert gate["misspelt"].error.startswith("triton-ascend cannot parse it: ")
    assert "no_such_name is not defined" in gate["misspelt"].error


def test_crash_costs_its_own_case_only(gate: dict[str, Result]) -> None:
    assert "SIGSEGV" in gate["crash"].error
    assert list(gate) == [case.name for case in CASES]


def test_compilers_process_has_no_torch(ascend_compilers: None, tmp_path: Path) -> None:
    result = compile_ascend([Case("torch", "torch:nn", {}, {})], tmp_path, package="")["torch"]
    assert "No module named 'torch'" in result.error


def test_compiler_killed_by_a_signal_is_tried_again(
    ascend_compilers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers = compilers_that_crash(tmp_path, times=3)
    monkeypatch.setattr("triton_compile.TRITON_ASCEND", compilers)
    case = Case("sound", "gate_kernels:add_one", ADD, {"BLOCK": 1024})
    assert compile_ascend([case], tmp_path, package="")["sound"].error is None


def test_compiler_that_is_always_killed_is_reported(
    ascend_compilers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers = compilers_that_crash(tmp_path, times=9)
    monkeypatch.setattr("triton_compile.TRITON_ASCEND", compilers)
    case = Case("sound", "gate_kernels:add_one", ADD, {"BLOCK": 1024})
    error = compile_ascend([case], tmp_path, package="")["sound"].error
    assert error.startswith("triton-ascend to Linalg killed by signal 11, 4 times")


def compilers_that_crash(folder: Path, times: int) -> Path:
    """The Ascend compilers as links, but the step to Linalg is killed by a signal the first few times."""
    compilers = folder / "compilers"
    shutil.copytree(TRITON_ASCEND, compilers, copy_function=lambda source, link: os.symlink(source, link))
    adapter = compilers / "triton" / "backends" / "ascend" / "triton-adapter-opt"
    real = adapter.resolve()
    adapter.unlink()
    left = folder / "left"
    left.write_text("x" * times)
    adapter.write_text(f'#!/bin/sh\n[ -s {left} ] || exec {real} "$@"\ntruncate -s -1 {left}\nkill -SEGV $$\n')
    adapter.chmod(0o755)
    return compilers


def test_absent_compilers_are_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_compile.TRITON_ASCEND", tmp_path)
    assert "make test-triton-ascend" in ascend_compilers_missing()
