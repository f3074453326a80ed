"""``moe-fx tune``: the search finds what is faster, keeps what was there, and its file serves the launchers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_checks import gpu_only

from moe_fx import tuning
from moe_fx.errors import MissingToolchainError, OptionError
from moe_fx.lowering.cuda import configs, device, timing, tune
from moe_fx.lowering.cuda.device import INTERPRETED

TINY = tune.Shape(hidden=64, inter=32, n_experts=4, top_k=2, group=32)


def looked_up(kernel: str, **defaults: int) -> dict[str, int]:
    return configs.lookup(kernel, "tiny", 1, defaults, torch.device("cpu" if INTERPRETED else "cuda"))


class Timed:
    """Stands in for the GPU's clock: a call takes what `cost` says of the parameters that it looked up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost) -> None:
        self.seen: list[dict[str, dict[str, int]]] = []

        def microseconds(call) -> float:
            with configs.recorded() as record:
                call()
            self.seen.append({kernel: dict(given) for kernel, (_, given) in record.items()})
            return cost(self.seen[-1])

        monkeypatch.setattr(timing, "graph_microseconds", microseconds)


CHOICES = {
    "op": {"PAIRS": (0, 8)},
    "op_up_pairs": {"BLOCK_N": (1, 2, 4), "num_warps": (1, 2)},
    "op_tiles": {"BLOCK": (16, 32, 64)},
}


def pretend_call() -> None:
    if looked_up("op", PAIRS=4)["PAIRS"] >= 8:
        looked_up("op_up_pairs", BLOCK_N=1, num_warps=1)
    else:
        looked_up("op_tiles", BLOCK=16)


def test_the_fastest_of_both_ways_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(given: dict[str, dict[str, int]]) -> float:
        if "op_tiles" in given:
            return 50 + abs(given["op_tiles"]["BLOCK"] - 32)
        pairs = given["op_up_pairs"]
        return 40 + abs(pairs["BLOCK_N"] - 4) + 3 * abs(pairs["num_warps"] - 2)

    Timed(monkeypatch, cost)
    chosen, variants, microseconds = tune.tune_count(tune.Format(CHOICES, 4, lambda tokens: pretend_call), 4)
    assert chosen.pop("op") == {"PAIRS": 16}  # Four tokens of four pairs: more were not measured.
    assert chosen == {"op_up_pairs": {"BLOCK_N": 4, "num_warps": 2}}
    assert (microseconds, set(variants.values())) == (40, {"tiny"})


def test_many_tokens_are_tried_over_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, lambda given: float(given["op_tiles"]["BLOCK"]))
    chosen, _, _ = tune.tune_count(tune.Format(CHOICES, 4, lambda tokens: pretend_call), 65)
    assert chosen == {"op": {"PAIRS": 0}, "op_tiles": {"BLOCK": 16}}
    assert all("op_up_pairs" not in seen for seen in timed.seen)


def test_a_gain_within_noise_is_no_reason_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, lambda given: 100 - 0.01 * given["op_tiles"]["BLOCK"])
    chosen, _, _ = tune.tune_count(tune.Format(CHOICES, 4, lambda tokens: pretend_call), 65)
    assert chosen["op_tiles"] == {"BLOCK": 16}


@pytest.mark.parametrize("whole", [True, False])
def test_a_small_space_is_tried_whole_and_a_large_one_along_its_axes(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    blocks = tuple(range(16, 16 + (32 if whole else 33)))
    choices = {"op": {"PAIRS": (0,)}, "op_tiles": {"BLOCK": blocks, "num_warps": (1, 2)}}

    def cost(given: dict[str, dict[str, int]]) -> float:
        return 10.0 if given["op_tiles"] == {"BLOCK": 20, "num_warps": 2} else 100.0

    Timed(monkeypatch, cost)
    weights = tune.Format(choices, 4, lambda tokens: lambda: looked_up("op_tiles", BLOCK=16, num_warps=1))
    chosen, _, microseconds = tune.tune_count(weights, 65)
    assert (microseconds, chosen["op_tiles"]["BLOCK"]) == ((10, 20) if whole else (100, 16))


def test_what_was_gained_along_one_axis_is_kept_along_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"op": {"PAIRS": (0,)}, "op_tiles": {"BLOCK": tuple(range(16, 49)), "num_warps": (1, 2)}}
    timed = Timed(monkeypatch, lambda given: 100.0 - given["op_tiles"]["BLOCK"] - 4 * given["op_tiles"]["num_warps"])
    weights = tune.Format(choices, 4, lambda tokens: lambda: looked_up("op_tiles", BLOCK=16, num_warps=1))
    chosen, _, _ = tune.tune_count(weights, 65)
    assert chosen["op_tiles"] == {"BLOCK": 48, "num_warps": 2}
    # The start, and two rounds of 33 + 2 values, of which those in force are not measured again.
    assert len(timed.seen) <= 1 + 2 * 35


