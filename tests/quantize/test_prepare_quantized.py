"""``moe_fx.prepare(model, quantize=...)``: values, memory, compilation, and the blocks that it must leave alone."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from compiling import relative_error
from moe_families import FAMILIES, OTHER_FAMILIES, token_ids
from torch import nn

import moe_fx
import moe_fx.lowering.cpu as cpu
from moe_fx import _C
from moe_fx.errors import MissingToolchainError, OptionError, UnsupportedError
from moe_fx.lowering.cpu.packing import Packer
from moe_fx.lowering.ops import CANONICAL_OPS


def rounded(weight: torch.Tensor, fmt: str, group: int) -> torch.Tensor:
    """A weight [..., N, K] after symmetric rounding to nearest, another way than the engine's."""
    w = weight.detach().double()
    if fmt == "int8":
        step = w.abs().amax(-1, keepdim=True).float().double() / 127
        return torch.round(w / step).clamp(-127, 127) * step
    parts = w.unflatten(-1, (-1, group))
    step = (parts.abs().amax(-1, keepdim=True) / 7).half().double()
    return (torch.round(parts / step).clamp(-7, 7) * step).flatten(-2)


def sites(model, *inputs, **options):
    """``(result, matched and missed experts sites)`` of the model under moe_ascend."""
    reports = []
    options = {"downstream": "eager", "report": reports.append, **options}
    with torch.no_grad():
        result = torch.compile(model, backend="moe_ascend", options=options)(*inputs)
    return result, [site for report in reports for site in report.sites if site.kind == "experts"]


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize(("fmt", "group"), [("int8", 0), ("int4", 32), ("int4", 64)])
def test_experts_compute_with_rounded_weights(fmt, group, activations, zoo, routed):
    experts = zoo.StackedExperts(inter=64).bfloat16()
    want_weights = [rounded(w, fmt, group) for w in (experts.lift, experts.drop)]
    report = moe_fx.prepare(
        zoo.Model(zoo.Layer(experts)).eval(), quantize=fmt, group_size=group or 128, activations=activations
    )
    (block,) = report.prepared
    label = fmt if fmt == "int8" else f"int4 g{group}"
    assert (block.module, block.packed_as, block.activations) == ("layers.0.experts", label, activations)
    x, ids, weights = routed(9)
    got = experts(x, ids, weights)
    want = CANONICAL_OPS["experts"].reference(x.double(), weights.double(), ids, *want_weights)
    assert relative_error(got, want) < (0.01 if activations == "exact" else 0.03)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_families_of_transformers(family):
    model = {**FAMILIES, **OTHER_FAMILIES}[family].build("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and name.endswith("bias"):
                parameter.normal_(std=0.1)
    budget = {**FAMILIES, **OTHER_FAMILIES}[family].budget["experts"]
    modules = {name: m for name, m in model.named_modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))}
    inputs, wanted = {}, {}

    def keep(name):
        def hook(module, args, output):
            inputs[name], wanted[name] = args, output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(token_ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    report = moe_fx.prepare(model, quantize="int8")
    assert len(report.prepared) == budget and not report.left, report
    assert all(block.error < 0.03 for block in report.prepared)
    with torch.no_grad():
        errors = [
            relative_error(model.get_submodule(b.module)(*inputs[b.module]), wanted[b.module]) for b in report.prepared
        ]
        assert max(errors) < 0.03
        eager = model(token_ids(), use_cache=False).logits
        compiled, found = sites(lambda ids: model(ids, use_cache=False).logits, token_ids())
    assert relative_error(compiled, eager) < 2e-2
    assert len(found) == budget and all(site.matched and site.form == "prepared int8" for site in found)


def test_blocks_that_loop_over_a_list(zoo):
    model = zoo.Model(zoo.LoopBlock(), zoo.LoopBlock()).eval().bfloat16()
    x = torch.randn(7, 64).bfloat16()
    with torch.no_grad():
        want = model(x)
        report = moe_fx.prepare(model, quantize="int8", activations="int8")
        got = model(x)
        assert [b.form for b in report.prepared] == ["module list"] * 2
        assert all(block.router for block in report.prepared)
        assert relative_error(got, want) < 0.03
        compiled, found = sites(model, x)
    assert torch.equal(compiled, got)
    assert [(site.form, site.kernel.split(",")[:2]) for site in found] == [
        ("prepared int8", ["engine (int8", " int8 activations"])
    ] * 2


def test_prepared_blocks_can_be_packed(zoo):
    """Their parameters are views of one stack, which must be let go of as a whole."""
    model = zoo.Model(zoo.LoopBlock()).eval()
    assert moe_fx.prepare(model).prepared
    report = moe_fx.prepare(model, quantize="int8")
    assert len(report.prepared) == 1
    assert report.bytes_after < report.bytes_before / 2
    assert not hasattr(model.layers[0], "_moe_fx")


def test_zero_points_serve_weights_off_centre(zoo):
    errors = []
    for zero_points in (False, True):
        torch.manual_seed(0)
        experts = zoo.StackedExperts(inter=64)
        with torch.no_grad():
            experts.lift.abs_()
            experts.drop.abs_()
        report = moe_fx.prepare(zoo.Model(zoo.Layer(experts)), quantize="int4", group_size=32, zero_points=zero_points)
        errors.append(report.blocks[0].error)
        assert report.blocks[0].packed_as == ("int4 g32 zp" if zero_points else "int4 g32")
    assert errors[1] < 0.7 * errors[0]


# --- Compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_runs_packed_experts(zoo, dynamic):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval().bfloat16()
    moe_fx.prepare(model, quantize="int8")
    x = torch.randn(5, 64).bfloat16()
    reports = []
    options = {"report": reports.append}
    with torch.no_grad():
        compiled = torch.compile(model, backend="moe_ascend", fullgraph=True, dynamic=dynamic, options=options)
        assert relative_error(compiled(x), model(x)) < 2e-2
        assert relative_error(compiled(x[:3]), model(x[:3])) < 2e-2
    (site,) = [site for site in reports[0].sites if site.kind == "experts"]
    isa, threads = _C.engine_info()["isa"], torch.get_num_threads()
    assert site.kernel == f"engine (int8, {isa}, {threads} threads)"
    assert len(reports) == (1 if dynamic else 2)


def test_another_backend_sees_one_opaque_op(zoo):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval().bfloat16()
    moe_fx.prepare(model, quantize="int4", group_size=32)
    seen = []

    def spy(gm, inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=spy, fullgraph=True)(x), model(x))
    assert seen.count("moe_fx_cpu.experts_packed.default") == 1


