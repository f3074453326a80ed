"""Compile cases of the kernels of fused experts: pairs, tiles and int4, with the launchers' blocks for each model."""

from __future__ import annotations

from dataclasses import dataclass

from triton_cases.case import Case

_INT4_CHUNK = 128
_TENSOR_CORES = (
    "int4 weights meet a tensor core in registers, which an NPU's cube unit does not read: it takes L1 alone"
)
_PLANES = "only the tiles of int4 read two planes, and they are not for Ascend"
_SPLIT = "several pairs at a time need 64-bit vectors, and gate and up are split in registers"
_TUPLES = "rows are held in tuples, which triton-ascend's language does not have"
_ALONE = "the form that takes one pair at a time and reads gate and up apart"


@dataclass(frozen=True)
class _Model:
    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    gpt_oss: bool = False

    @property
    def gate_up(self) -> dict[str, object]:
        """Attributes and strides of the gate and up projection."""
        rows = 2 * self.inter
        strides = (rows * self.hidden, *((1, rows) if self.gpt_oss else (self.hidden, 1)))
        return {
            "x_stride": self.hidden,
            "H": self.hidden,
            "INTER": self.inter,
            "TOP_K": self.top_k,
            **{f"{name}_{axis}": stride for name in ("W", "UP") for axis, stride in zip("ENK", strides, strict=True)},
            "B_E": rows,
            "GATE_AT": 0,
            "UP_AT": 1 if self.gpt_oss else self.inter,
            "STEP": 2 if self.gpt_oss else 1,
            "GATED": True,
            "ACT": "swiglu_oai" if self.gpt_oss else "silu",
            "HAS_LIMIT": self.gpt_oss,
            "WEIGHT_ON_INPUT": False,
            **({} if self.gpt_oss else {"b_gate": None, "b_up": None}),
        }

    @property
    def down(self) -> dict[str, object]:
        """Attributes and strides of the down projection."""
        along = (1, self.hidden) if self.gpt_oss else (self.inter, 1)
        return {
            "H": self.hidden,
            "INTER": self.inter,
            **dict(zip(("W_E", "W_N", "W_K"), (self.hidden * self.inter, *along), strict=True)),
            **({} if self.gpt_oss else {"b2": None}),
        }


_MODELS = (
    _Model("qwen3_30b", 2048, 768, 128, 8),
    _Model("qwen3_235b", 4096, 1536, 128, 8),
    _Model("deepseek_v3", 7168, 2048, 256, 8),
    _Model("minimax_m2", 3072, 1536, 256, 8),
    _Model("gpt_oss_120b", 2880, 2880, 128, 4, gpt_oss=True),
)
_QWEN, _DEEPSEEK, _GPT_OSS = _MODELS[0], _MODELS[2], _MODELS[4]
_TILE_POINTERS = {"order": "*i32", "tiles": "*i32"}
_ACTIVATION = {"alpha": "fp32", "limit": "fp32"}


def _case(name: str, kernel: str, types: dict[str, str], constants: dict[str, object], **options: object) -> Case:
    """A case with the types of those arguments that are no constants."""
    signature = {argument: kind for argument, kind in types.items() if argument not in constants}
    return Case(name, kernel, signature, constants, **options)  # type: ignore[arg-type]


def _matrices(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}")


