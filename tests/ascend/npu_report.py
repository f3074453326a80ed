"""Pytest plugin of `make test-npu`: insists on real hardware, and ends with a report to send back.

Bounds for hardware are assumptions: nobody has run this on an NPU yet. The report gives what was measured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections import Counter
from typing import Any

import pytest

# Worst relative error of each test that noted one.
ERRORS: dict[str, float] = {}
# Of each test that compared expert sets: how many were compared, and how many differed.
SETS: dict[str, Counter[str]] = {}


def on_hardware() -> bool:
    """Whether torch_npu runs on CANN itself, not on the stand-in."""
    return "host_cann.preload" not in sys.modules


def note(error: float) -> float:
    """Keep a result's relative error for the report, and return it."""
    test = _current_test()
    ERRORS[test] = max(error, ERRORS.get(test, 0.0))
    return error


def note_rerouted(differing: int, *, compared: int) -> int:
    """Keep how many tokens went to other experts than on the CPU for the report, and return it."""
    SETS.setdefault(_current_test(), Counter()).update(differing=differing, compared=compared)
    return differing


def _current_test() -> str:
    return os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]


def missing() -> str:
    """Why this machine cannot run the suite; empty where it can."""
    if not on_hardware():
        return "the stand-in for CANN is loaded; run it as `make test-npu`, or use `make test-ascend`"
    if importlib.util.find_spec("torch_npu") is None:
        return f"{sys.executable} has no torch_npu; name another Python with NPU_PYTHON, or use `make test-ascend`"
    import torch
    import torch_npu  # noqa: F401

    return "" if torch.npu.is_available() else "torch_npu finds no NPU; `moe-fx doctor` says what is there"


def versions() -> dict[str, str]:
    """What the result depends on."""
    import torch
    import torch_npu
    import transformers
    from torch_npu.npu.utils import get_cann_version

    import moe_fx

    return {
        "moe_fx": moe_fx.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_npu": torch_npu.__version__,
        "transformers": transformers.__version__,
        "CANN": get_cann_version(),
        "driver": get_cann_version(module="DRIVER"),
        "NPU": f"{torch.npu.get_device_name(0)}, SoC {torch_npu.npu.get_soc_version()}",
        "ran on": "hardware" if on_hardware() else "a stand-in for CANN",
    }


def report(outcomes: dict[str, list[Any]]) -> str:
    """The text to send back; ``outcomes`` are pytest's reports by category."""
    counts = ", ".join(f"{len(outcomes.get(kind, []))} {kind}" for kind in ("passed", "failed", "error", "skipped"))
    lines = [f"{name}: {value}" for name, value in versions().items()]
    lines += [counts, "relative errors against eager on the CPU, worst first:"]
    lines += [f"  {error:.2e}  {test}" for test, error in sorted(ERRORS.items(), key=lambda item: -item[1])]
    differing, compared = (sum(sets[kind] for sets in SETS.values()) for kind in ("differing", "compared"))
    lines.append(f"expert sets against eager on the CPU: {differing} of {compared} differ")
    lines += [
        f"  {sets['differing']} of {sets['compared']}  {test}" for test, sets in SETS.items() if sets["differing"]
    ]
    for failure in [*outcomes.get("failed", []), *outcomes.get("error", [])]:
        crash = getattr(failure.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else failure.longrepr).strip() or "no message"
        lines.append(f"failed: {failure.nodeid}: {message.splitlines()[0]}")
    return "\n".join(lines)


def pytest_sessionstart(session: pytest.Session) -> None:
    reason = missing()
    if reason:
        pytest.exit(f"test-npu: {reason}", returncode=1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("report of make test-npu, to send back")
    terminalreporter.write_line(report(terminalreporter.stats))
