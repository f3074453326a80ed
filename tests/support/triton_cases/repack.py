"""Compile cases of the repacking kernels: gate/up weights of one model in every direction, its zero points in one."""

from __future__ import annotations

from triton_cases.case import Case

_SIZES = dict.fromkeys(("experts", "outputs", "inputs"), "i32")
_INPUTS = {"sequential": "*i32", "planar": "*i32", **_SIZES}
_OUTPUTS = {"words": "*i32", "rows": "*u8", **_SIZES, "group": "i32"}


def _inputs(name: str, to_planar: bool, group: int, **strides: object) -> Case:
    # Blocks of words that are transposed on the way take several times their size.
    rows = 16 if "gptq" in name else 64
    constants = {"TO_PLANAR": to_planar, "GROUP": group, "BLOCK_N": rows, "BLOCK_W": group // 16, **strides}
    strided = {key: "i32" for key in ("sequential_output", "sequential_word") if key not in strides}
    return Case(f"repack-{name}", "repack:inputs_kernel", {**_INPUTS, **strided}, constants)


def _outputs(name: str, to_rows: bool, paired: bool, planar: bool, awq: bool = True, less: int = 0) -> Case:
    constants = {"TO_ROWS": to_rows, "PAIRED": paired, "PLANAR": planar, "AWQ_ORDER": awq, "LESS": less}
    constants |= {"word_octet": 1, "BLOCK_C": 16, "BLOCK_J": 64}
    return Case(f"repack-{name}", "repack:outputs_kernel", {**_OUTPUTS, "word_input": "i32"}, constants)


CASES = [
    _inputs("canonical_to_planar", True, 128, sequential_word=1),
    _inputs("planar_to_canonical", False, 128, sequential_word=1),
    _inputs("canonical_to_planar-g32", True, 32, sequential_word=1),
    _inputs("gptq_to_planar", True, 128, sequential_output=1),
    _inputs("planar_to_gptq", False, 128, sequential_output=1),
    _outputs("awq_to_planar", True, True, True),
    _outputs("planar_to_awq", False, True, True),
    _outputs("awq_to_canonical", True, True, False),
    _outputs("canonical_to_awq", False, True, False),
    _outputs("awq_zeros", True, False, False),
    _outputs("zeros_to_awq", False, False, False),
    _outputs("gptq_zeros", True, False, False, awq=False, less=1),
]
