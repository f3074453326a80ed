"""Compiles Triton kernels without a device, in processes of their own: for CUDA (sm_90 code) and for Ascend (HIVM).

The two compilers are packages of one name, `triton`, and either may crash: the process of the tests imports neither.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hivm import ScalarLoop
from triton_cases.case import Case

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
# Where `make test-triton-ascend` installs the Ascend compilers: in the environment that runs the tests.
TRITON_ASCEND = Path(sys.prefix) / "triton-ascend"
# Cases to a process: few enough that a crash is cheap, enough that its start is, too.
BATCH = 8
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Result:
    """What a compiler made of a case.

    Attributes:
        error: the compiler's message, or None when it took the kernel.
        memory: bytes in each on-chip memory: "shared" on CUDA; "ub" (unified buffer), "cbuf" (L1), "cc" (L0C)
            on Ascend.
        loops: loops that Ascend's scalar unit runs element by element.
        warnings: HIVM operations of which the Ascend compiler itself says that the scalar unit executes them.
    """

    name: str
    error: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    loops: list[ScalarLoop] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def ascend_compilers_missing() -> str | None:
    """Why kernels cannot be compiled for Ascend here, and what to do about it; None when they can."""
    way_out = "run `make test-triton-ascend` where its packages can be installed"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"ascendnpu-ir is built for x86-64 Linux, this is {sys.platform} {platform.machine()}; {way_out}"
    if sys.version_info >= (3, 12):
        return f"triton-ascend 3.2.0 is built for Python 3.9 to 3.11, this is {platform.python_version()}; {way_out}"
    if not (TRITON_ASCEND / "triton").is_dir() or not (TRITON_ASCEND / "ascendnpuir").is_dir():
        return f"triton-ascend and ascendnpu-ir are not in {TRITON_ASCEND}; {way_out}"
    return None


def compile_ascend(cases: Iterable[Case], work: Path, package: str = "lowering.triton.") -> dict[str, Result]:
    """Compile for Ascend 910B3. `package` is put before a kernel's name; Linalg and HIVM of each case stay in work."""
    # Without site-packages (-S) there is no torch, and no other triton.
    command = [sys.executable, "-S", str(SUPPORT / "triton_worker_ascend.py")]
    paths = [TRITON_ASCEND, ROOT, SUPPORT]
    return _compile(cases, command, paths, work, package)


def compile_cuda(cases: Iterable[Case], work: Path, package: str = "lowering.triton.") -> dict[str, Result]:
    """Compile for sm_90 with the installed Triton. `package` is put before a kernel's name; cubins stay in work."""
    command = [sys.executable, str(SUPPORT / "triton_worker_cuda.py")]
    return _compile(cases, command, [ROOT, SUPPORT], work, package)


def _compile(
    cases: Iterable[Case], command: list[str], paths: list[Path], work: Path, package: str
) -> dict[str, Result]:
    """Give batches of cases to worker processes, as many at a time as there are cores."""
    cases = list(cases)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TRITON_")},
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(work / "cache"),
    }
    batches = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda batch: _run_batch(batch, command, environment, work, package), batches)
    return {result.name: result for results in found for result in results}


def _run_batch(
    cases: Sequence[Case], command: list[str], environment: dict[str, str], work: Path, package: str
) -> list[Result]:
    """Compile cases in one process, and in a fresh one what comes after a case that ended it."""
    results: list[Result] = []
    while len(results) < len(cases):
        rest = cases[len(results) :]
        job = {"work": str(work), "package": package, "cases": [_plain(case) for case in rest]}
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            output, messages = worker.communicate(json.dumps(job), timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            output, messages = worker.communicate()
        results += [_result(json.loads(line)) for line in output.splitlines()]
        if len(results) < len(cases):
            how = signal.Signals(-worker.returncode).name if worker.returncode < 0 else f"status {worker.returncode}"
            culprit = cases[len(results)].name
            results.append(Result(culprit, error=f"the compiling process ended with {how}: {messages[-2000:]}"))
    return results


def _plain(case: Case) -> dict[str, Any]:
    options = {name: getattr(case, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return {
        "name": case.name,
        "kernel": case.kernel,
        "signature": dict(case.signature),
        "constants": dict(case.constants),
        "options": options,
    }


def _result(line: dict[str, Any]) -> Result:
    return Result(**{**line, "loops": [ScalarLoop(*loop) for loop in line.get("loops", ())]})
