"""Tuned launch parameters: which file and which entry serve a call, and what a bad file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_fx.errors import MoeFxWarning, OptionError
from moe_fx.lowering.cuda import configs, device, experts, experts_int4

DEFAULTS = {"BLOCK": 16, "num_warps": 4}
CPU = torch.device("cpu")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Write the file of a layer (given, user, shipped), and look parameters up with these files alone."""
    places = {"given": tmp_path / "given.json", "user": tmp_path / "user.json"}
    monkeypatch.setattr(device, "family", lambda _: "sm_00")
    monkeypatch.setattr(configs, "user_file", lambda _: places["user"])
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    places["shipped"] = tmp_path / "shipped" / "sm_00.json"
    monkeypatch.setenv(configs.ENVIRONMENT, str(places["given"]))

    def put(layer: str, kernels: configs.Table) -> Path:
        configs.write(places[layer], "a GPU", kernels)
        return places[layer]

    yield put
    configs.forget()


def look_up(tokens: int, variant: str = "bf16") -> dict[str, int]:
    return configs.lookup("kernel", variant, tokens, DEFAULTS, CPU)


def test_without_a_file_the_defaults_serve(tuned) -> None:
    configs.forget()
    assert look_up(1) == DEFAULTS


def test_an_entry_replaces_what_it_names(tuned) -> None:
    tuned("shipped", {"kernel": {"bf16": {8: {"BLOCK": 64}}}})
    assert look_up(8) == {"BLOCK": 64, "num_warps": 4}
    assert look_up(8, "int4") == DEFAULTS


@pytest.mark.parametrize(
    ("tokens", "block"), [(1, 1), (2, 1), (4, 8), (8, 8), (27, 8), (30, 100), (400, 100), (401, 16), (10**6, 16)]
)
def test_the_nearest_count_in_ratio_serves_unless_it_is_far(tuned, tokens: int, block: int) -> None:
    tuned("shipped", {"kernel": {"bf16": {1: {"BLOCK": 1}, 8: {"BLOCK": 8}, 100: {"BLOCK": 100}}}})
    assert look_up(tokens)["BLOCK"] == block


def test_no_tokens_are_looked_up_like_one(tuned) -> None:
    tuned("shipped", {"kernel": {"bf16": {1: {"BLOCK": 1}}}})
    assert look_up(0)["BLOCK"] == 1


def test_layers_in_order_each_for_the_counts_it_knows(tuned) -> None:
    tuned("shipped", {"kernel": {"bf16": {1: {"BLOCK": 1}, 64: {"BLOCK": 2}}}})
    tuned("user", {"kernel": {"bf16": {1: {"BLOCK": 3}}}})
    assert [look_up(tokens)["BLOCK"] for tokens in (1, 64)] == [3, 2]
    tuned("given", {"kernel": {"bf16": {1: {"BLOCK": 4}}}})
    assert [look_up(tokens)["BLOCK"] for tokens in (1, 64)] == [4, 2]


def test_forced_parameters_win_within_their_block_alone(tuned) -> None:
    tuned("shipped", {"kernel": {"bf16": {1: {"BLOCK": 1}}}})
    with configs.forced({"kernel": {"BLOCK": 5}}), configs.forced({"other": {"BLOCK": 6}}):
        assert look_up(1) == {"BLOCK": 5, "num_warps": 4}
    assert look_up(1)["BLOCK"] == 1


def test_an_entry_with_a_parameter_that_the_kernel_lacks_is_left_out(tuned) -> None:
    path = tuned("user", {"kernel": {"bf16": {1: {"BLOCKS": 1}}}})
    with pytest.warns(MoeFxWarning, match=f"{path}.*kernel/bf16 sets BLOCKS.*moe-fx tune"):
        assert look_up(1) == DEFAULTS


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"kernels": []}',
        '{"kernels": {"kernel": {"bf16": {"many": {}}}}}',
        '{"kernels": {"kernel": {"bf16": {"0": {}}}}}',
        '{"kernels": {"kernel": {"bf16": {"1": {"BLOCK": "16"}}}}}',
        '{"kernels": {"kernel": {"bf16": {"1": {"BLOCK": true}}}}}',
    ],
)
def test_a_file_of_another_form_is_named_and_costs_no_call(tuned, content: str) -> None:
    path = tuned("user", {})
    path.write_text(content)
    with pytest.raises(OptionError, match=rf"{path}.*moe-fx tune"):
        configs.read(path)
    with pytest.warns(MoeFxWarning, match=rf"{path}.*moe-fx tune.*default launch parameters serve"):
        assert look_up(1) == DEFAULTS


def test_written_files_read_back(tmp_path: Path) -> None:
    table = {"kernel": {"bf16": {1: {"BLOCK": 1}, 128: {"BLOCK": 2}}}}
    configs.write(tmp_path / "deep" / "sm_00.json", "a GPU", table)
    assert configs.read(tmp_path / "deep" / "sm_00.json") == table
    assert json.loads((tmp_path / "deep" / "sm_00.json").read_text())["gpu"] == "a GPU"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sm_00.json"]


@pytest.mark.parametrize("path", sorted(configs.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_entries_are_of_kernels_and_values_that_exist(path: Path) -> None:
    choices = {**experts.TUNABLE, **experts_int4.TUNABLE}
    for kernel, variants in configs.read(path).items():
        for variant, counts in variants.items():
            for tokens, entry in counts.items():
                for name, value in entry.items():
                    known = name == "PAIRS" or value in choices[kernel][name]
                    assert known, f"{kernel}/{variant}/{tokens}: {name}={value}"
