"""``moe_fx.save_packed`` and ``moe_fx.load_packed``: a second start packs nothing, and files that do not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moe_fx
from moe_fx.errors import CheckError, UnsupportedError
from moe_fx.lowering.cpu import packing


@pytest.fixture
def saved(tmp_path, zoo):
    """``(path, model)`` of two layers of different kinds."""
    model = zoo.Model(zoo.Layer(zoo.StackedExperts()), zoo.LoopBlock()).eval()
    moe_fx.prepare(model, quantize="int4", group_size=32, activations="int8", zero_points=True)
    moe_fx.save_packed(model, tmp_path / "experts.safetensors")
    return tmp_path / "experts.safetensors", model


def new_model(zoo, model):
    """A model of the same architecture: stacked experts on the meta device, everything else as in ``model``."""
    fresh = zoo.Model(zoo.Layer(zoo.StackedExperts()), zoo.LoopBlock()).eval()
    fresh.layers[0].experts.to("meta")
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if v.numel()}, strict=False)
    return fresh


def mapped_files(address: int) -> str:
    """The file that is mapped at an address, if one is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
    return ""


@pytest.mark.parametrize("copy", [False, True], ids=["mapped", "copied"])
def test_a_second_start_gives_the_same_results(copy, saved, zoo, monkeypatch):
    path, model = saved
    fresh, x = new_model(zoo, model), torch.randn(9, 64)
    # Nothing is packed again.
    monkeypatch.delattr(packing.Packer, "quantize")
    report = moe_fx.load_packed(fresh, path, copy=copy)
    assert [(b.module, b.packed_as, b.activations) for b in report.prepared] == [
        ("layers.0.experts", "int4 g32 zp", "int8"), ("layers.1", "int4 g32 zp", "int8"),
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    for module in (fresh.layers[0].experts, fresh.layers[1]):
        assert (mapped_files(module.moe_fx_packed.data_ptr()) == str(path)) is not copy


def test_the_file_is_plain_safetensors_on_pages(saved):
    path, model = saved
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["layers.0.experts", "layers.1"]
        assert torch.equal(file.get_tensor("layers.1"), model.layers[1].moe_fx_packed)
        blocks = json.loads(file.metadata()["blocks"])
    assert blocks["layers.1"]["packed"]["group"] == 32
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0


def test_loaded_experts_can_be_saved_again(saved, zoo, tmp_path):
    path, model = saved
    fresh = new_model(zoo, model)
    moe_fx.load_packed(fresh, path)
    moe_fx.save_packed(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_at_odd_addresses_is_copied(saved, zoo, tmp_path):
    """As safetensors' own writer lays it out, without padding."""
    path, model = saved
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["a"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, tmp_path / "moved.safetensors", metadata)
    fresh, x = new_model(zoo, model), torch.randn(9, 64)
    moe_fx.load_packed(fresh, tmp_path / "moved.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


# --- Files that do not belong -----------------------------------------------------------------------------------------


def refused(model, path) -> str:
    """The error; the model is checked to be untouched."""
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(CheckError) as raised:
        moe_fx.load_packed(model, path)
    assert [type(module) for module in model.modules()] == kinds
    return str(raised.value)


def test_a_file_that_is_cut_short(saved, zoo):
    path, model = saved
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is no whole safetensors file" in refused(new_model(zoo, model), path)


def test_a_damaged_header(saved, zoo):
    path, model = saved
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 8] = b"\0" * 8
    path.write_bytes(data)
    assert "layers.0.experts is damaged" in refused(new_model(zoo, model), path)


def test_another_safetensors_file(zoo, tmp_path):
    save_file({"layers.0.experts": torch.zeros(8192, dtype=torch.uint8)}, tmp_path / "other.safetensors")
    assert "holds no packed experts" in refused(zoo.Model(zoo.LoopBlock()).eval(), tmp_path / "other.safetensors")


def test_a_file_of_another_version(saved, zoo):
    path, model = saved
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version": "1"', b'"version": "9"'))
    assert "is of version 9" in refused(new_model(zoo, model), path)


def test_no_file(zoo, tmp_path):
    assert "is not there" in refused(zoo.Model(zoo.LoopBlock()).eval(), tmp_path / "gone.safetensors")


def test_a_model_of_other_sizes(saved, zoo):
    path, _ = saved
    other = zoo.Model(zoo.Layer(zoo.StackedExperts(inter=64)), zoo.LoopBlock()).eval()
    assert "of another model: intermediate 32 instead of 64" in refused(other, path)


def test_a_model_of_other_activations(saved, zoo):
    class Gelu(zoo.StackedExperts):
        def activated(self, h):
            gate, up = h.chunk(2, dim=-1)
            return torch.nn.functional.gelu(gate) * up

    path, _ = saved
    assert "'act': 'gelu'" in refused(zoo.Model(zoo.Layer(Gelu()), zoo.LoopBlock()).eval(), path)


def test_a_model_without_one_of_the_blocks(saved, zoo):
    path, _ = saved
    assert "holds the experts of layers.1" in refused(zoo.Model(zoo.Layer(zoo.StackedExperts())).eval(), path)


def test_a_model_with_more_blocks_keeps_them(saved, zoo):
    path, _ = saved
    model = zoo.Model(zoo.Layer(zoo.StackedExperts()), zoo.LoopBlock(), zoo.LoopBlock()).eval()
    report = moe_fx.load_packed(model, path)
    assert len(report.prepared) == 2
    assert [b.module for b in report.left] == ["layers.2"] and "does not hold" in report.left[0].reason


def test_nothing_to_save(zoo, tmp_path):
    with pytest.raises(UnsupportedError, match=r"prepare\(model, quantize="):
        moe_fx.save_packed(zoo.Model(zoo.LoopBlock()), tmp_path / "x.safetensors")


def test_a_file_is_saved_over_itself_while_it_is_mapped(saved, zoo):
    """What is written are pages of the very file of that name."""
    path, model = saved
    before = path.read_bytes()
    fresh, x = new_model(zoo, model), torch.randn(9, 64)
    moe_fx.load_packed(fresh, path)
    moe_fx.save_packed(fresh, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("scales", "weight", "complaint"),
    [
        (torch.ones(2), torch.zeros(32, 64, dtype=torch.int8), "scales must be"),
        (torch.ones(32), torch.zeros(32, 64, dtype=torch.uint8), "weights must be"),
    ],
    ids=["scales", "dtype"],
)
def test_operands_that_do_not_fit_never_reach_the_engine(scales, weight, complaint):
    packer = packing.Packer(packing.PackedSpec("int8", 1, 64, 32, True, 0, False, True, 1))
    with pytest.raises(ValueError, match=complaint):
        packer.int8(0, "gate", weight, scales)
    with pytest.raises(ValueError, match="biases must be"):
        packer.bias(0, "gate", torch.ones(3))
