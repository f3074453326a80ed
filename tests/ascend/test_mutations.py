"""The tests would notice: a deliberately wrong attribute of an operator turns a comparison red."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from lowered_op import difference, run

from moe_fx.check import compare_outputs
from moe_fx.lowering.ascend import experts, route
from moe_fx.lowering.ops import CANONICAL_OPS


class Changed:
    """An operator called with some keyword arguments replaced."""

    def __init__(self, operator, **changes):
        self.operator, self.changes = operator, changes

    def __call__(self, *args, **kwargs):
        return self.operator(*args, **{**kwargs, **self.changes})


class Namespace:
    """``torch.ops.npu`` with one operator changed."""

    def __init__(self, name, **changes):
        self._name, self._changed = name, Changed(getattr(torch.ops.npu, name).default, **changes)

    def __getattr__(self, name):
        return type("Packet", (), {"default": self._changed}) if name == self._name else getattr(torch.ops.npu, name)


class Torch:
    """The torch module as a lowering sees it, with a changed operator."""

    def __init__(self, npu):
        self.ops = type("Ops", (), {"npu": npu})

    def __getattr__(self, name):
        return getattr(torch, name)


def goes_wrong(monkeypatch, module, op, args, kwargs, operator, refusal=None, **changes):
    """Whether the comparison with the reference fails, or an operator refuses in these words, once it is changed."""
    assert difference(op, args, kwargs) == ""
    monkeypatch.setattr(module, "torch", Torch(Namespace(operator, **changes)))
    want = CANONICAL_OPS[op].reference(*args, **kwargs)
    if refusal is None:
        return compare_outputs(op, run(op, args, kwargs), want) != ""
    with pytest.raises(ValueError, match=f"^{refusal}"):
        run(op, args, kwargs)
    return True


COVER = "npu_grouped_matmul: groups must cover all rows"


EXPERTS = [s for s in CANONICAL_OPS["experts"].samples(torch.float32, torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("operator", "changes", "refusal"),
    [
        ("npu_moe_finalize_routing", dict(drop_pad_mode=0), None),
        ("npu_moe_init_routing_v2", dict(row_idx_type=1), None),
        ("npu_moe_init_routing_v2", dict(active_expert_range=[0, 4]), "npu_grouped_matmul: group_list must count"),
        ("npu_moe_init_routing_v2", dict(expert_tokens_num_type=0), COVER),
        ("npu_moe_init_routing_v2", dict(active_num=3), None),
        ("npu_grouped_matmul", dict(group_list_type=0), COVER),
    ],
    ids=str,
)
def test_experts(operator, changes, refusal, monkeypatch):
    sample = next(s for s in EXPERTS if s.name == "silu-T40")
    assert goes_wrong(monkeypatch, experts, "experts", sample.args, {}, operator, refusal, **changes)


@pytest.mark.parametrize(
    "changes", [dict(alpha=1.0), dict(limit=0.1), dict(bias=0.0), dict(interleaved=False)], ids=str
)
def test_clipped_swiglu(changes, monkeypatch):
    sample = next(s for s in EXPERTS if s.name == "gpt_oss-T40")
    case = (sample.args, dict(sample.kwargs))
    assert goes_wrong(monkeypatch, experts, "experts", *case, "npu_clipped_swiglu", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(k_group=2), dict(group_count=4), dict(group_select_mode=0), dict(norm_type=0),
        dict(renorm=1, refusal="npu_moe_gating_top_k: renorm supports 0 only"),
        dict(bias=None), dict(routed_scaling_factor=1.0), dict(eps=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_gating_top_k(changes, monkeypatch):
    attributes = dict(
        top_k=8,
        score="sigmoid",
        n_group=8,
        topk_group=4,
        group_score="top2sum",
        renormalize="eps",
        eps=1e-20,
        scale=2.5,
    )
    args = (torch.randn(64, 64), torch.randn(64) * 0.5)
    assert goes_wrong(monkeypatch, route, "route", args, attributes, "npu_moe_gating_top_k", **changes)


def test_softmax_after_selection(monkeypatch):
    case = ((torch.randn(64, 32), None), dict(top_k=4, order="after"))
    assert goes_wrong(monkeypatch, route, "route", *case, "npu_moe_gating_top_k_softmax_v2", renorm=0)
