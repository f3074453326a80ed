"""Weights are brought into the operators' layout once, follow the model's weights, and go with them."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
from host_cann.npu_ops import unpack_int4
from lowered_op import graph_of
from npu_report import on_hardware

from moe_fx.lowering.ascend import weights as recipes
from moe_fx.lowering.ascend.settings import Settings
from moe_fx.lowering.ascend.target import AscendTarget
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.experts_quantized import dequantize_int4
from moe_fx.lowering.prepared_inputs import hoist, weights_changed

# An NPU may multiply fp32 with 11 bits (HF32): its bound is an assumption, not a measurement.
ATOL = 2e-3 if on_hardware() else 1e-4


def prepared_experts(settings=None):
    sample = next(iter(CANONICAL_OPS["experts"].samples(torch.float32, torch.Generator().manual_seed(0))))
    gm, inputs = graph_of("experts", sample.args, {})
    AscendTarget(settings).lower(gm, "eager")
    examples, with_prepared = hoist(gm, inputs)
    return gm, inputs, examples, with_prepared(gm.forward), sample


def test_the_graph_takes_prepared_weights_in_place_of_the_models():
    gm, _, examples, _, _ = prepared_experts()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert names == ["input_1", "input_2", "input_3", "input_4_stacked", "input_5_stacked"]
    assert [tuple(e.shape) for e in examples[3:]] == [(8, 64, 96), (8, 48, 64)]
    assert "transpose" not in gm.code and "moe_fx_prepare" not in gm.code


@pytest.mark.npu
def test_a_weight_is_prepared_once_and_again_after_a_write(monkeypatch):
    made = []
    original = recipes.gate_first
    monkeypatch.setattr(recipes, "gate_first", lambda *a: made.append(1) or original(*a))
    _, inputs, _, call, sample = prepared_experts()
    made.clear()
    first = call(*inputs).cpu()
    assert torch.allclose(first, CANONICAL_OPS["experts"].reference(*sample.args), atol=ATOL)
    call(*inputs)
    assert len(made) == 2, "w13 and w2, once each"
    addresses = [value.tensor.data_ptr() for value in call._values.values()]
    with torch.no_grad():
        inputs[4].mul_(2)
    assert torch.allclose(call(*inputs).cpu(), 2 * first, atol=ATOL)
    assert len(made) == 3
    assert [value.tensor.data_ptr() for value in call._values.values()] == addresses, "captured graphs hold addresses"


@pytest.mark.npu
def test_a_write_through_data_needs_to_be_told():
    _, inputs, _, call, sample = prepared_experts()
    with torch.inference_mode():
        first = call(*inputs).cpu()
    addresses = [value.tensor.data_ptr() for value in call._values.values()]
    inputs[4].data.mul_(2)
    weights_changed()
    with torch.no_grad():
        assert torch.allclose(call(*inputs).cpu(), 2 * first, atol=ATOL)
    assert [value.tensor.data_ptr() for value in call._values.values()] == addresses
    assert torch.allclose(first, CANONICAL_OPS["experts"].reference(*sample.args), atol=ATOL)


@pytest.mark.npu
def test_a_prepared_weight_goes_with_its_source():
    _, inputs, _, call, _ = prepared_experts()
    call(*inputs)
    assert len(call._values) == 2
    del inputs[3]
    gc.collect()
    assert len(call._values) == 1


def test_weights_as_they_are_need_no_copy():
    gm, inputs, examples, _, _ = prepared_experts(Settings(prepare=False))
    assert len(examples) == len(inputs) and "transpose" in gm.code


@pytest.mark.parametrize("nz", [True, False])
def test_nz_is_cast_once(monkeypatch, nz):
    casts = []

    class Cast:
        """``npu_format_cast``, which the stand-in computes as a copy: formats are its devices' own business."""

        @staticmethod
        def default(weight, acl_format):
            casts.append((tuple(weight.shape), acl_format))
            return weight.clone()

    monkeypatch.setattr(torch.ops.npu, "npu_format_cast", Cast)
    _, inputs, _, call, sample = prepared_experts(Settings(nz=nz))
    casts.clear()
    for _ in range(2):
        assert torch.allclose(call(*inputs).cpu(), CANONICAL_OPS["experts"].reference(*sample.args), atol=1e-4)
    assert casts == ([((8, 64, 96), 29), ((8, 48, 64), 29)] if nz else []), "w13 and w2 as the product reads them"


@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_recipes_give_the_canonical_weight(layout, zeros):
    packed = torch.randint(0, 256, (3, 16, 32), dtype=torch.uint8)
    scale = torch.rand(3, 16, 2)
    zero = torch.randint(0, 16, (3, 16, 2), dtype=torch.uint8) if zeros else None
    want = torch.stack([dequantize_int4(packed[e], scale[e], None if zero is None else zero[e]) for e in range(3)])
    want = recipes.gate_first([want], layout).transpose(1, 2)
    values = unpack_int4(recipes.int4_packed(packed, layout=layout)).float()
    scales = recipes.group_scales(scale, layout=layout).repeat_interleave(32, dim=1)
    offsets = recipes.group_offsets(scale, zero, layout=layout).repeat_interleave(32, dim=1)
    assert torch.equal((values + offsets) * scales, want)


def test_recipes_take_inference_tensors_and_give_ordinary_ones():
    with torch.inference_mode():
        weight, packed = torch.randn(2, 16, 8), torch.randint(0, 256, (2, 16, 32), dtype=torch.uint8)
        scale, zero = torch.rand(2, 16, 2), torch.randint(0, 16, (2, 16, 2), dtype=torch.uint8)
    with torch.no_grad():
        results = [
            recipes.stacked([weight]),
            recipes.stacked([weight], transposed=True),
            recipes.columns([weight[0]]),
            recipes.int4_packed(packed),
            recipes.group_scales(scale),
            recipes.group_offsets(scale),
            recipes.group_offsets(scale, zero),
            recipes.zero_offsets(scale, dtype=torch.float16),
        ]
    assert not any(result.is_inference() for result in results)
