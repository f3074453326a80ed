"""``moe_fx.cache_compile``: torchair's calling convention without its stale results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_blocks as blocks
import pytest
import torch
from moe_blocks import Block, H

import moe_fx
from moe_fx.cache.store import Store
from moe_fx.errors import OptionError

FACTOR = 2


def scaled(y: torch.Tensor) -> torch.Tensor:
    """What a method calls."""
    return y * FACTOR


class Model(Block):
    """A model with a method of its own to compile."""

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) * 2

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) * 3


def outcomes(method: Any, cache_dir: Path, **options: Any) -> list[str]:
    """What the cache says to a process that compiles and calls the method."""
    reports: list[Any] = []
    torch._dynamo.reset()
    given = {"downstream": "eager", "report": reports.append}
    compiled = moe_fx.cache_compile(method, cache_dir=cache_dir, options=given, **options)
    x = torch.randn(6, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), method(x))
    return [report.cache.partition(":")[0] for report in reports]


def test_the_second_time_hits_and_an_edited_body_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(blocks.batched)
    assert outcomes(model.decode, tmp_path) == ["miss"]
    assert outcomes(model.decode, tmp_path) == ["hit"]
    monkeypatch.setattr(Model, "decode", Model.edited)
    assert outcomes(model.decode, tmp_path) == ["miss"]


def test_an_edited_helper_of_the_method_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(blocks.batched)
    monkeypatch.setattr(Model, "decode", lambda self, x: scaled(self.forward(x)))
    assert outcomes(model.decode, tmp_path) == ["miss"]
    assert outcomes(model.decode, tmp_path) == ["hit"]
    monkeypatch.setitem(globals(), "scaled", lambda y: y * 3)
    assert outcomes(model.decode, tmp_path) == ["miss"]
    monkeypatch.setitem(globals(), "FACTOR", 5)
    monkeypatch.setitem(globals(), "scaled", lambda y: y * FACTOR)
    assert outcomes(model.decode, tmp_path) == ["miss"]
    monkeypatch.setitem(globals(), "FACTOR", 6)
    assert outcomes(model.decode, tmp_path) == ["miss"]


def test_one_dynamic_graph_serves_all_sizes(tmp_path: Path) -> None:
    model, reports = Model(blocks.batched), []
    options = {"downstream": "eager", "report": reports.append}
    compiled = moe_fx.cache_compile(model.decode, cache_dir=tmp_path, options=options)
    with torch.no_grad():
        for tokens in (6, 9):
            x = torch.randn(tokens, H)
            torch.testing.assert_close(compiled(x), model.decode(x))
    assert len(reports) == 1


def test_ranks_keep_their_entries_apart(tmp_path: Path) -> None:
    model = Model(blocks.batched)
    assert outcomes(model.decode, tmp_path, tp_rank=0, pp_rank=1) == ["miss"]
    assert outcomes(model.decode, tmp_path, tp_rank=1, pp_rank=1) == ["miss"]
    assert outcomes(model.decode, tmp_path, tp_rank=0, pp_rank=1) == ["hit"]
    assert len(Store(tmp_path / "tp0_pp1").files()) == 1


@pytest.mark.parametrize("func", [torch.relu, Model(blocks.batched), "decode".upper])
def test_only_methods_of_modules_are_taken(func: Any) -> None:
    with pytest.raises(OptionError, match=r"takes a method of a torch\.nn\.Module"):
        moe_fx.cache_compile(func)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(config=object()), "config is <object .*>; give a torchair.CompilerConfig"),
        (dict(backend=torch.relu), "takes no backend: torchair's settings go into config"),
        (dict(custom_decompositions={"a": torch.relu}), "takes no custom_decompositions"),
        (dict(ge_cache=True), "takes no ge_cache: .* what GE compiles is not kept"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_has_no_place_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        moe_fx.cache_compile(Model(blocks.batched).decode, **given)


def test_what_torchair_has_by_default_is_taken(tmp_path: Path) -> None:
    defaults = dict(config=None, backend=None, custom_decompositions=None, ge_cache=False)
    assert outcomes(Model(blocks.batched).decode, tmp_path, **defaults) == ["miss"]
