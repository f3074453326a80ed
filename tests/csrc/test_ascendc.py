"""The C++ tests of csrc/ascendc: the kernels, their tiling, and the host model that they run on.

Everything here runs on the host: the model's header stands for CANN's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCENDC = ROOT / "csrc" / "ascendc"
KERNELS = sorted(path.name for path in (ASCENDC / "kernels").glob("*.h"))

# The folder's name under build/, and what -fsanitize gets.
VARIANTS = {"ascendc": "", "ascendc-address": "address,undefined"}

# Operations that arch 2201 does not have, and what the model says to a kernel that uses them.
MISSING = {
    "Muls(LocalTensor<bfloat16_t>(), LocalTensor<bfloat16_t>(), bfloat16_t(1.0f), 16)": "Muls: type",
    "Cast(LocalTensor<float>(), LocalTensor<int4b_t>(), RoundMode::CAST_NONE, 16u)": "does not convert between",
    "Cast(LocalTensor<bfloat16_t>(), LocalTensor<int4b_t>(), RoundMode::CAST_NONE, 16u)": "does not convert between",
    "Cast(LocalTensor<bfloat16_t>(), LocalTensor<half>(), RoundMode::CAST_RINT, 16u)": "does not convert between",
    "Axpy(LocalTensor<float>(), LocalTensor<bfloat16_t>(), bfloat16_t(1.0f), 16)": "Axpy: types",
    "Div(LocalTensor<int32_t>(), LocalTensor<int32_t>(), LocalTensor<int32_t>(), 16)": "Div: type",
    "And(LocalTensor<int32_t>(), LocalTensor<int32_t>(), LocalTensor<int32_t>(), 16)": "And: type",
    "Duplicate(LocalTensor<int8_t>(), int8_t(0), 16)": "Duplicate: type",
}


def run(command: list[str], timeout: float) -> str:
    """The output of a command, stderr included; fails the test with it when the command fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "ASAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    if done.returncode:
        pytest.fail(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def compiler() -> str:
    """The C++ compiler that CMake would take; skips the test where there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    pytest.skip("no C++ compiler (Debian: apt-get install g++)")


def check(cxx: str, source: str) -> subprocess.CompletedProcess[str]:
    """Has a compiler check a source against the model, as strictly as it can."""
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{ASCENDC}", f"-I{ASCENDC / 'model' / 'include'}"]
    return subprocess.run([cxx, *flags, *includes, "-x", "c++", "-"], input=source, text=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ascendc_tests_pass(variant: str, tmp_path: Path) -> None:
    sanitizers = VARIANTS[variant]
    if not shutil.which("cmake"):
        pytest.skip("no cmake (Debian: apt-get install cmake; anywhere: pip install cmake)")
    cxx = compiler()
    if check(cxx, "#include <doctest/doctest.h>\n").returncode:
        pytest.skip("no doctest (Debian: apt-get install doctest-dev)")
    if sanitizers:
        probe = [cxx, "-x", "c++", "-", f"-fsanitize={sanitizers}", "-o", str(tmp_path / "probe")]
        if subprocess.run(probe, input="int main() {}\n", text=True, capture_output=True).returncode:
            pytest.skip(f"{cxx} cannot link programs with -fsanitize={sanitizers}")
    build = ROOT / "build" / variant
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    run(["cmake", "-S", "csrc/ascendc/tests", "-B", str(build), f"-DMOE_FX_SANITIZE={sanitizers}"], timeout=120)
    run(["cmake", "--build", str(build), "--parallel", jobs], timeout=2400)
    # Sizes of published models take most of the time, and no path in C++ that small ones do not.
    skipped = ["--test-case-exclude=experts: shapes of*,experts: Qwen3*"] if sanitizers else []
    print(run([str(build / "moe_fx_ascendc_tests"), *skipped], timeout=1800))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_with_clang(kernel: str) -> None:
    """Each kernel header on its own, with the compiler whose family CANN's belongs to."""
    clang = shutil.which("clang++")
    if not clang:
        pytest.skip("no clang++ (Debian: apt-get install clang)")
    done = check(clang, f'#include "kernels/{kernel}"\n')
    assert done.returncode == 0, done.stderr


def test_operations_that_the_hardware_lacks_do_not_compile() -> None:
    lines = ['#include "kernel_operator.h"', "using namespace AscendC;", "void good() { SyncAll(); }"]
    cxx = compiler()
    assert check(cxx, "\n".join(lines) + "\n").returncode == 0
    for number, expression in enumerate(MISSING):
        lines.append(f"void missing{number}() {{ {expression}; }}")
    done = check(cxx, "\n".join(lines) + "\n")
    assert done.returncode != 0
    for number, (expression, message) in enumerate(MISSING.items()):
        assert message in done.stderr, expression
        assert f"<stdin>:{number + 4}:" in done.stderr, expression
