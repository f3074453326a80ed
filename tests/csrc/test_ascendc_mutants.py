"""The C++ tests of the Ascend C kernels would notice: a deliberate mistake in a kernel turns its test red."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCENDC = ROOT / "csrc" / "ascendc"


@dataclass(frozen=True)
class Mutant:
    """A header of a kernel with one piece replaced, and what the kernel's test then says."""

    header: str
    test: str
    case: str
    right: str
    wrong: str
    says: str


ROUTED = "wanted.ids"

EXPERTS = "moe_w4a16_decode"
DISTANCE = "worst_row("

MUTANTS = {
    "experts: activations read before all cores stored them": Mutant(
        "moe_w4a16_decode", EXPERTS, "*offsets and types*", "  MeetWhenStored();\n", "", "core race",
    ),
    "experts: y added up before all cores are there": Mutant(
        "moe_w4a16_decode", EXPERTS, "*offsets and types*", "  AscendC::SyncAll();\n", "", "core race",
    ),
    "experts: arriving when weights came, not when sums were stored": Mutant(
        "moe_w4a16_decode", EXPERTS, "*offsets and types*",
        "CrossCoreSetFlag<0, PIPE_MTE3>", "CrossCoreSetFlag<0, PIPE_MTE2>", "core race",
    ),
    "experts: totals stored while they are added to": Mutant(
        "w4a16_stream", EXPERTS, "*offsets and types*",
        "totalQueue_.EnQue(totals_);\n    totals_ = totalQueue_.template DeQue<float>();", "", "missing wait",
    ),
    "experts: weights overwritten before they are widened": Mutant(
        "w4a16_stream", EXPERTS, "*offsets and types*", "if (from + kBlockRows == kUnitRows) {", "if (from == 0) {",
        "stale buffer",
    ),
    "experts: another group's scales": Mutant(
        "w4a16_stream", EXPERTS, "*offsets and types*", "at.row / tiling_.group;\n      const uint64_t from",
        "(at.row / tiling_.group + 1) % (pass_.rows / tiling_.group);\n      const uint64_t from", DISTANCE,
    ),
    "experts: weights from the next row on": Mutant(
        "w4a16_stream", EXPERTS, "*offsets and types*",
        "(matrix * pass_.rows + at.row) *", "(matrix * pass_.rows + at.row + 1) *", "out of bounds",
    ),
    "experts: offsets times the activations of earlier groups too": Mutant(
        "w4a16_stream", EXPERTS, "*offsets and types*", "rowSums_[i] = 0.0f;", "", DISTANCE,
    ),
    "experts: the end of an odd row not filled": Mutant(
        "w4a16_stream", EXPERTS, "*tiles that end early*", "pad(true, 0,", "pad(false, 0,", "unwritten read",
    ),
    "experts: a cut rounded down": Mutant(
        "w4a16_partition", EXPERTS, "*offsets and types*", "(into + each - 1) / each", "into / each", "unwritten read",
    ),
    "experts: an expert named twice weighs once": Mutant(
        "moe_w4a16_routing", EXPERTS, "*routings*",
        "if (mask_.GetValue(slot) & bit) weight += weight_.GetValue(place);", "", DISTANCE,
    ),
    "gemv: y added up before all cores are there": Mutant(
        "gemv_w4a16", "gemv_w4a16", "*offsets and types*", "  AscendC::SyncAll();\n", "", "core race",
    ),
    "gemv: y one block too long": Mutant(
        "w4a16_partials", "gemv_w4a16", "*odd multiples*",
        "result, at.width);\n    out_", "result, at.width + 16);\n    out_", "out of bounds",
    ),
    "queues merged in the wrong order": Mutant(
        "moe_gating_topk", "gating_topk", "*equal choices*",
        "MrgSortSrcList<float>(src, src[distance],", "MrgSortSrcList<float>(src[distance], src,", ROUTED,
    ),
    "bias copied over places that are being filled": Mutant(
        "moe_gating_topk", "gating_topk", "*real models*",
        "Order<AscendC::HardEvent::V_MTE2>(pipe_);\n    CopyGroups", "CopyGroups", "missing wait",
    ),
    "places filled while logits arrive": Mutant(
        "moe_gating_topk", "gating_topk", "*any number of experts*",
        "Order<AscendC::HardEvent::V_MTE2>(pipe_);\n    }", "}", "missing wait",
    ),
    "NaN left to the sorts": Mutant(
        "moe_gating_topk", "gating_topk", "*infinities and NaN*",
        "NanToInfinity(keys_, rows_ * t_.width);", "", ROUTED,
    ),
    "places without an expert rank as experts": Mutant(
        "moe_gating_topk", "gating_topk", "*infinities and NaN*", "ByPlace<Op::kMax>(keys_, keys_, floor_)", "(void)0",
        "weight.size()",
    ),
    "one group too many kept": Mutant(
        "moe_gating_topk", "gating_topk", "*any number of experts*", "static_cast<uint64_t>(t_.keptGroups)",
        "static_cast<uint64_t>(t_.keptGroups + 1)", ROUTED,
    ),
    "halves rounded away from zero": Mutant(
        "swiglu_dynamic_quant", "swiglu_dynamic_quant", "*halves*",
        "Cast(up_, gate_, AscendC::RoundMode::CAST_RINT", "Cast(up_, gate_, AscendC::RoundMode::CAST_ROUND",
        "quantised ==",
    ),
    "rounded twice, first to half": Mutant(
        "swiglu_dynamic_quant", "swiglu_dynamic_quant", "*real models*",
        "AscendC::Cast(narrow, up_, AscendC::RoundMode::CAST_NONE, places);\n"
        "    AscendC::Cast(result, narrow, AscendC::RoundMode::CAST_NONE, places);",
        "AscendC::Cast(narrow, gate_, AscendC::RoundMode::CAST_RINT, places);\n"
        "    AscendC::Cast(result, narrow, AscendC::RoundMode::CAST_RINT, places);",
        "quantised ==",
    ),
    "a scale of zero": Mutant(
        "swiglu_dynamic_quant", "swiglu_dynamic_quant", "*zeros*", "AscendC::Maxs(scale_, scale_, 1e-12F, count);", "",
        "scale ==",
    ),
    "an infinite scale": Mutant(
        "swiglu_dynamic_quant", "swiglu_dynamic_quant", "*zeros*", "AscendC::Muls(sum_, sum_, 0.0F, count);",
        "AscendC::Duplicate(sum_, 0.0F, count);", "std::isnan(scale)",
    ),
    "scales stored before they are computed": Mutant(
        "swiglu_dynamic_quant", "swiglu_dynamic_quant", "*real models*",
        "scaleQueue_.EnQue(scale);\n    scale = scaleQueue_.template DeQue<float>();", "", "missing wait",
    ),
    "the wrong zero point": Mutant(
        "repack_int4", "repack_int4", "*Qwen3*", "8.0F + 16.0F * 8.0F", "9.0F + 16.0F * 8.0F",
        "back.values == w.values",
    ),
    "even and odd outputs exchanged": Mutant(
        "repack_int4", "repack_int4", "*Qwen3*", "(i < 8 ? even_ : odd_)", "(i < 8 ? odd_ : even_)",
        "back.values == w.values",
    ),
    "AWQ's order left half done": Mutant(
        "repack_int4", "repack_int4", "*Qwen3*", "AscendC::ShiftLeft(low_, low_, 4U, count);", "",
        "back.values == w.values",
    ),
    "short tiles filled while they arrive": Mutant(
        "repack_int4", "repack_int4", "*fill no tile*", "Order<AscendC::HardEvent::V_MTE2>(pipe_);", "", "missing wait",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found or not any(
        (Path(root) / "doctest" / "doctest.h").exists() for root in ("/usr/include", "/usr/local/include")
    ):
        pytest.skip("no C++ compiler with doctest (Debian: apt-get install g++ doctest-dev)")
    return found


@pytest.fixture(scope="module")
def objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all mutants are linked with: the tests' main function and the tiling, compiled once."""
    folder = tmp_path_factory.mktemp("objects")
    sources = [ASCENDC / "tests" / "main.cpp", *sorted((ASCENDC / "tiling").glob("*.cpp"))]
    includes = [f"-I{ASCENDC}", f"-I{ASCENDC / 'model' / 'include'}"]
    subprocess.run([compiler, "-std=c++20", "-O0", *includes, "-c", *map(str, sources)], check=True, cwd=folder)
    return [str(path) for path in sorted(folder.glob("*.o"))]


def build_and_run(mutant: Mutant, compiler: str, objects: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    header = Path("kernels") / f"{mutant.header}.h"
    source = (ASCENDC / header).read_text()
    assert source.count(mutant.right) == 1, f"{header} has changed: {mutant.right!r} is not there once"
    (folder / "kernels").mkdir()
    (folder / header).write_text(source.replace(mutant.right, mutant.wrong))
    program = str(folder / "test")
    includes = [f"-I{path}" for path in (folder, ASCENDC, ASCENDC / "model" / "include", ASCENDC / "tests")]
    test = str(ASCENDC / "tests" / f"test_{mutant.test}.cpp")
    subprocess.run([compiler, "-std=c++20", "-O0", *includes, test, *objects, "-o", program, "-pthread"], check=True)
    return subprocess.run(
        [program, f"--test-case={mutant.case}", "--abort-after=3"], capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, compiler: str, objects: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """What becomes of the mutants that were selected. They are built side by side: one alone takes one processor."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    names = [str(item.callspec.params["name"]) for item in here]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(build_and_run, MUTANTS[name], compiler, objects, tmp_path_factory.mktemp("mutant"))
            for name in names
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, outcomes: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = outcomes[name].result()
    assert done.returncode != 0
    assert MUTANTS[name].says in done.stdout, done.stdout[-3000:]
