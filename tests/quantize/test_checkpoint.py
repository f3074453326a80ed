"""``moe_fx.load_quantized``: AWQ, compressed-tensors and int8 checkpoints, written by packers of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiling import relative_error
from safetensors.torch import save_file

import moe_fx
from moe_fx.errors import CheckError, OptionError
from moe_fx.lowering.ops import CANONICAL_OPS

GROUP = 32
NAMES = ("gate_proj", "up_proj", "down_proj")


def awq(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """AutoAWQ's gemm packing: eight columns a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up."""

    def words(columns: torch.Tensor) -> torch.Tensor:
        packed = torch.zeros(columns.shape[0], columns.shape[1] // 8, dtype=torch.int64)
        for position, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed += columns[:, column::8].long() << (4 * position)
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    return {"qweight": words(q.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous().half()}


def packed_int4(q: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' pack-quantized: eight inputs a word, in order; zero points packed along the outputs."""

    def words(nibbles: torch.Tensor) -> torch.Tensor:
        packed = sum(nibbles[:, i::8].long() << (4 * i) for i in range(8))
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    stored = {"weight_packed": words(q), "weight_scale": scales.bfloat16(), "weight_shape": torch.tensor(q.shape)}
    return stored if zeros is None else {**stored, "weight_zero_point": words(zeros.T).T.contiguous()}


def projection(kind: str, outputs: int, inputs: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """``(stored tensors, the weight that they stand for)``, random."""
    if kind == "int8":
        q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scale = (torch.rand(outputs, 1) + 0.5).bfloat16() / 128
        return {"weight": q, "weight_scale": scale}, q.double() * scale.double()
    q = torch.randint(0, 16, (outputs, inputs))
    zeros = torch.randint(4, 12, (outputs, inputs // GROUP))
    # Few mantissa bits, so that bf16 and fp16 hold the scales alike.
    scales = torch.randint(64, 128, (outputs, inputs // GROUP)) / 2**12
    given = None if kind == "int4 symmetric" else zeros
    stored = awq(q, zeros, scales) if kind == "awq" else packed_int4(q, given, scales)
    middle = torch.full_like(zeros, 8) if given is None else zeros
    weight = (q - middle.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1)
    return stored, weight.double()


def write(path: Path, kind: str, prefix: str, names: tuple[str, ...] = NAMES, n_experts: int = 6, hidden: int = 64):
    """A checkpoint of one block of experts in two files; the weights by projection, stacked."""
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(4)}
    weights: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for e in range(n_experts):
        for name in names:
            sizes = (hidden, 32) if name == names[2] else (32, hidden)
            stored, weight = projection(kind, *sizes)
            tensors.update({f"{prefix}.{e}.{name}.{suffix}": tensor for suffix, tensor in stored.items()})
            weights[name].append(weight)
    save(path, tensors)
    return tensors, [torch.stack(weights[name]) for name in names]


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name].contiguous() for name in part}, path / f"model-{i}.safetensors")


def expected(x, ids, routing, gate, up, down):
    w13 = torch.cat((gate, up), dim=1)
    return CANONICAL_OPS["experts"].reference(x.double(), routing.double(), ids, w13, down)


@pytest.mark.parametrize("kind", ["awq", "int4 symmetric", "int4 zero points", "int8"])
@pytest.mark.parametrize("where", ["meta", "random"])
def test_experts_are_the_checkpoints(kind, where, tmp_path, zoo, routed):
    _, weights = write(tmp_path, kind, "model.layers.0.experts")
    with torch.device("meta" if where == "meta" else "cpu"):
        model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval().bfloat16()
    report = moe_fx.load_quantized(model, tmp_path)
    (block,) = report.prepared
    labels = {"awq": "int4 g32 zp", "int4 symmetric": "int4 g32", "int4 zero points": "int4 g32 zp", "int8": "int8"}
    assert block.packed_as == labels[kind] and block.error < 0.01
    experts = model.layers[0].experts
    x, ids, routing = routed(9)
    assert relative_error(experts(x, ids, routing), expected(x, ids, routing, *weights)) < 0.01
    assert model.layers[0].gate.weight.device.type == ("meta" if where == "meta" else "cpu")
    assert experts.lift.numel() == 0 and experts.lift.device.type == "cpu"


def test_int8_activations(tmp_path, zoo, routed):
    _, weights = write(tmp_path, "awq", "layers.0.experts")
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).bfloat16()
    report = moe_fx.load_quantized(model, [*tmp_path.glob("*.safetensors")], activations="int8")
    assert report.prepared[0].activations == "int8"
    x, ids, routing = routed(9)
    got = model.layers[0].experts(x, ids, routing)
    assert 1e-3 < relative_error(got, expected(x, ids, routing, *weights)) < 0.04


def test_experts_in_a_list_keep_their_linears_names(tmp_path, zoo):
    _, (gate, up, down) = write(tmp_path, "awq", "layers.0.experts", names=("w1", "w3", "w2"))
    model = zoo.Model(zoo.LoopBlock()).eval()
    twin = zoo.Model(zoo.LoopBlock()).eval()
    twin.load_state_dict(model.state_dict())
    for e, expert in enumerate(twin.layers[0].experts):
        for linear, weight in ((expert.w1, gate), (expert.w3, up), (expert.w2, down)):
            linear.weight.data = weight[e].float()
    report = moe_fx.load_quantized(model, tmp_path)
    assert [b.packed_as for b in report.prepared] == ["int4 g32 zp"]
    x = torch.randn(12, 64)
    with torch.no_grad():
        assert relative_error(model(x), twin(x)) < 0.01


def test_names_may_be_mapped(tmp_path, zoo):
    write(tmp_path, "int8", "model.layers.0.block_sparse_moe.experts", names=("w1", "w3", "w2"))
    model = zoo.Model(zoo.Layer(zoo.StackedExperts()))
    with pytest.raises(CheckError, match=r"names like model\.layers\.0\.block_sparse_moe\.experts.*rename="):
        moe_fx.load_quantized(model, tmp_path)
    assert moe_fx.load_quantized(model, tmp_path, rename=lambda name: name.replace("block_sparse_moe.", "")).prepared


# --- What is missing or does not fit ----------------------------------------------------------------------------------


def refused(zoo, path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """The error that a changed checkpoint gives; the model is checked to be untouched."""
    save(path, tensors)
    model = zoo.Model(zoo.Layer(zoo.StackedExperts()))
    kinds, sizes = [type(m) for m in model.modules()], [p.shape for p in model.parameters()]
    with pytest.raises(CheckError) as raised:
        moe_fx.load_quantized(model, path)
    assert [type(m) for m in model.modules()] == kinds and [p.shape for p in model.parameters()] == sizes
    return str(raised.value)


P = "layers.0.experts"


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_tensor_is_missing(suffix, tmp_path, zoo):
    tensors, _ = write(tmp_path, "awq", P)
    del tensors[f"{P}.4.up_proj.{suffix}"]
    assert f"lacks {P}.4.up_proj.{suffix}" in refused(zoo, tmp_path, tensors)


def test_a_zero_point_is_missing(tmp_path, zoo):
    tensors, _ = write(tmp_path, "int4 zero points", P)
    del tensors[f"{P}.5.gate_proj.weight_zero_point"]
    assert f"lacks {P}.5.gate_proj.weight_zero_point" in refused(zoo, tmp_path, tensors)


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("awq", "3.down_proj.scales", lambda t: t[:, :-8], "is [1, 56], but the model needs [1, 64]"),
        ("awq", "3.gate_proj.qweight", lambda t: t[:-8], "is [56, 4], but the model needs [64, 4]"),
        ("int8", "2.up_proj.weight", lambda t: t.int(), "is I32, which must be I8"),
        ("int8", "2.up_proj.weight_scale", lambda t: t.expand(-1, 2), "is [32, 2], but the model needs [32, 1]"),
        ("int4 symmetric", "1.up_proj.weight_shape", lambda t: t + 1, "says [33, 65], but the model needs [32, 64]"),
    ],
)
def test_a_tensor_does_not_fit(kind, name, change, message, tmp_path, zoo):
    tensors, _ = write(tmp_path, kind, P)
    tensors[f"{P}.{name}"] = change(tensors[f"{P}.{name}"])
    assert f"{P}.{name} {message}" in refused(zoo, tmp_path, tensors)


def test_one_expert_too_many(tmp_path, zoo):
    tensors, _ = write(tmp_path, "int8", P, n_experts=7)
    assert refused(zoo, tmp_path, tensors) == f"the checkpoint has {P}.6.down_proj, but {P} has 6 experts"


def test_biases_that_the_model_has_no_place_for(tmp_path, zoo):
    tensors, _ = write(tmp_path, "int8", P)
    tensors[f"{P}.0.up_proj.bias"] = torch.zeros(32)
    assert "have no biases" in refused(zoo, tmp_path, tensors)


def test_inputs_in_another_order(tmp_path, zoo):
    tensors, _ = write(tmp_path, "int4 symmetric", P)
    tensors[f"{P}.0.up_proj.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert "reorders its inputs" in refused(zoo, tmp_path, tensors)


def test_weights_that_are_not_quantised(tmp_path, zoo):
    tensors = {f"{P}.{e}.{name}.weight": torch.zeros(4, 4) for e in range(6) for name in NAMES}
    assert f"it has {P}.0.down_proj.weight" in refused(zoo, tmp_path, tensors)


def test_no_experts_at_all(tmp_path, zoo):
    assert "it holds no experts at all" in refused(zoo, tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_a_file_that_is_cut_short(tmp_path, zoo):
    write(tmp_path, "int8", P)
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckError, match=r"model-1\.safetensors is no whole safetensors file"):
        moe_fx.load_quantized(zoo.Model(zoo.Layer(zoo.StackedExperts())), tmp_path)


def test_no_file(tmp_path, zoo):
    with pytest.raises(OptionError, match="holds no safetensors file"):
        moe_fx.load_quantized(zoo.Model(), tmp_path)
    with pytest.raises(OptionError, match="is not there"):
        moe_fx.load_quantized(zoo.Model(), tmp_path / "gone.safetensors")
