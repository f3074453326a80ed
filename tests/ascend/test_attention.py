"""``attention`` on ``npu_fused_infer_attention_score``, over an eager kernel written from its documentation."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from lowered_op import difference, kernel

from moe_fx.lowering.ascend import attention as lowering
from moe_fx.lowering.ascend import target
from moe_fx.lowering.ops import CANONICAL_OPS

KERNEL = "torch_npu npu_fused_infer_attention_score"
HALF = [torch.float16, torch.bfloat16]


def fused_infer_attention_score(
    query, key, value, *, atten_mask=None, num_heads=1, scale=1.0, input_layout="BSH", num_key_value_heads=0,
    sparse_mode=0, inner_precise=0,
):  # fmt: skip
    """[B, N, S, D] in; a mask of True leaves out; its constraints as checks."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    assert all(x.is_contiguous() and x.dtype in HALF for x in (query, key, value))
    assert key.shape == value.shape == (batch, num_key_value_heads, keys, width) and width % 16 == 0
    assert heads == num_heads and heads % num_key_value_heads == 0
    assert input_layout == "BNSD" or (input_layout == "BNSD_BSND" and queries > 1)
    assert queries > 1 or (sparse_mode == 0 and inner_precise in (0, 1))
    group = heads // num_key_value_heads
    scores = query.float() @ key.float().repeat_interleave(group, 1).transpose(-1, -2) * scale
    if sparse_mode in (2, 3):
        assert atten_mask.dtype == torch.bool
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        offset = 0 if sparse_mode == 2 else keys - queries
        left_out = torch.ones(queries, keys, dtype=torch.bool).triu(1 + offset)
    elif atten_mask is not None:
        assert sparse_mode == 0 and atten_mask.dtype == torch.bool and atten_mask.is_contiguous()
        assert atten_mask.shape == (batch, 1, queries, keys)
        left_out = atten_mask
    else:
        left_out = torch.zeros(queries, keys, dtype=torch.bool)
    weights = scores.masked_fill(left_out, -torch.inf).softmax(-1)
    if inner_precise & 2:
        weights = weights.nan_to_num(0.0)
    result = (weights @ value.float().repeat_interleave(group, 1)).to(query.dtype)
    return (result.transpose(1, 2).contiguous() if "_" in input_layout else result), torch.zeros(1)


@pytest.fixture(autouse=True)
def operator(stand_in, monkeypatch):
    from host_cann import eager_kernels

    eager_kernels.add_kernel(torch.ops.npu.npu_fused_infer_attention_score.default, fused_infer_attention_score)
    monkeypatch.setitem(target._CHOOSERS, "attention", lowering.choose)


def operands(dtype=torch.bfloat16, *, heads=4, kv=2, queries=5, keys=9, width=16, v_width=16):
    shapes = ((2, heads, queries, width), (2, kv, keys, width), (2, kv, keys, v_width))
    return tuple(torch.randn(*shape).to(dtype) for shape in shapes)


ALLOWED = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_samples(dtype):
    for sample in CANONICAL_OPS["attention"].samples(dtype, torch.Generator().manual_seed(0)):
        case = ("attention", sample.args, dict(sample.kwargs))
        if kernel(*case) == KERNEL:
            assert difference(*case) == "", sample.name
        else:
            assert sample.name in ("additive", "mla"), (sample.name, kernel(*case))


CASES = {
    "causal, more keys than queries": ((), dict(is_causal=True)),
    "mask of both": ((ALLOWED,), dict(scale=0.3)),
    "mask of rank 2": ((ALLOWED[0, 0],), {}),
    "mask of the batch": ((ALLOWED[:, :, :1],), {}),
    "mask that leaves a query nothing": ((ALLOWED & (torch.arange(5) != 2)[:, None],), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    masks, attributes = CASES[name]
    case = ("attention", (*operands(), *masks), attributes)
    assert kernel(*case) == KERNEL
    assert difference(*case) == ""


def test_strided_operands():
    """Heads of one projection [B, S, H, D], transposed as models do."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands())
    assert difference("attention", (q, k, v), dict(is_causal=True)) == ""


REFUSED = {
    "fp32": (operands(torch.float32), {}, "float32"),
    "values of another width": (operands(v_width=32), {}, "one width"),
    "width": (operands(width=24, v_width=24), {}, "width 24"),
    "additive mask": ((*operands(), torch.zeros(5, 9, dtype=torch.bfloat16)), {}, "the mask is torch.bfloat16"),
    "mask by head": ((*operands(), ALLOWED.expand(2, 4, 5, 9)), {}, "from head to head"),
    "mask of rank 3": ((*operands(), ALLOWED[:1, 0]), {}, "rank 3"),
    "mask of queries alone": ((*operands(), ALLOWED[..., :1]), {}, "broadcast over keys"),
    "causal, one query": (operands(queries=1), dict(is_causal=True), "the first key only"),
    "groups": (operands(heads=128, kv=1), {}, "128 heads over 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    args, attributes, reason = REFUSED[name]
    text = kernel("attention", args, attributes)
    assert not text.startswith("torch_npu") and reason in text, text


MUTATIONS = dict(
    _CAUSAL=(3, "causal, more keys than queries"),
    _PRECISE_EMPTY_ROWS=(0, "mask that leaves a query nothing"),
)


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_attribute_is_noticed(name, monkeypatch):
    wrong, case = MUTATIONS[name]
    monkeypatch.setattr(lowering, name, wrong)
    masks, attributes = CASES[case]
    assert difference("attention", (*operands(), *masks), attributes) != ""