def _pairs(model: _Model) -> list[Case]:
    kernel = "experts_pairs:gate_up_pairs_kernel"
    types = {
        **_matrices("bf16", "x"),
        **{"weights": "*fp32", "ids": "*i32"},
        **_matrices("bf16", "w_gate", "w_up", "b_gate", "b_up", "h"),
        "n_pairs": "i32",
        **_ACTIVATION,
    }
    given = {"E": model.experts, **model.gate_up}
    blocks, warps = ((32, 64), 4) if model.gpt_oss else ((1, 1024), 2)
    up = {**given, "MERGED": model.gpt_oss, "BLOCK_N": blocks[0], "BLOCK_K": blocks[1], "PDL": True}
    ascend_blocks = (16, 32) if model.gpt_oss else (8, 512)
    apart = {**given, "MERGED": False, "BLOCK_N": ascend_blocks[0], "BLOCK_K": ascend_blocks[1], "PDL": False}

    down_kernel = "experts_pairs:down_pairs_kernel"
    down_types = {
        **_matrices("bf16", "h"),
        **{"weights": "*fp32", "ids": "*i32"},
        **_matrices("bf16", "w2", "b2", "y"),
        "n_tokens": "i32",
    }
    given = {"E": model.experts, "TOP_K": model.top_k, "WEIGHT_ON_INPUT": False, **model.down}
    blocks, down_warps = ((4, 16, 128), 8) if model.gpt_oss else ((8, 1, 256), 4)
    down = {**given, "ASCEND": False, "PDL": True, **dict(zip(("BLOCK_S", "BLOCK_N", "BLOCK_K"), blocks, strict=True))}
    alone = {
        **given,
        "ASCEND": True,
        "PDL": False,
        "BLOCK_S": 1,
        "BLOCK_N": ascend_blocks[0],
        "BLOCK_K": ascend_blocks[1],
    }
    cases = [
        _case(f"experts_gate_up_pairs-{model.name}", kernel, types, up, num_warps=warps, cuda_only=_SPLIT),
        _case(f"experts_gate_up_pairs-{model.name}-ascend", kernel, types, apart, ascend_only=_ALONE),
        _case(
            f"experts_down_pairs-{model.name}", down_kernel, down_types, down, num_warps=down_warps, cuda_only=_SPLIT
        ),
        _case(f"experts_down_pairs-{model.name}-ascend", down_kernel, down_types, alone, ascend_only=_ALONE),
    ]
    if model.inter <= 1536:
        rows = {name: value for name, value in given.items() if name != "W_K"}
        rows |= {"BLOCK_S": 8, "BLOCK_K": 256, "PDL": True}
        # What 96 registers of a thread hold; longer rows are read in blocks.
        rows["ROWS"] = 1 << (8 * 768 // model.inter).bit_length() - 1
        rows["AHEAD"] = rows["ROWS"] * 3 // 4
        kernel = "experts_pairs:down_rows_kernel"
        cases.append(_case(f"experts_down_rows-{model.name}", kernel, down_types, rows, num_warps=8, cuda_only=_TUPLES))
    return cases


def _tiles(model: _Model, rows: int, columns: int, block_k: int, warps: int, ascend: bool = False) -> list[Case]:
    """Tiles of `rows` pairs; `columns` of the down projection, half as many of gate and of up."""
    name = f"{model.name}-M{rows}" + ("-ascend" if ascend else "")
    only = {"ascend_only": _ALONE} if ascend else {"cuda_only": _SPLIT}
    options = {"num_warps": warps, "num_stages": 4, **only}
    blocks = {"BLOCK_M": rows, "BLOCK_K": block_k, "GROUP": 4, "ASCEND": ascend}
    types = {
        **_matrices("bf16", "x"),
        "weights": "*fp32",
        **_TILE_POINTERS,
        **_matrices("bf16", "w_gate", "w_up", "b_gate", "b_up", "h"),
        "max_tiles": "i32",
        **_ACTIVATION,
    }
    down_types = {
        **_matrices("bf16", "h"),
        **_TILE_POINTERS,
        **_matrices("bf16", "w2", "b2", "results"),
        "max_tiles": "i32",
    }
    up = {**model.gate_up, **blocks, "BLOCK_N": columns // 2, "MERGED": not ascend}
    down = {**model.down, **blocks, "BLOCK_N": columns}
    return [
        _case(f"experts_gate_up_tiles-{name}", "experts_grouped:gate_up_tiles_kernel", types, up, **options),
        _case(f"experts_down_tiles-{name}", "experts_grouped:down_tiles_kernel", down_types, down, **options),
    ]


def _sorting(model: _Model, ascend: bool) -> list[Case]:
    name = model.name + ("-ascend" if ascend else "")
    only = {"ascend_only": "counts by comparing: there is no histogram"} if ascend else {"cuda_only": "a histogram"}
    shape = {"E": model.experts, "BLOCK_E": model.experts, "BLOCK_P": 32 if ascend else 1024, "ASCEND": ascend}
    place_types = {
        **{"ids": "*i32", "counts": "*i32", "order": "*i32", "tiles": "*i32"},
        **{"n_pairs": "i32", "max_tiles": "i32"},
    }
    place, counted = {**shape, "BLOCK_M": 64, "counts": None}, {**shape, "BLOCK_M": 64}
    count_types = {"ids": "*i32", "counts": "*i32", "n_pairs": "i32"}
    kernel = "expert_tiles:place_pairs_kernel"
    return [
        _case(f"expert_tiles_place-{name}", kernel, place_types, place, **only),
        _case(f"expert_tiles_place_counted-{name}", kernel, place_types, counted, **only),
        _case(f"expert_tiles_count-{name}", "expert_tiles:count_pairs_kernel", count_types, shape, **only),
    ]


def _combine(model: _Model) -> Case:
    types = {"results": "*bf16", "weights": "*fp32", "ids": "*i32", "y": "*bf16", "n_tokens": "i32"}
    sizes = {"E": model.experts, "H": model.hidden, "TOP_K": model.top_k}
    constants = {**sizes, "WEIGHT_ON_INPUT": False, "BLOCK_H": 1024}
    return _case(f"experts_combine-{model.name}", "experts_grouped:combine_kernel", types, constants)


def _int4_strides(rows: int, inputs: int, group: int, to_a_unit: int) -> dict[str, object]:
    groups = inputs // group
    return {
        "W_E": rows * inputs // to_a_unit,
        "W_N": inputs // to_a_unit,
        **{f"{name}_{axis}": at for name in "SZ" for axis, at in zip("ENK", (rows * groups, groups, 1), strict=True)},
    }


def _int4_gate_up(model: _Model, group: int, to_a_unit: int) -> dict[str, object]:
    named = ("H", "INTER", "TOP_K", "B_E", "GATE_AT", "UP_AT", "STEP", "GATED", "ACT", "HAS_LIMIT")
    attributes = {name: model.gate_up[name] for name in named}
    return {**attributes, "b13": None, **_int4_strides(2 * model.inter, model.hidden, group, to_a_unit)}


def _int4_pairs(model: _Model, group: int, zeros: bool, ascend: bool) -> list[Case]:
    name = f"{model.name}-g{group}{'-zeros' if zeros else ''}{'-ascend' if ascend else ''}"
    only = {"ascend_only": _ALONE} if ascend else {"cuda_only": _SPLIT}
    options = {"num_warps": 1, **only}
    # On an NPU as many words are scaled together as a group has: short sums would be scalar.
    blocks = {
        **{"GROUP": group, "QUAD": group // 8 if ascend else 4},
        **{"BLOCK_N": 2 if ascend else 4, "BLOCK_W": 64 if ascend else 128, "ASM": not ascend, "PDL": not ascend},
    }
    planes = "*bf16" if ascend else "*i32"
    types = {
        **{"x_planes": planes, "x_scales": "*fp32", "ids": "*i32", "w13": "*i32", "w13_scale": "*bf16"},
        **{"w13_zero": "*u8", "b13": "*bf16", "h": "*bf16", "n_pairs": "i32"},
        **_ACTIVATION,
    }
    up = {"E": model.experts, **_int4_gate_up(model, group, 8), **blocks, **({} if zeros else {"w13_zero": None})}
    up |= {"x_scales": None} if ascend else {}
    biased = zeros and not ascend
    if biased:
        del up["b13"]
    down_types = {
        **{"h_planes": planes, "h_scales": "*fp32", "weights": "*fp32", "ids": "*i32", "w2": "*i32"},
        **{"w2_scale": "*bf16", "w2_zero": "*u8", "b2": "*bf16", "y": "*bf16", "n_tokens": "i32"},
    }
    down = {
        **{"E": model.experts, "H": model.hidden, "INTER": model.inter, "TOP_K": model.top_k},
        **_int4_strides(model.hidden, model.inter, group, 8),
        **({} if zeros else {"w2_zero": None}),
        **({} if biased else {"b2": None}),
        **{**blocks, "MODEL": "bf16", "ASCEND": ascend},
        **({"h_scales": None} if ascend else {}),
    }
    return [
        _case(
            f"experts_int4_gate_up_pairs-{name}", "experts_int4_pairs:gate_up_pairs_int4_kernel", types, up, **options
        ),
        _case(
            f"experts_int4_down_pairs-{name}",
            "experts_int4_pairs:down_pairs_int4_kernel",
            down_types,
            down,
            **options,
        ),
    ]


def _split_planes(planes: int) -> Case:
    return _case(
        f"split_planes-qwen3_30b-{planes}",
        "planes:split_planes_kernel",
        {"x": "*bf16", "planes": "*bf16", "n_rows": "i32", "x_stride": "i32"},
        {"K": 2048, "PLANES": planes, "BLOCK": 128, "PDL": False},
        cuda_only=_PLANES if planes == 2 else None,
    )


def _int4_tiles(model: _Model, rows: int, columns: int, warps: int, group: int, zeros: bool) -> list[Case]:
    name = f"{model.name}-g{group}{'-zeros' if zeros else ''}-M{rows}"
    options = {"num_warps": warps, "num_stages": 3, "cuda_only": _TENSOR_CORES}
    chunk = min(group, _INT4_CHUNK)
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "GROUP": 4, "CHUNK": chunk, "SHARE": group // chunk}
    types = {
        "x_planes": "*bf16",
        **_TILE_POINTERS,
        **{"w13": "*u8", "w13_scale": "*bf16", "w13_zero": "*u8", "h_planes": "*bf16", "max_tiles": "i32"},
        **_ACTIVATION,
    }
    up = {**_int4_gate_up(model, group, 2), **blocks, **({} if zeros else {"w13_zero": None})}
    down_types = {
        "h_planes": "*bf16",
        **_TILE_POINTERS,
        **{"w2": "*u8", "w2_scale": "*bf16", "w2_zero": "*u8", "results": "*bf16", "max_tiles": "i32"},
    }
    sizes = {"H": model.hidden, "INTER": model.inter, "b2": None}
    down = {**sizes, **_int4_strides(model.hidden, model.inter, group, 2), **blocks}
    down |= {} if zeros else {"w2_zero": None}
    return [
        _case(
            f"experts_int4_gate_up_tiles-{name}", "experts_int4_grouped:gate_up_tiles_int4_kernel", types, up, **options
        ),
        _case(
            f"experts_int4_down_tiles-{name}",
            "experts_int4_grouped:down_tiles_int4_kernel",
            down_types,
            down,
            **options,
        ),
    ]


CASES = [
    *(case for model in _MODELS for case in _pairs(model)),
    *(case for model in _MODELS for case in _tiles(model, 16, 64, 128, 4)),
    *(case for model in (_QWEN, _GPT_OSS) for case in _tiles(model, 128, 128, 64, 8)),
    *(case for model in (_QWEN, _DEEPSEEK, _GPT_OSS) for case in _tiles(model, 64, 64, 64, 4, ascend=True)),
    *(case for model in (_QWEN, _DEEPSEEK) for ascend in (False, True) for case in _sorting(model, ascend)),
    _combine(_QWEN),
    _combine(_GPT_OSS),
    *(case for ascend in (False, True) for case in _int4_pairs(_QWEN, 128, False, ascend)),
    *(case for ascend in (False, True) for case in _int4_pairs(_QWEN, 32, True, ascend)),
    *_int4_tiles(_QWEN, 16, 64, 4, 128, False),
    *_int4_tiles(_QWEN, 128, 128, 8, 128, True),
    *_int4_tiles(_QWEN, 16, 64, 4, 32, True),
    *(_split_planes(planes) for planes in (2, 8)),
    _case(
        "fixed_point_planes-qwen3_30b",
        "planes:fixed_point_planes_kernel",
        {"x": "*bf16", "planes": "*i32", "scales": "*fp32", "n_rows": "i32", "x_stride": "i32"},
        {"K": 2048, "BLOCK_R": 8, "WAIT_FIRST": True, "PDL": True},
        cuda_only="made for an instruction of GPUs, the dot product of four bytes",
    ),
]