def test_what_does_not_fit_the_device_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def cost(given: dict[str, dict[str, int]]) -> float:
        if given["op_tiles"]["BLOCK"] > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 100.0 - given["op_tiles"]["BLOCK"]

    Timed(monkeypatch, cost)
    chosen, _, _ = tune.tune_count(tune.Format(CHOICES, 4, lambda tokens: pretend_call), 65)
    assert chosen["op_tiles"] == {"BLOCK": 32}


def test_blocks_that_would_take_minutes_to_compile_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"op": {"PAIRS": (0,)}, "op_up_pairs": {"BLOCK_N": (1, 4096, 8192), "num_warps": (1,)}, "op_tiles": {}}
    timed = Timed(monkeypatch, lambda given: 1.0 / given.get("op_up_pairs", {"BLOCK_N": 1})["BLOCK_N"])
    chosen, _, _ = tune.tune_count(tune.Format(choices, 4, lambda tokens: pretend_call), 1)
    assert chosen["op_up_pairs"]["BLOCK_N"] == 4096
    assert all(seen.get("op_up_pairs", {}).get("BLOCK_N") != 8192 for seen in timed.seen)


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), "lost"])
def test_a_compiler_that_fails_is_passed_over_and_a_lost_device_is_not(monkeypatch: pytest.MonkeyPatch, error) -> None:
    failure = torch.AcceleratorError("illegal access", 700) if error == "lost" else error

    def cost(given: dict[str, dict[str, int]]) -> float:
        if given["op_tiles"]["BLOCK"] == 64:
            raise failure
        return 100.0 - given["op_tiles"]["BLOCK"]

    Timed(monkeypatch, cost)
    weights = tune.Format(CHOICES, 4, lambda tokens: pretend_call)
    if error == "lost":
        with pytest.raises(torch.AcceleratorError):
            tune.tune_count(weights, 65)
    else:
        assert tune.tune_count(weights, 65)[0]["op_tiles"] == {"BLOCK": 32}


@pytest.mark.parametrize("name", tune.FORMATS)
def test_real_kernels_are_found_by_their_choices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One descent over the launchers' own choices: every kernel of a call is tunable, and its entries fit it."""
    if INTERPRETED:
        # One choice a parameter is left: the interpreter is slow.
        for launcher in (tune.experts, tune.experts_int4):
            few = {k: {p: values[:1] for p, values in given.items()} for k, given in launcher.TUNABLE.items()}
            monkeypatch.setattr(launcher, "TUNABLE", few)
    timed = Timed(monkeypatch, lambda given: 1.0)
    table: configs.Table = {}
    tune.tune(TINY, [name], [1], table, lambda line: None, lambda: None)
    kernels = {kernel for seen in timed.seen for kernel in seen if kernel != "gating"}
    assert len(kernels) >= 5
    assert set(table) <= kernels
    for variants in table.values():
        ((variant, entries),) = variants.items()
        assert "E4" in variant and list(entries) == [1]


def test_entries_of_earlier_runs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, lambda given: 1.0)
    monkeypatch.setitem(tune.FORMATS, "bf16", lambda shape: tune.Format(CHOICES, 4, lambda tokens: pretend_call))
    saved: list[object] = []
    table = {"op_tiles": {"tiny": {512: {"BLOCK": 64}}}, "other": {"x": {1: {"A": 1}}}}
    tune.tune(TINY, ["bf16"], [65], table, lambda line: None, lambda: saved.append(dict(table["op"])))
    assert saved == [table["op"]]
    assert table == {
        "op": {"tiny": {65: {"PAIRS": 0}}},
        "op_tiles": {"tiny": {512: {"BLOCK": 64}, 65: {"BLOCK": 16}}},
        "other": {"x": {1: {"A": 1}}},
    }


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingToolchainError, match="moe-fx tune measures on a CUDA device"):
        tuning.tune([64, 32, 4, 2], 32, ["bf16"], [1], None, print)


def test_the_file_is_written_and_groups_must_divide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "unavailable", lambda where: None)
    monkeypatch.setattr(device, "family", lambda where: "sm_00")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(tune.FORMATS, "bf16", lambda shape: tune.Format(CHOICES, 4, lambda tokens: pretend_call))
    Timed(monkeypatch, lambda given: 1.0)
    path, table = tuning.tune([64, 32, 4, 2], 32, ["bf16"], [65], tmp_path / "own.json", lambda line: None)
    assert configs.read(path) == table and table["op_tiles"]["tiny"] == {65: {"BLOCK": 16}}
    with pytest.raises(OptionError, match="groups of 48 inputs must be multiples of 32 that divide H=64 and I=32"):
        tuning.tune([64, 32, 4, 2], 48, ["int4"], [1], tmp_path / "own.json", lambda line: None)


@gpu_only
def test_a_descent_on_the_gpu_ends_with_parameters_that_run() -> None:
    weights = tune.FORMATS["bf16"](tune.Shape(hidden=512, inter=256, n_experts=16, top_k=2))
    call = weights.call(4)
    want = call()
    chosen, _, microseconds = tune.tune_count(weights, 4)
    assert 0 < microseconds < float("inf")
    with configs.forced(chosen):
        torch.testing.assert_close(call(), want, rtol=5e-2, atol=5e-2)
