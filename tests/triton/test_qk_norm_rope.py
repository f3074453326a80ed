"""The qk-norm-rope kernel against its reference: every attribute, views, sizes, the split of a merged qkv, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, assert_close_to_reference, assert_within, gpu_only, on_device
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

pytest.importorskip("triton", reason="upstream Triton is not installed (it is made for Linux)")

from moe_fx.lowering.cuda import configs
from moe_fx.lowering.cuda import qk_norm_rope as launcher
from moe_fx.lowering.cuda.qk_norm_rope import qk_norm_rope, qk_norm_rope_refusal, split_qkv_norm_rope
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.rope import LAYOUTS, NORMS, ROPES

OP = CANONICAL_OPS["qk_norm_rope"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
reference = OP.reference
FULL_TABLES = ("half", "interleaved_full")


@pytest.fixture
def whole_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the form that Ascend gets: few programs, each looping over whole tokens, few heads at a time."""
    kernel = launcher.qk_norm_rope_kernel

    class Few:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                del constants["num_warps"], constants["enable_fp_fusion"]
                blocks = {name: min(2, constants[name]) for name in ("BLOCK_Q", "BLOCK_K")}
                kernel[(min(3, *grid),)](*args, **{**constants, **blocks, "SPLIT": False, "ASCEND": True})

            return launch

    monkeypatch.setattr(launcher, "qk_norm_rope_kernel", Few())


