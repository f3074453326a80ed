"""The C++ tests of csrc/tests, built plain and under the sanitizers, and run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The folder's name under build/, and what -fsanitize gets.
VARIANTS = {"plain": "", "address": "address,undefined", "thread": "thread"}

# Races in what a run happens to do, and leaks, end a sanitizer's program with this status unless told otherwise; a
# number of our own tells them from doctest's 1.
ENVIRONMENT = {"ASAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "exitcode=66"}


def run(command: list[str], timeout: float, **environment: str) -> str:
    """The output of a command, stderr included; fails the test with it when the command fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **environment},
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


def require_tools(sanitizers: str, folder: Path) -> None:
    """Skips the test, with the command that helps, where cmake, a compiler, doctest or a sanitizer is missing."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake (Debian: apt-get install cmake; anywhere: pip install cmake)")
    cxx = compiler()
    flags = [f"-fsanitize={sanitizers}"] if sanitizers else []
    probes = {
        "#include <doctest/doctest.h>": (["-fsyntax-only"], "no doctest (Debian: apt-get install doctest-dev)"),
        "": ([*flags, "-o", str(folder / "probe")], f"{cxx} cannot link programs with -fsanitize={sanitizers}"),
    }
    for source, (arguments, reason) in probes.items():
        command = [cxx, "-std=c++20", "-x", "c++", "-", *arguments]
        if subprocess.run(command, input=f"{source}\nint main() {{}}\n", text=True, capture_output=True).returncode:
            pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_tests_pass(variant: str, tmp_path: Path) -> None:
    sanitizers = VARIANTS[variant]
    require_tools(sanitizers, tmp_path)
    build = ROOT / "build" / f"native-{variant}"
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    run(["cmake", "-S", "csrc/tests", "-B", str(build), f"-DMOE_FX_SANITIZE={sanitizers}"], timeout=120)
    run(["cmake", "--build", str(build)], timeout=2400, CMAKE_BUILD_PARALLEL_LEVEL=jobs)
    print(run([str(build / "moe_fx_tests")], timeout=900, **ENVIRONMENT))
