"""Every Triton kernel meant for Ascend, at the shapes of real models, through the real Ascend compilers to HIVM.

That a kernel compiles says that it is legal, fits on-chip memory and is vectorised; it does not say that it runs on an
NPU. EXPECTTEST_ACCEPT=1 pytest tests/ascend_triton rewrites memory.txt.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest
from triton_cases import all_cases
from triton_compile import Result

HERE = Path(__file__).parent
MEMORY = HERE / "memory.txt"
SCALAR_LOOPS = HERE / "scalar_loops.txt"
UNIFIED_BUFFER = 192 * 1024
# bishengir-compile lays buffers out in another order from run to run: a kernel may end this much higher.
TOLERANCE = 1024
CASES = [case.name for case in all_cases() if case.cuda_only is None]
MEMORY_HEADER = f"""\
# On-chip memory of each case on an Ascend 910B3 as bishengir-compile 1.0.0 plans it: bytes of the unified buffer, their
# share of its {UNIFIED_BUFFER}, and bytes of L1 where the cube unit works.
# EXPECTTEST_ACCEPT=1 pytest tests/ascend_triton writes this file.
"""


class Allowed(NamedTuple):
    """A line of scalar_loops.txt: glob of cases, glob of loops, reason."""

    case: str
    loop: str
    reason: str

    def covers(self, case: str, loop: str) -> bool:
        return fnmatchcase(case, self.case) and fnmatchcase(loop, self.loop)


def allowed_loops() -> list[Allowed]:
    lines = [line for line in SCALAR_LOOPS.read_text().splitlines() if line and not line.startswith("#")]
    return [Allowed(*(part.strip() for part in line.split("|", 2))) for line in lines]


def scalar_work(result: Result) -> list[str]:
    """What a case leaves to the scalar unit: its loops, or the compiler's own warnings where no loop is seen."""
    return [str(loop) for loop in result.loops] or [f"warning {name}" for name in result.warnings]


class Memory(NamedTuple):
    """A line of memory.txt: bytes of the unified buffer and of L1."""

    unified: int
    l1: int

    def is_about(self, other: Memory | None) -> bool:
        return other is not None and all(abs(a - b) <= TOLERANCE for a, b in zip(self, other, strict=True))

    def line(self, name: str) -> str:
        share = f"{name:<50} {self.unified:>7} {self.unified / UNIFIED_BUFFER:>5.0%}"
        return f"{share} {self.l1:>7}\n" if self.l1 else f"{share}\n"


def recorded_memory() -> dict[str, Memory]:
    lines = [line.split() for line in MEMORY.read_text().splitlines() if not line.startswith("#")]
    return {name: Memory(int(unified), int(l1[0]) if l1 else 0) for name, unified, _, *l1 in lines}


@pytest.mark.parametrize("name", CASES)
def test_compiles(name: str, results: dict[str, Result], modules: Path) -> None:
    result = results[name]
    assert result.error is None, f"{result.error}\nThe steps that passed are in {modules}"
    left = UNIFIED_BUFFER - result.memory.get("ub", 0)
    assert left >= TOLERANCE, (
        f"{left} bytes of the unified buffer are left; with fewer than {TOLERANCE}, fitting is luck"
    )


@pytest.mark.parametrize("name", CASES)
def test_leaves_no_loop_to_the_scalar_unit(name: str, results: dict[str, Result], modules: Path) -> None:
    unexpected = [
        work for work in scalar_work(results[name]) if not any(line.covers(name, work) for line in allowed_loops())
    ]
    assert not unexpected, (
        f"the scalar unit runs {', '.join(unexpected)} (see {modules / name}.hivm.mlir). Rewrite the kernel so that it "
        "vectorises, or add a line with a reason to tests/ascend_triton/scalar_loops.txt"
    )


def test_allowed_loops_have_reasons_and_exist(results: dict[str, Result]) -> None:
    for line in allowed_loops():
        assert line.reason, f"{line.case} | {line.loop}: no reason given"
        used = any(line.covers(name, work) for name, result in results.items() for work in scalar_work(result))
        assert used, f"no case has the loop of '{line.case} | {line.loop}' any more: remove the line"


def test_memory_is_as_recorded(results: dict[str, Result]) -> None:
    # What does not compile is the matter of test_compiles.
    recorded = {
        name: memory for name, memory in recorded_memory().items() if name not in results or not results[name].error
    }
    found = {}
    for name, result in sorted(results.items()):
        if result.error is None:
            memory = Memory(result.memory.get("ub", 0), result.memory.get("cbuf", 0))
            found[name] = recorded[name] if memory.is_about(recorded.get(name)) else memory
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        MEMORY.write_text(MEMORY_HEADER + "".join(memory.line(name) for name, memory in found.items()))
        recorded = recorded_memory()
    assert recorded == found, "EXPECTTEST_ACCEPT=1 pytest tests/ascend_triton records the new numbers; read the diff"
