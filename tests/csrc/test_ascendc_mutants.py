"""The C++ tests of three Ascend C kernels would notice: a deliberate mistake in a kernel turns its test red."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCENDC = ROOT / "csrc" / "ascendc"


@dataclass(frozen=True)
class Mutant:
    """A kernel whose source has one piece replaced, and what its test then says."""

    kernel: str
    test: str
    case: str
    right: str
    wrong: str
    says: str


ROUTED = "wanted.ids"

MUTANTS = {
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
def main_object(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' main function, compiled once."""
    result = tmp_path_factory.mktemp("main") / "main.o"
    subprocess.run([compiler, "-std=c++20", "-c", str(ASCENDC / "tests" / "main.cpp"), "-o", str(result)], check=True)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, compiler: str, main_object: Path, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    header = Path("kernels") / f"{mutant.kernel}.h"
    source = (ASCENDC / header).read_text()
    assert source.count(mutant.right) == 1, f"{header} has changed: {mutant.right!r} is not there once"
    (tmp_path / "kernels").mkdir()
    (tmp_path / header).write_text(source.replace(mutant.right, mutant.wrong))
    program = tmp_path / "test"
    includes = [f"-I{folder}" for folder in (tmp_path, ASCENDC, ASCENDC / "model" / "include", ASCENDC / "tests")]
    sources = [ASCENDC / "tests" / f"test_{mutant.test}.cpp", ASCENDC / "tiling" / f"{mutant.kernel}.cpp", main_object]
    subprocess.run(
        [compiler, "-std=c++20", "-O0", *includes, *map(str, sources), "-o", str(program), "-pthread"], check=True
    )
    done = subprocess.run(
        [str(program), f"--test-case={mutant.case}", "--abort-after=3"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert mutant.says in done.stdout, done.stdout[-3000:]
