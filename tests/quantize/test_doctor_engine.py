"""What ``moe-fx doctor`` says of the expert engine."""

from __future__ import annotations

import pytest

from moe_fx import _C, doctor


def engine_checks() -> list[doctor.Check]:
    (cpu,) = (target for target in doctor.diagnose().targets if target.name == "cpu")
    return [check for check in cpu.checks if check.name == "expert engine"]


def test_the_engine_is_described():
    (check,) = engine_checks()
    info = _C.engine_info()
    threads = sum(map(len, info["nodes"]))
    assert check.ok and check.found.startswith(f"{info['isa']} (of ")
    assert f"{threads} threads on {len(info['nodes'])} memory node" in check.found


def test_made_up_nodes_are_called_that(monkeypatch: pytest.MonkeyPatch):
    info = dict(isa="avx2", available=["avx2", "scalar"], nodes=[[0], [1]], made_up_nodes=True, own_threads=True)
    monkeypatch.setattr(_C, "engine_info", lambda: info)
    (check,) = engine_checks()
    wanted = "avx2 (of avx2, scalar), 2 threads on 2 memory nodes made up by MOE_FX_NUMA, threads of its own"
    assert check.found == wanted


def test_a_wrong_variable_is_a_failed_check(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise ValueError("MOE_FX_ISA is 'avx3'; it must be one of avx2, scalar")

    monkeypatch.setattr(_C, "engine_info", refuse)
    (check,) = engine_checks()
    assert not check.ok and "avx3" in check.found and check.remedy


def test_without_an_engine_there_is_no_such_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(_C, "engine_info")
    assert engine_checks() == []