def test_explain_names_the_format(zoo):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval().bfloat16()
    moe_fx.prepare(model, quantize="int4", group_size=32, activations="int8")
    text = " ".join(str(moe_fx.explain(model, torch.randn(5, 64).bfloat16())).split())
    assert "prepared int4 g32" in text
    assert f"engine (int4 g32, int8 activations, {_C.engine_info()['isa']}" in text


# --- Memory and state -------------------------------------------------------------------------------------------------


def test_weights_are_released_and_counted(zoo):
    experts = zoo.StackedExperts(128, 128)
    model = zoo.Model(zoo.Layer(experts, 128)).eval().bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    old = experts.lift
    report = moe_fx.prepare(model, quantize="int8")
    packed = experts.moe_fx_packed
    assert old.numel() == experts.lift.numel() == experts.drop.numel() == 0
    assert (report.bytes_before, report.bytes_after) == (size, model.layers[0].gate.weight.nbytes + packed.nbytes)
    assert size < report.bytes_peak <= size + packed.nbytes
    (block,) = report.prepared
    assert (block.bytes_experts, block.bytes_packed) == (6 * 3 * 128 * 128 * 2, packed.nbytes)
    assert packed.nbytes < 0.6 * block.bytes_experts
    assert "moe_fx_packed" not in " ".join(model.state_dict())
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["packed_as"] == "int8"
    assert "int8, exact activations" in str(report)


