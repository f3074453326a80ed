"""Compile cases of the norm kernel."""

from __future__ import annotations

from triton_cases.case import Case

_OPERANDS = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "total": "*bf16"}
_SCALARS = {"n_rows": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32", "offset": "fp32"}
# The widest block of columns that two buffers of each operand leave room for on Ascend.
_ASCEND_BLOCK = 4096


def _cases(model: str, width: int, added: bool, cast_before: bool, **operands: str | None) -> list[Case]:
    absent = {} if added else {"residual": None, "total": None}
    absent |= {name: None for name, kind in operands.items() if kind is None}
    present = {name: kind for name, kind in (_OPERANDS | operands).items() if name not in absent}
    block = 1 << (width - 1).bit_length()
    constants = {**absent, "x_step": 1, "residual_step": 1, "D": width, "CAST_BEFORE": cast_before}
    ascend_block = min(block, _ASCEND_BLOCK)
    on_cuda = {"BLOCK_R": 1, "BLOCK_D": min(block, 8192)}
    on_ascend = {"BLOCK_R": _ASCEND_BLOCK // ascend_block, "BLOCK_D": ascend_block}
    name = f"{'add_rms_norm' if added else 'rms_norm'}-{model}"
    signature = {**present, **_SCALARS}
    return [
        Case(
            name=name,
            kernel="norms:rms_norm_kernel",
            signature=signature,
            constants={**constants, **on_cuda},
            num_warps=min(16, on_cuda["BLOCK_D"] // 256),
            cuda_only="blocks of CUDA's size; Ascend has the case of the same name that ends in -blocks",
        ),
        Case(
            name=f"{name}-blocks",
            kernel="norms:rms_norm_kernel",
            signature=signature,
            constants={**constants, **on_ascend},
            ascend_only="blocks that fit Ascend's unified buffer; CUDA has the case of the same name without -blocks",
        ),
    ]


CASES = [
    *_cases("qwen3_30b", 2048, True, True),
    *_cases("qwen3_235b", 4096, True, True),
    *_cases("deepseek_v3", 7168, True, True),
    *_cases("minimax_m2", 3072, True, True),
    *_cases("gpt_oss_120b", 2880, True, False),
    *_cases("qwen3_30b", 2048, False, True),
    *_cases("deepseek_v3_kv_lora", 512, False, True),
    *_cases("gpt_oss_120b", 2880, False, False, out="*fp32"),
    *_cases("no_weight", 2048, False, True, weight=None),
]
