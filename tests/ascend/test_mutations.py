"""The tests would notice: a deliberately wrong attribute of an operator turns a comparison red."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from lowered_op import difference, run

from moe_fx.check import compare_outputs
from moe_fx.lowering.ascend import experts, experts_int8, norms, rope, route
from moe_fx.lowering.ops import CANONICAL_OPS


class Changed:
    """An operator called with some arguments replaced, by a value or by a function of what is given."""

    def __init__(self, operator, **changes):
        self.operator, self.changes = operator, changes
        self.names = [argument.name for argument in operator._schema.arguments]

    def __call__(self, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for name, change in self.changes.items():
            given[name] = change(given[name]) if callable(change) else change
        return self.operator(**given)


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
SWIGLU_QUANT = "npu_grouped_matmul_swiglu_quant_v2"


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


@pytest.mark.parametrize(
    "changes",
    [
        dict(k_group=1), dict(group_count=4), dict(group_select_mode=1), dict(norm_type=1),
        dict(routed_scaling_factor=1.0),
    ],
    ids=str,
)  # fmt: skip
def test_gating_top_k_of_softmax(changes, monkeypatch):
    attributes = dict(top_k=6, n_group=8, topk_group=3, group_score="max", scale=16.0)
    case = ((torch.randn(64, 64), None), attributes)
    assert goes_wrong(monkeypatch, route, "route", *case, "npu_moe_gating_top_k", **changes)


def test_softmax_after_selection(monkeypatch):
    case = ((torch.randn(64, 32), None), dict(top_k=4, order="after"))
    assert goes_wrong(monkeypatch, route, "route", *case, "npu_moe_gating_top_k_softmax_v2", renorm=0)


def sample(op, name):
    found = CANONICAL_OPS[op].samples(torch.bfloat16, torch.Generator().manual_seed(0))
    return next((s.args, dict(s.kwargs)) for s in found if s.name == name)


def swapped(tensors):
    """Other numbers in the same form: the last expert's, or row's, first."""
    return [tensor.flip(0) for tensor in tensors]


@pytest.mark.parametrize(
    ("operator", "changes", "refusal"),
    [
        ("npu_grouped_matmul", dict(antiquant_scale=swapped), None),
        ("npu_grouped_matmul", dict(antiquant_offset=lambda given: [torch.zeros_like(given[0])]), None),
        ("npu_grouped_matmul", dict(group_list_type=0), COVER),
        ("npu_grouped_matmul", dict(group_type=-1), "npu_grouped_matmul: group_type 0"),
        ("npu_grouped_matmul", dict(split_item=0), "npu_grouped_matmul: group_type 0"),
        ("npu_moe_init_routing_v2", dict(row_idx_type=1), None),
        ("npu_moe_finalize_routing", dict(drop_pad_mode=0), None),
    ],
    ids=str,
)
def test_experts_int4(operator, changes, refusal, monkeypatch):
    case = sample("experts_int4", "W4A16-zeros-T9")
    assert goes_wrong(monkeypatch, experts, "experts_int4", *case, operator, refusal, **changes)


@pytest.mark.parametrize(
    ("name", "module", "operator", "changes", "refusal"),
    [
        ("W8A16-T9", experts, "npu_grouped_matmul", dict(antiquant_scale=swapped), None),
        ("W8A16-T9", experts, "npu_grouped_matmul", dict(group_list_type=0), COVER),
        ("W8A8-T9", experts, "npu_grouped_matmul", dict(scale=swapped), None),
        ("W8A8-T9", experts, "npu_grouped_matmul", dict(per_token_scale=swapped), None),
        ("W8A8-T9", experts, "npu_grouped_matmul", dict(group_list_type=0), COVER),
        ("W8A8-T9", experts, "npu_moe_init_routing_v2", dict(scale=lambda given: given.flip(0)), None),
        ("W8A8-T9", experts, "npu_moe_init_routing_v2", dict(row_idx_type=1), None),
        ("W8A8-T9", experts, "npu_moe_finalize_routing", dict(drop_pad_mode=0), None),
        ("W8A8-T9", experts_int8, SWIGLU_QUANT, dict(weight_scale=swapped), None),
        ("W8A8-T9", experts_int8, SWIGLU_QUANT, dict(group_list_type=0), f"{SWIGLU_QUANT}: groups must cover"),
        ("W8A8-T9", experts_int8, SWIGLU_QUANT, dict(dequant_mode=1), f"{SWIGLU_QUANT}: dequant_mode"),
        ("W8A8-T9", experts_int8, SWIGLU_QUANT, dict(quant_mode=1), f"{SWIGLU_QUANT}: dequant_mode"),
        ("W8A8-T9", experts_int8, SWIGLU_QUANT, dict(dequant_dtype=15), f"{SWIGLU_QUANT}: fp32 between"),
    ],
    ids=str,
)
def test_experts_int8(name, module, operator, changes, refusal, monkeypatch):
    case = sample("experts_int8", name)
    assert goes_wrong(monkeypatch, module, "experts_int8", *case, operator, refusal, **changes)


@pytest.mark.parametrize(
    ("module", "operator", "changes"),
    [
        (rope, "npu_rotary_mul", dict(rotary_mode="interleave")),
        (rope, "npu_rotary_mul", dict(r1=torch.ones_like)),
        (rope, "npu_rotary_mul", dict(r2=torch.neg)),
        (norms, "npu_rms_norm", dict(epsilon=1.0)),
    ],
    ids=str,
)
def test_qk_norm_rope(module, operator, changes, monkeypatch):
    case = sample("qk_norm_rope", "half-head-R16-S7")
    assert goes_wrong(monkeypatch, module, "qk_norm_rope", *case, operator, **changes)
