"""Every Triton kernel meant for CUDA, at the shapes of real models, compiled to sm_90 code. Needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from triton_cases import all_cases
from triton_cases.case import Case
from triton_compile import Result, compile_cuda

pytest.importorskip("triton", reason="upstream Triton is not installed (it is made for Linux)")

# What one block of an H100 can have.
SHARED_MEMORY = 232_448
CASES = [case for case in all_cases() if case.ascend_only is None]
ADD = {"x": "*bf16", "out": "*bf16", "n": "i32"}
PRODUCT = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
GATE = [
    Case("sound", "gate_kernels:add_one", ADD, {"BLOCK": 1024}),
    Case("product", "gate_kernels:product", PRODUCT, {"BLOCK": 64}),
    Case("misspelt", "gate_kernels:misspelt", {"x": "*fp32"}, {"BLOCK": 256}),
    Case("crash", "gate_crash:kernel", {}, {}),
    Case("after-crash", "gate_kernels:add_one", ADD, {"BLOCK": 512}),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return compile_cuda(CASES, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return compile_cuda(GATE, tmp_path_factory.mktemp("gate"), package="")


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_compiles(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    assert result.error is None, result.error
    assert result.memory["shared"] < SHARED_MEMORY


def test_gate_tells_shared_memory(gate: dict[str, Result]) -> None:
    assert gate["sound"].error is gate["product"].error is gate["after-crash"].error is None
    assert gate["sound"].memory["shared"] == 0
    assert gate["product"].memory["shared"] >= 2 * 64 * 64 * 2


def test_gate_gives_the_message_of_the_compiler(gate: dict[str, Result]) -> None:
    assert "no_such_name is not defined" in gate["misspelt"].error


def test_gate_survives_a_crash(gate: dict[str, Result]) -> None:
    assert "SIGSEGV" in gate["crash"].error


def test_every_kernel_has_a_case() -> None:
    """A launched kernel is named <what>_kernel; those without a case would pass both gates unseen."""
    folder = Path(__file__).parents[2] / "lowering" / "triton"
    launched = {
        f"{path.stem}:{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert launched == {case.kernel for case in all_cases()}