def tables(shape: tuple[int, ...], rotary: int, rope: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles; full-width ones differ within pairs, which no reference forbids."""
    angle = torch.rand(*shape, rotary if rope in FULL_TABLES else rotary // 2) * 6.28
    return angle.cos().to(dtype), angle.sin().to(dtype)


def operands(
    batch: int = 2,
    length: int = 3,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    rotary: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    norm: str = "head",
    rope: str = "half",
) -> tuple[Any, ...]:
    q, k = (torch.randn(batch, length, n, dim).to(dtype) for n in heads)
    weights = [torch.randn(dim if norm == "head" else n * dim).to(dtype) for n in heads]
    return (q, k, *weights, *tables((1, length), rotary, rope, dtype), 1e-6)


def placed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given.to(DEVICE) if isinstance(given, torch.Tensor) else given for given in args)


def biases(like: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    return {"q_bias": torch.randn_like(like[2]), "k_bias": torch.randn_like(like[3])}


def check(args: tuple[Any, ...], **kwargs: Any) -> tuple[torch.Tensor, ...]:
    assert qk_norm_rope_refusal(*args, **kwargs) is None
    results = assert_close_to_reference("qk_norm_rope", qk_norm_rope, args, kwargs)
    assert all(result.is_contiguous() for result in results)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
def test_samples(dtype: torch.dtype, rope: str) -> None:
    for sample in OP.samples(dtype, torch.Generator().manual_seed(0)):
        if sample.kwargs["rope"] == rope:
            check(sample.args, **sample.kwargs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rope", ROPES)
def test_whole_tokens_form(whole_tokens: None, norm: str, rope: str) -> None:
    args = operands(norm=norm, rope=rope, rotary=8, heads=(5, 2))
    check(args, norm=norm, rope=rope, **biases(args))


# --- Attributes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"cast": "after"}, {"cast": "after", "offset": 1.0}, {"rope_dtype": torch.float32}]
)
def test_attributes(layout: str, norm: str, kwargs: dict[str, Any]) -> None:
    args = operands(norm=norm, rotary=8)
    check(args, norm=norm, layout=layout, **kwargs)
    check(args, norm=norm, layout=layout, **kwargs, **biases(args))


def test_offset_counts_only_where_the_cast_comes_after() -> None:
    args = operands()
    plain, offset = check(args), check(args, offset=1.0)
    assert all(map(torch.equal, plain, offset))


@pytest.mark.parametrize("cast", ["before", "after"])
def test_weights_may_be_missing(cast: str) -> None:
    q, k, q_weight, k_weight, *rest = operands()
    check((q, k, None, None, *rest), cast=cast, offset=1.0 if cast == "after" else 0.0)
    check((q, k, q_weight, None, *rest), cast=cast)
    check((q, k, None, k_weight, *rest), cast=cast, k_bias=torch.randn_like(k_weight))


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize(
    "weights, biased, table, rope_dtype, expected",
    [
        (torch.float32, None, torch.bfloat16, None, {"before": torch.float32, "after": torch.bfloat16}),
        (torch.bfloat16, torch.float32, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, None, torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, None, torch.bfloat16, None, {"before": torch.float32, "after": torch.bfloat16}),
    ],
)
def test_dtypes_promote_as_in_the_reference(
    cast: str, weights: torch.dtype, biased: Any, table: torch.dtype, rope_dtype: Any, expected: Any
) -> None:
    q, k, q_weight, k_weight, cos, sin, eps = operands(rotary=8)
    added = (
        {} if biased is None else {name: bias.to(biased) for name, bias in biases((q, k, q_weight, k_weight)).items()}
    )
    args = (q, k, q_weight.to(weights), k_weight.to(weights), cos.to(table), sin.to(table), eps)
    results = check(args, cast=cast, rope_dtype=rope_dtype, **added)
    expected = expected[cast] if isinstance(expected, dict) else expected
    assert {result.dtype for result in results} == {expected}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "dtype, kwargs",
    [
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"rope_dtype": torch.float32}),
        (torch.float16, {"cast": "after", "offset": 1.0}),
        (torch.float32, {"rope_dtype": torch.bfloat16}),
    ],
)
def test_every_value_is_rounded_where_the_reference_rounds_it(
    dtype: torch.dtype, rope: str, norm: str, kwargs: dict[str, Any]
) -> None:
    """Heads of +-1 have a mean square of exactly 1: what comes after it decides alone, and must agree bit by bit."""
    q, k, *rest, _ = placed(operands(norm=norm, rope=rope, dtype=dtype, dim=32, rotary=16))
    args = (q.sign(), k.sign(), *rest, 0.0)
    added = biases(args)
    ours = qk_norm_rope(*args, norm=norm, rope=rope, **added, **kwargs)
    theirs = reference(*args, norm=norm, rope=rope, **added, **kwargs)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalised_value_is_rounded_before_the_weight(dtype: torch.dtype) -> None:
    """Sums in another order move few roundings; one that is left out moves about a third of the results."""
    q, k, q_weight, k_weight, cos, sin, eps = placed(operands(dtype=dtype, dim=64, rotary=64, heads=(8, 2)))
    args = (q, k, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), eps)
    for ours, theirs in zip(qk_norm_rope(*args), reference(*args), strict=True):
        assert (ours == theirs).float().mean() > 0.97


# --- Views and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_parts_of_a_merged_projection_are_read_where_they_lie(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, *rest = operands(norm=norm, heads=(6, 2))
    qkv = torch.randn(2, 3, 10 * 16 + 5, dtype=torch.bfloat16)[..., 3:-2].unflatten(-1, (10, 16))
    q, k = qkv[:, :, :6], qkv[:, :, 6:8]
    monkeypatch.setattr(launcher, "_rows", lambda part: part if part.stride(-1) == 1 else pytest.fail("copied"))
    check((q, k, *rest), norm=norm)


def test_heads_may_lie_in_any_order() -> None:
    """Heads outermost, and groups of queries with their keys (as GPT-NeoX and Qwen3-Next merge projections)."""
    _, _, *rest = operands()
    q, k = (torch.randn(2, heads, 3, 16, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2))
    check((q, k, *rest))
    grouped = torch.randn(2, 3, 4, 2, 16, dtype=torch.bfloat16)
    check((grouped[..., 0, :], grouped[:, :, :2, 1], *rest))


def test_elements_of_a_head_that_lie_apart_are_copied_together() -> None:
    q, k, q_weight, k_weight, cos, sin, eps = operands()
    strided = [torch.stack((t, t), -1)[..., 0] for t in (q, k, q_weight, k_weight, cos, sin)]
    assert all(tensor.stride(-1) == 2 for tensor in strided)
    check((*strided, eps))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_tables_broadcast_over_batch_and_tokens(shape: tuple[int, int]) -> None:
    *args, _, _, eps = operands()
    check((*args, *tables(shape, 16, "half", torch.bfloat16), eps))


def test_tables_may_be_views() -> None:
    *args, cos, sin, eps = operands()
    both = torch.stack((cos, sin), dim=2)
    check((*args, both[:, :, 0], both[:, :, 1], eps))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 4), (7, 3), (12, 2), (2, 5)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_ratio_of_heads(heads: tuple[int, int], norm: str) -> None:
    check(operands(heads=heads, norm=norm), norm=norm)


@pytest.mark.parametrize("dim, rotary", [(2, 2), (4, 2), (32, 32), (64, 16), (128, 64), (256, 64), (24, 12), (80, 32)])
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_any_size_of_head(dim: int, rotary: int, rope: str) -> None:
    check(operands(dim=dim, rotary=rotary, rope=rope, length=2), rope=rope)


@pytest.mark.parametrize("block", [2, 32])
@pytest.mark.parametrize("norm", NORMS)
def test_any_number_of_heads_at_a_time(block: int, norm: str) -> None:
    with configs.forced({"qk_norm_rope": {"BLOCK_H": block, "num_warps": 4}}):
        check(operands(heads=(7, 3), norm=norm, rotary=8), norm=norm)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tokens(batch: int, length: int, layout: str) -> None:
    check(operands(batch=batch, length=length), layout=layout)


def test_nothing_is_written_outside_of_the_results(whole_tokens: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are cut out of larger memory whose rest must stay as it was."""
    memory: list[torch.Tensor] = []

    def cut(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = int(np.prod(shape))
        memory.append(torch.full((size + 64,), 7.0, dtype=dtype, device=device))
        return memory[-1][32:-32].view(shape)

    args = tuple(map(on_device, operands(heads=(3, 1), dim=24, rotary=12)))
    monkeypatch.setattr(launcher.torch, "empty", cut)
    check(args)
    assert len(memory) == 2
    assert all((whole[:32] == 7).all() and (whole[-32:] == 7).all() for whole in memory)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim = 2 ** draw(st.integers(1, 6))
    kwargs = {
        "norm": draw(st.sampled_from(NORMS)),
        "rope": draw(st.sampled_from(ROPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "cast": draw(st.sampled_from(("before", "after"))),
        "rope_dtype": draw(st.sampled_from((None, torch.float32))),
    }
    heads = (draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    sizes = {
        "batch": draw(st.integers(1, 2)),
        "length": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    rotary = 2 * draw(st.integers(1, dim // 2))
    args = operands(heads=heads, dim=dim, rotary=rotary, norm=kwargs["norm"], rope=kwargs["rope"], **sizes)
    return args, kwargs | (biases(args) if draw(st.booleans()) else {})


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn())
def test_drawn_operands(case: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, kwargs = case
    check(args, **kwargs)


@gpu_only
def test_offsets_beyond_32_bits() -> None:
    q, k, q_weight, k_weight, cos, sin, eps = placed(operands(heads=(2, 2)))
    far = torch.empty(2 * (2**31 + 64), dtype=torch.bfloat16, device=DEVICE)
    for strides in ((2**31, 32, 16, 1), (64, 2**30, 16, 1), (96, 32, 2**31, 1)):
        view = far.as_strided(q.shape, strides).copy_(q)
        check((view, k, q_weight, k_weight, cos, sin, eps))


@gpu_only
def test_in_a_cuda_graph() -> None:
    args = placed(operands())
    qk_norm_rope(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = qk_norm_rope(*args)
    args[0].normal_()
    graph.replay()
    for got, want in zip(ours, reference(*args), strict=True):
        assert_within("qk_norm_rope", got, want, torch.bfloat16)


# --- From a merged qkv ------------------------------------------------------------------------------------------------


def split_reference(
    qkv: torch.Tensor, weights: list[Any], cache: torch.Tensor, positions: Any, heads: tuple[int, int], **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    """By the canonical op, from gathered tables."""
    dim = qkv.shape[1] // (heads[0] + 2 * heads[1])
    rows = cache if positions is None else cache[positions.long()]
    cos, sin = rows.unsqueeze(0).chunk(2, dim=-1)
    parts = qkv.split([heads[0] * dim, *[heads[1] * dim] * 2], dim=1)
    q, k, v = (part.unflatten(1, (-1, dim)).unsqueeze(0) for part in parts)
    rope = "interleaved" if kwargs.pop("interleaved", False) else "half_split"
    q, k = reference(q, k, *weights, cos, sin, rope=rope, layout="bsnd", **kwargs)
    return tuple(part.squeeze(0).flatten(1) for part in (q, k, v))


def check_split(
    tokens: int = 5,
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    rotary: int = 16,
    positions: torch.Tensor | None = None,
    rows: int = 0,
    stride: int = 0,
    **kwargs: Any,
) -> None:
    width = (heads[0] + 2 * heads[1]) * dim
    qkv = torch.randn(tokens, width + stride, dtype=torch.bfloat16, device=DEVICE)[:, :width]
    norm = kwargs.get("norm", "head")
    weights = [torch.randn(dim if norm == "head" else n * dim).to(DEVICE, torch.bfloat16) for n in heads]
    cache = torch.cat(tables((rows or tokens,), rotary, "half_split", torch.bfloat16), dim=-1).to(DEVICE)
    positions = None if positions is None else positions.to(DEVICE)
    copy_v = kwargs.pop("copy_v", False)
    ours = split_qkv_norm_rope(qkv, *weights, cache, positions, *heads, dim, copy_v=copy_v, **kwargs)
    theirs = split_reference(qkv, weights, cache, positions, heads, **{"eps": 1e-6, **kwargs})
    for got, want in zip(ours, theirs, strict=True):
        assert_within("qk_norm_rope", got, want, torch.bfloat16)
    assert torch.equal(ours[2], theirs[2])
    assert (ours[2]._base is None) is copy_v
    assert ours[2].is_contiguous() or not copy_v


@pytest.mark.parametrize("copy_v", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 8])
@pytest.mark.parametrize("norm", NORMS)
def test_split(copy_v: bool, interleaved: bool, rotary: int, norm: str) -> None:
    check_split(copy_v=copy_v, interleaved=interleaved, rotary=rotary, norm=norm)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_split_by_positions(dtype: torch.dtype) -> None:
    check_split(positions=torch.tensor([8, 0, 3, 3, 1], dtype=dtype), rows=9)
    check_split(positions=torch.tensor([[8, 0, 3, 3, 1]] * 2, dtype=dtype).t()[:, 0], rows=9, copy_v=True)


def test_split_of_whole_tokens(whole_tokens: None) -> None:
    check_split(positions=torch.tensor([8, 0, 3, 3, 1]), rows=9, copy_v=True)
    check_split(norm="full", rotary=8, interleaved=True)


@pytest.mark.parametrize("heads", [(7, 3), (1, 1), (5, 5)])
def test_split_of_any_ratio(heads: tuple[int, int]) -> None:
    check_split(heads=heads, copy_v=True)


def test_split_of_padded_rows_and_wide_values() -> None:
    check_split(stride=24, copy_v=True)
    check_split(tokens=2, heads=(1, 9), dim=128, rotary=128, copy_v=True)  # v is more than one block


def test_split_of_nothing() -> None:
    check_split(tokens=0, rows=4, positions=torch.empty(0, dtype=torch.int64), copy_v=True)


def test_split_with_everything() -> None:
    check_split(cast="after", offset=1.0, rope_dtype=torch.float32, eps=1e-3)
    added = {name: torch.randn(16).to(DEVICE, torch.bfloat16) for name in ("q_bias", "k_bias")}
    check_split(**added)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.ones(5, 161)}, r"qkv is \[5, 161\]; 6 query heads and twice 2 key/value heads of 16"),
        ({"qkv": torch.ones(1, 5, 160)}, "qkv is"),
        ({"cos_sin": torch.ones(5, 15)}, "R/2 cosines and R/2 sines"),
        ({"cos_sin": torch.ones(4, 16)}, "a row for each of 5 tokens, not 4"),
        ({"cos_sin": torch.ones(5, 32)}, "cos and sin rotate 32 elements of 16"),
        ({"positions": torch.ones(4, dtype=torch.int64)}, r"they must be int32 or int64 \[5\]"),
        ({"positions": torch.ones(5)}, "positions are float32"),
        ({"norm": "rows"}, "norm='rows' is none of 'head', 'full'"),
        ({"q_weight": torch.ones(96)}, r"q_weight is \[96\], not \[16\]"),
    ],
)
def test_split_refuses(change: dict[str, Any], message: str) -> None:
    given = {"qkv": torch.ones(5, 160), "q_weight": torch.ones(16), "k_weight": torch.ones(16), "positions": None}
    given |= {"cos_sin": torch.ones(5, 16), "num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    with pytest.raises(ValueError, match=message):
        split_qkv_norm_rope(**{**given, **change})


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"norm": "rows"}, "norm='rows'"),
        ({"cast": "never"}, "cast='never'"),
        ({"rope": "spiral"}, "rope='spiral'"),
        ({"layout": "sbnd"}, "layout='sbnd'"),
        ({"q": torch.ones(2, 3, 4, 16).double()}, "q is float64, the kernel takes float32, bfloat16, float16"),
        ({"rope_dtype": torch.float64}, "the rotation is in float64"),
        ({"q": torch.ones(6, 4, 16)}, r"not \[B, S, N, D\]"),
        ({"cos": torch.ones(3, 16)}, r"not \[B, S, R\]"),
        ({"k": torch.ones(2, 3, 2, 32)}, "heads of q and k differ in size"),
        ({"k": torch.ones(2, 2, 2, 16)}, r"q and k differ in length \(3 and 2\)"),
        ({"cos": torch.ones(1, 3, 20), "sin": torch.ones(1, 3, 20)}, "rotate 20 elements of 16"),
        ({"cos": torch.ones(1, 3, 7), "sin": torch.ones(1, 3, 7)}, "rotate 7 elements"),
        ({"sin": torch.ones(1, 3, 8)}, "differ in width"),
        ({"sin": torch.ones(1, 3, 16).half()}, "cos is float32, sin float16"),
        ({"q_weight": torch.ones(64)}, r"q_weight is \[64\], not \[16\]"),
        ({"k_bias": torch.ones(1, 16)}, r"k_bias is \[1, 16\], not \[16\]"),
        ({"k": torch.ones(2, 3, 2, 16).half()}, "differ in dtype"),
        ({"q_weight": torch.ones(16).half(), "q": torch.ones(2, 3, 4, 16).half()}, "differ in dtype"),
        ({"q": torch.ones(1, 1, 1, 2048), "k": torch.ones(1, 1, 1, 2048)}, "heads of 2048 are wider than 1024"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin", "eps")
    given = dict(zip(names, operands(dtype=torch.float32), strict=True)) | change
    assert reason.replace("\\", "") in qk_norm_rope_refusal(**given)
    with pytest.raises(ValueError, match="qk_norm_rope: "):
        qk_norm_rope(**given)


def test_symbolic_token_counts_are_not_looked_at() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(tensor: torch.Tensor, index: int, *dynamic: int) -> torch.Tensor:
        dims = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(tensor.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"arg{index}"))

    q, k, q_weight, k_weight, cos, sin, eps = operands()
    tokens = [fake(tensor, i, 0, 1) for i, tensor in enumerate((q, k))]
    weights = [fake(tensor, 2 + i) for i, tensor in enumerate((q_weight, k_weight))]
    angles = [fake(tensor, 4 + i, 1) for i, tensor in enumerate((cos, sin))]
    assert qk_norm_rope_refusal(*tokens, *weights, *angles, eps) is None
    assert not env.guards
    assert "q's head size is not known" in qk_norm_rope_refusal(fake(q.clone(), 6, 3), k, None, None, cos, sin, eps)
