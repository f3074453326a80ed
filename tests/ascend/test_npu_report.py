"""The plugin of `make test-npu`: it refuses the stand-in, and its report says what ran where."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

from types import SimpleNamespace

import npu_report


def test_it_refuses_the_stand_in():
    with pytest.raises(pytest.exit.Exception, match="the stand-in for CANN is loaded"):
        npu_report.pytest_sessionstart(None)


def test_the_report(monkeypatch):
    monkeypatch.setattr(npu_report, "ERRORS", {})
    monkeypatch.setattr(npu_report, "SETS", {})
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_models.py::test_ge[a] (call)")
    assert npu_report.note(0.5) == 0.5
    npu_report.note(0.25)
    assert npu_report.note_rerouted(1, compared=24) == 1
    npu_report.note_rerouted(0, compared=24)
    crash = SimpleNamespace(message="AssertionError: assert 0.5 <= 1e-05\nmore")
    failed = SimpleNamespace(nodeid="test_models.py::test_ge[a]", longrepr=SimpleNamespace(reprcrash=crash))
    text = npu_report.report({"failed": [failed], "passed": [object()] * 2})
    assert "1 failed" in text and "2 passed" in text and "0 skipped" in text
    assert "5.00e-01  test_models.py::test_ge[a]" in text
    assert "expert sets against eager on the CPU: 1 of 48 differ\n  1 of 48  test_models.py::test_ge[a]\n" in text
    assert "failed: test_models.py::test_ge[a]: AssertionError: assert 0.5 <= 1e-05\n" in f"{text}\n"
    assert "ran on: a stand-in for CANN" in text and "CANN: 8.5.0" in text and "Ascend910B3" in text
