"""The C++ tests of csrc/tests, cross-compiled for Arm and run under QEMU: what ``make test-arm`` does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = "Debian: apt-get install cmake doctest-dev g++-aarch64-linux-gnu qemu-user-static"
COMPILER = "aarch64-linux-gnu-g++"


def require_tools() -> None:
    """Skips the test, with the command that helps, where a tool is missing."""
    for tool in ("make", "cmake", COMPILER, "qemu-aarch64-static"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} ({INSTALL})")
    probe = [COMPILER, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probe, input="#include <doctest/doctest.h>\n", text=True, capture_output=True).returncode:
        pytest.skip(f"no doctest ({INSTALL})")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_native_tests_pass_on_emulated_arm() -> None:
    require_tools()
    # A make that runs pytest hands its own options down; this one is a run of its own. So are the engine's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "MOE_FX_"))}
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    done = subprocess.run(
        ["make", "test-arm"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3000,
        cwd=ROOT,
        env={**inherited, "CMAKE_BUILD_PARALLEL_LEVEL": jobs},
    )
    if done.returncode:
        pytest.fail(f"make test-arm ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    # Both Arm tables were there to be tested, and none on a processor without dot products.
    runs = done.stdout.split("-cpu ")
    assert "kernels: i8mm" in runs[1] and "kernels: neon" in runs[1]
    assert "kernels: neon" in runs[-2] and "kernels: i8mm" not in runs[-2]
    assert "kernels: scalar" in runs[-1] and "kernels: neon" not in runs[-1]
