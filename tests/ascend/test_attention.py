"""``attention`` on ``npu_fused_infer_attention_score``, as a single operator and in torchair's graphs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from lowered_op import difference, kernel

from moe_fx.lowering.ascend import attention as lowering
from moe_fx.lowering.ops import CANONICAL_OPS

KERNEL = "torch_npu npu_fused_infer_attention_score"
HALF = [torch.float16, torch.bfloat16]


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
