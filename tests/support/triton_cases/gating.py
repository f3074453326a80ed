"""Compile cases of the gating kernel."""

from __future__ import annotations

from triton_cases.case import Case

_POINTERS = {"logits": "*bf16", "bias": "*fp32", "num_valid": "*i32", "weights": "*fp32", "ids": "*i32"}
_SCALARS = {"n_tokens": "i32", "stride_t": "i32", "eps": "fp32", "scale": "fp32"}
_PLAIN = {
    "bias": None,
    "num_valid": None,
    "stride_e": 1,
    "N_GROUP": 1,
    "TOPK_GROUP": 1,
    "BY_TOP2": False,
    "FILL": float("-inf"),
    "SCORE": "softmax",
    "SCORED": False,
    "AFTER": False,
    "SOURCE": "value",
    "RENORMALIZE": "none",
    "SCORE_DTYPE": "fp32",
    "CHOICE_DTYPE": "fp32",
    "WEIGHT_DTYPE": "fp32",
    "BLOCK_G": 1,
}
_BIASED_SIGMOID = {"SCORE": "sigmoid", "SCORED": True, "SOURCE": "base", "RENORMALIZE": "eps"}


def _cases(model: str, n_experts: int, top_k: int, block_k: int, ascend_rows: int, **changes: object) -> list[Case]:
    groups = int(changes.get("BLOCK_G", 1))  # type: ignore[call-overload]
    sizes = {"E": n_experts, "TOP_K": top_k, "BLOCK_K": block_k, "BLOCK_S": _power_of_two(n_experts // groups)}
    constants = {**_PLAIN, **sizes, **changes}
    if constants["SCORED"]:
        del constants["bias"]
    if model == "deepseek_v3":
        del constants["num_valid"]
    narrow = not constants["SCORED"] and constants["SOURCE"] == "value"
    # Ascend searches each weight anew: its maximum stands for NaN and -inf too.
    source = "base" if constants["SOURCE"] == "value" else constants["SOURCE"]
    pointers = {name: kind for name, kind in _POINTERS.items() if name not in constants}
    signature = {**pointers, **_SCALARS}
    return [
        Case(
            name=f"gating-{model}",
            kernel="gating:gating_kernel",
            signature=signature,
            constants={**constants, "BLOCK_T": 1, "NARROW": narrow, "ASCEND": False},
            num_warps=1,
            cuda_only="selects by integers, which Ascend's vector unit compares one by one; see gating-*-floats",
        ),
        Case(
            name=f"gating-{model}-floats",
            kernel="gating:gating_kernel",
            signature=signature,
            constants={**constants, "SOURCE": source, "BLOCK_T": ascend_rows, "NARROW": False, "ASCEND": True},
            ascend_only="selects by floats, of which two computations may differ on CUDA",
        ),
    ]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


CASES = [
    *_cases("qwen3_30b", 128, 8, 8, 16, RENORMALIZE="sum"),
    *_cases("gpt_oss_120b", 128, 4, 4, 16, AFTER=True, SCORE_DTYPE="bf16", CHOICE_DTYPE="bf16", WEIGHT_DTYPE="bf16"),
    *_cases("minimax_m2", 256, 8, 8, 8, **_BIASED_SIGMOID),
    *_cases("deepseek_v3", 256, 8, 8, 4, **_BIASED_SIGMOID, N_GROUP=8, TOPK_GROUP=4, BLOCK_G=8, BY_TOP2=True),
    # Groups of 20 experts and k = 6: padding everywhere.
    *_cases("deepseek_v2", 160, 6, 8, 4, N_GROUP=8, TOPK_GROUP=3, BLOCK_G=8, SOURCE="base"),
    # DeepSeek-V4's score, the one with a square root.
    *_cases("deepseek_v4", 64, 6, 8, 16, **{**_BIASED_SIGMOID, "SCORE": "sqrtsoftplus"}),
]