def test_packed_experts_stay_when_the_model_moves(zoo):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval()
    moe_fx.prepare(model, quantize="int8")
    experts, x = model.layers[0].experts, torch.randn(4, 64)
    place = experts.moe_fx_packed.data_ptr()
    with torch.no_grad():
        want = model(x)
        model.to(torch.bfloat16)
        assert experts.moe_fx_packed.data_ptr() == place
        assert relative_error(model(x.bfloat16()), want) < 2e-2


def test_copies_are_refused_with_the_way_out(zoo):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts())).eval()
    moe_fx.prepare(model, quantize="int8")
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"moe_fx\.save_packed"):
            attempt(model)


def test_a_block_runs_in_the_dtype_that_it_was_read_in(zoo):
    model = zoo.Model(zoo.LoopBlock()).eval()
    moe_fx.prepare(model, quantize="int8")
    model(torch.randn(3, 64))
    with pytest.raises(UnsupportedError, match=r"rank \[2\] in torch.float32 alone"):
        model.layers[0](torch.randn(1, 3, 64))
    with pytest.raises(UnsupportedError, match=r"before moe_fx\.prepare"):
        model.layers[0](torch.randn(3, 64).bfloat16())


def test_twice_is_once(zoo):
    model = zoo.Model(zoo.Layer(zoo.StackedExperts()), zoo.LoopBlock()).eval()
    assert len(moe_fx.prepare(model, quantize="int8").prepared) == 2
    for again in (moe_fx.prepare(model, quantize="int4", group_size=32), moe_fx.prepare(model)):
        assert [b.reason for b in again.needs_nothing] == ["its experts are already packed"] * 2
        assert not again.left and not again.prepared


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB and steers glibc's allocator")
@pytest.mark.parametrize("kind", ["stacked", "list"])
def test_peak_memory_is_one_block_above_the_model(kind):
    """In a process of its own, by the high-water mark of its memory: 8 blocks of 24 MiB, 48 MiB allowed on top."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": _with_this_folder()}
    program = textwrap.dedent("""
        import resource, sys, torch, conftest, moe_fx

        def layer():
            if sys.argv[1] == "list":
                return conftest.LoopBlock(512, 682 // 2 * 2)
            return conftest.Layer(conftest.StackedExperts(512, 682 // 2 * 2), 512)

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        moe_fx.prepare(conftest.Model(layer()).eval(), quantize="int8")
        model = conftest.Model(*(layer() for _ in range(8))).eval()
        before = peak()
        report = moe_fx.prepare(model, quantize="int8")
        assert len(report.prepared) == 8, report
        print(before, peak(), report.bytes_before >> 20, report.bytes_after >> 20, report.bytes_peak >> 20)
    """)
    done = subprocess.run([sys.executable, "-c", program, kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after, model, packed, peak = map(int, done.stdout.split()[-5:])
    assert 190 <= model <= 200 and 45 <= packed <= 60
    assert peak <= model + 26
    assert after - before <= 48


def _with_this_folder() -> str:
    return os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])


# --- Near misses ------------------------------------------------------------------------------------------------------


def reason(model: nn.Module, **arguments: object) -> str:
    """Why the one block was left; it is checked to be untouched."""
    places = [p.data_ptr() for p in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    report = moe_fx.prepare(model, **{"quantize": "int8", **arguments})
    assert len(report.left) == 1 and not report.prepared, report
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [type(module) for module in model.modules()] == kinds
    assert report.bytes_after == report.bytes_before
    return report.left[0].reason


def test_experts_that_do_more(zoo):
    class Halved(zoo.StackedExperts):
        def forward(self, tokens, chosen, share):
            return super().forward(tokens, chosen, share) * 0.5

    assert reason(zoo.Model(zoo.Layer(Halved()))) == "it does more than its experts' weighted sum"


def test_an_activation_that_nobody_knows(zoo):
    class Odd(zoo.StackedExperts):
        def activated(self, h):
            gate, up = h.chunk(2, dim=-1)
            return torch.atan(gate) * up

    assert "activation" in reason(zoo.Model(zoo.Layer(Odd())))


def test_experts_that_branch_on_values(zoo):
    class Loop(zoo.StackedExperts):
        def forward(self, tokens, chosen, share):
            return super().forward(tokens, chosen, share) if chosen.sum().item() > 0 else tokens

    assert "cannot be captured" in reason(zoo.Model(zoo.Layer(Loop())))


def test_weights_that_are_computed(zoo):
    class Scaled(zoo.StackedExperts):
        def forward(self, tokens, chosen, share):
            lift = self.lift
            self.__dict__["_parameters"] = {**self._parameters, "lift": lift * 2}
            try:
                return super().forward(tokens, chosen, share)
            finally:
                self.__dict__["_parameters"] = {**self._parameters, "lift": lift}

    assert reason(zoo.Model(zoo.Layer(Scaled())))


def test_sizes_that_the_engine_does_not_store(zoo):
    assert "128" in reason(zoo.Model(zoo.Layer(zoo.StackedExperts())), quantize="int4")


def test_values_that_are_not_finite(zoo):
    experts = zoo.StackedExperts()
    with torch.no_grad():
        experts.lift[0, 3, 5] = float("nan")
    assert "relative L2 error" in reason(zoo.Model(zoo.Layer(experts)))


def test_packed_experts_beyond_the_bound(zoo, monkeypatch):
    """Measured, not believed: weights that are packed wrongly stay out."""
    quantize = Packer.quantize
    monkeypatch.setattr(Packer, "quantize", lambda self, e, name, weight: quantize(self, e, name, weight * 0.8))
    why = reason(zoo.Model(zoo.Layer(zoo.StackedExperts(inter=64))), quantize="int4", group_size=64)
    assert "int4 g64 experts differ" in why and "at most 0.3" in why


def test_weights_that_are_not_there_yet(zoo):
    with torch.device("meta"):
        model = zoo.Model(zoo.Layer(zoo.StackedExperts()))
    assert "moe_fx.load_quantized" in reason(model)


def test_a_misread_module_is_noticed(zoo, monkeypatch):
    """Were the reading wrong, the module's own results would tell."""
    from moe_fx.preparation import packable

    read = packable.read_experts_module

    def misread(module, n_experts):
        form = read(module, n_experts)
        return type(form)(**{**vars(form), "attributes": {"act": "gelu"}})

    monkeypatch.setattr(packable, "read_experts_module", misread)
    assert "do not verify" in reason(zoo.Model(zoo.Layer(zoo.StackedExperts())))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int3"}, "quantize='int3' is none of None, 'int8', 'int4'"),
        ({"quantize": "int4", "group_size": 48}, "group_size=48"),
        ({"quantize": "int8", "activations": "fp8"}, "activations='fp8'"),
        ({"quantize": "int8", "zero_points": True}, "zero_points=True is for quantize='int4'"),
        ({"activations": "int8"}, "pass quantize="),
    ],
)
def test_arguments_that_mean_nothing(arguments, message):
    with pytest.raises(OptionError, match=message):
        moe_fx.prepare(nn.Linear(2, 2), **arguments)


def test_without_the_engine(zoo, monkeypatch):
    monkeypatch.setitem(sys.modules, "moe_fx.lowering.cpu.engine", None)
    monkeypatch.delattr(cpu, "engine")
    with pytest.raises(MissingToolchainError, match="reinstall moe-fx"):
        moe_fx.prepare(zoo.Model(zoo.Layer(zoo.StackedExperts())), quantize="int8")
