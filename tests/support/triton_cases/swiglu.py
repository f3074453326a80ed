"""Compile cases of the kernels of the gated activation."""

from __future__ import annotations

from triton_cases.case import Case

_POINTERS = {"gate": "*bf16", "up": "*bf16", "out": "*bf16"}
_SCALARS = {"n_rows": "i32", "gate_stride": "i32", "up_stride": "i32", "alpha": "fp32", "limit": "fp32"}
_SILU = {"gate_step": 1, "up_step": 1, "ACT": "silu", "HAS_LIMIT": False}
_OAI = {"gate_step": 2, "up_step": 2, "ACT": "swiglu_oai", "HAS_LIMIT": True}


def _case(model: str, width: int, block_r: int, block_i: int, **changes: object) -> Case:
    return Case(
        name=f"swiglu-{model}",
        kernel="swiglu:swiglu_kernel",
        signature={**_POINTERS, **_SCALARS},
        constants={**_SILU, **changes, "N": width, "BLOCK_R": block_r, "BLOCK_I": block_i},
    )


def _quant_cases(model: str, width: int, block_i: int, **changes: object) -> list[Case]:
    kernel = "swiglu:swiglu_quant_kernel"
    signature = {**_POINTERS, "out": "*i8", "scales": "*fp32", **_SCALARS}
    constants = {**_SILU, **changes, "N": width, "BLOCK_I": block_i}
    only = "divides scales in the way that this compiler does exactly"
    return [
        Case(f"swiglu_quant-{model}", kernel, signature, {**constants, "ASCEND": False}, cuda_only=only),
        Case(f"swiglu_quant-{model}-ascend", kernel, signature, {**constants, "ASCEND": True}, ascend_only=only),
    ]


CASES = [
    _case("qwen3_30b", 768, 4, 1024),
    _case("qwen3_235b", 1536, 2, 2048),
    _case("deepseek_v3", 2048, 2, 2048),
    _case("deepseek_v3_dense", 18432, 1, 4096),
    _case("gpt_oss_120b", 2880, 1, 2048, **_OAI),
    *(_case(f"qwen3_30b-{act}", 768, 4, 1024, ACT=act) for act in ("gelu", "gelu_tanh", "relu2")),
    *_quant_cases("qwen3_30b", 768, 1024),
    *_quant_cases("deepseek_v3", 2048, 2048),
    *_quant_cases("deepseek_v3_dense", 18432, 4096),
    *_quant_cases("gpt_oss_120b", 2880, 2048, **_OAI),
]
