"""Compile cases of the qk-norm-rope kernel: as graphs hold it, and as engines do (a cache, positions, v copied)."""

from __future__ import annotations

from triton_cases.case import Case

_POINTERS = (
    *("q", "k", "v", "q_out", "k_out", "v_out", "q_weight", "k_weight", "q_bias", "k_bias"),
    *("cos", "sin", "positions"),
)
_SIZES = (
    *("tokens", "length", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_token"),
    *("cos_batch", "cos_token", "sin_batch", "sin_token"),
)
_OF_GRAPHS = {"v": None, "v_out": None, "positions": None, "FULL_TABLES": True, "HEADS_FIRST": True}
_OF_ENGINES = {"FULL_TABLES": False, "HEADS_FIRST": False}


def _cases(
    name: str, heads: tuple[int, int], ascend_heads: int, form: dict[str, object], **changes: object
) -> list[Case]:
    constants: dict[str, object] = {
        **{"q_bias": None, "k_bias": None, "Q_HEADS": heads[0], "K_HEADS": heads[1], "D": 128, "ROTARY": 128},
        **{"NORM": "head", "CAST": "before", "OFFSET": 0.0, "INTERLEAVED_IN": False, "INTERLEAVED_OUT": False},
        **{f"{value}_DTYPE": "bf16" for value in ("X", "WEIGHTED", "NORMED", "ROPE", "ROTATED")},
        **form,
        **changes,
    }
    rotary = int(str(constants["ROTARY"]))
    constants |= {"BLOCK_HALF": rotary // 2, "BLOCK_REST": max(1, 128 - rotary)}
    types = {"eps": "fp32"} | dict.fromkeys(_SIZES, "i32")
    types = {pointer: "*i64" if pointer == "positions" else "*bf16" for pointer in _POINTERS} | types
    signature = {argument: kind for argument, kind in types.items() if argument not in constants}
    # Heads at a time for few tokens and for many.
    at_once = {"": heads} if constants["NORM"] == "full" else {"": (8, 8), "-many_tokens": (32, 32)}
    return [
        *(
            Case(
                name=f"qk_norm_rope-{name}{suffix}",
                kernel="qk_norm_rope:qk_norm_rope_kernel",
                signature=signature,
                constants=constants | _blocks(heads, cuda_heads) | {"SPLIT": True, "ASCEND": False},
                num_warps=8 if constants["NORM"] == "full" else 4,
                enable_fp_fusion=False,
                cuda_only="a program per part of a token, which takes more programs than Ascend has cores",
            )
            for suffix, cuda_heads in at_once.items()
        ),
        Case(
            name=f"qk_norm_rope-{name}-whole_tokens",
            kernel="qk_norm_rope:qk_norm_rope_kernel",
            signature=signature,
            constants=constants | _blocks(heads, (ascend_heads, ascend_heads)) | {"SPLIT": False, "ASCEND": True},
            ascend_only="a whole token at a time, which leaves most of a GPU idle in decoding",
        ),
    ]


def _blocks(heads: tuple[int, int], at_once: tuple[int, int]) -> dict[str, object]:
    sizes = [1 << (min(wanted, have) - 1).bit_length() for wanted, have in zip(at_once, heads, strict=True)]
    return {"BLOCK_Q": sizes[0], "BLOCK_K": sizes[1], "BLOCK_V": 512}


CASES = [
    *_cases("qwen3_30b", (32, 4), 16, _OF_GRAPHS),
    *_cases("qwen3_30b-engine", (32, 4), 16, _OF_ENGINES),
    *_cases("qwen3_235b", (64, 4), 16, _OF_GRAPHS),
    *_cases("qwen3_235b-engine", (64, 4), 16, _OF_ENGINES),
    *_cases("minimax_m2", (48, 8), 8, _OF_GRAPHS, NORM="full", ROTARY=64),
    *_cases("minimax_m2-engine", (48, 8), 8, _OF_ENGINES, NORM="full", ROTARY=64),
    *_cases("interleaved", (32, 4), 8, _OF_ENGINES, INTERLEAVED_IN=True, INTERLEAVED_OUT=True, ROTARY=64),
]
