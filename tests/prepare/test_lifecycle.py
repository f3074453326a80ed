"""What a prepared model still is: the same parameters, eager results and memory, movable, copyable, trainable."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import moe_fx
from moe_fx.errors import MoeFxWarning


def storages(model: nn.Module) -> int:
    """Bytes of all distinct storages behind the parameters."""
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_parameters_state_and_results_are_unchanged(zoo):
    model = zoo.Model(zoo.MaskedLoop(), zoo.HitLoop()).eval()
    identities = {name: id(p) for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size, x = storages(model), torch.randn(2, 5, 32)
    wanted = model(x)
    report = moe_fx.prepare(model)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), wanted)
    assert storages(model) == size
    assert report.bytes_before == report.bytes_after
    assert isinstance(model.blocks[0], zoo.MaskedLoop) and type(model.blocks[0]).__name__ == "MaskedLoop"


def test_gradients_still_flow_in_eager(zoo):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    model(torch.randn(1, 9, 32)).sum().backward()
    assert model.blocks[0].experts[0].lift.weight.grad is not None


def test_twice_is_once(zoo):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    stack, kind = model.blocks[0]._moe_fx.w13, type(model.blocks[0])
    again = moe_fx.prepare(model)
    assert [b.reason for b in again.needs_nothing] == ["it is already prepared"]
    assert model.blocks[0]._moe_fx.w13 is stack and type(model.blocks[0]) is kind


def test_two_models_do_not_meet(zoo, fused):
    first, second = zoo.Model(zoo.MaskedLoop()).eval(), zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(first)
    assert type(second.blocks[0]) is zoo.MaskedLoop
    moe_fx.prepare(second)
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(first)[0](x), first(x))
        torch.testing.assert_close(fused(second)[0](x), second(x))
        assert not torch.equal(first(x), second(x))


def test_another_backend_sees_the_original(zoo, fused):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    x = torch.randn(1, 7, 32)
    targets = []

    def spy(gm, inputs):
        targets.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    with torch.no_grad():
        wanted = model(x)
        fused(model)[0](x)
        assert torch.equal(torch.compile(model, backend=spy)(x), wanted)
    assert targets and not any("moe_fx" in target for target in targets)


def test_moving_prepares_again(zoo, fused):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    compiled, reports = fused(model)
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        compiled(x)
        size = storages(model)
        model.to(torch.bfloat16)
        assert storages(model) == size // 2
        assert model.blocks[0]._moe_fx.w13.dtype == torch.bfloat16
        torch.testing.assert_close(compiled(x.bfloat16()), model(x.bfloat16()), rtol=2e-2, atol=2e-2)
    assert len(reports) == 2


def test_loading_in_place_and_by_assignment(zoo, fused):
    model, other = zoo.Model(zoo.MaskedLoop()).eval(), zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    compiled, _ = fused(model)
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        compiled(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
        fresh = zoo.Model(zoo.MaskedLoop()).eval()
        model.load_state_dict({k: v.clone() for k, v in fresh.state_dict().items()}, assign=True)
        torch.testing.assert_close(compiled(x), fresh(x))


def test_copies_and_pickles_are_unprepared(zoo):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    x = torch.randn(1, 7, 32)
    twin = copy.deepcopy(model)
    assert type(twin.blocks[0]) is zoo.MaskedLoop and not hasattr(twin.blocks[0], "_moe_fx")
    assert torch.equal(twin(x), model(x))
    assert moe_fx.prepare(twin).prepared
    with io.BytesIO() as file:
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert torch.equal(torch.load(file)["blocks.0.experts.0.lift.weight"], model.blocks[0].experts[0].lift.weight)


def test_replaced_parameters_are_noticed_while_tracing(zoo):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    lift = model.blocks[0].experts[2].lift
    lift.weight = nn.Parameter(torch.randn_like(lift.weight))
    x = torch.randn(1, 40, 32)
    with torch.no_grad(), pytest.warns(MoeFxWarning, match=r"replaced after moe_fx.prepare.*call moe_fx.prepare"):
        got = torch.compile(model, backend="moe_ascend", options={"downstream": "eager"})(x)
        torch.testing.assert_close(got, model(x))
    assert moe_fx.prepare(model).prepared


def test_gradients_wanted_while_tracing_run_the_original(zoo):
    model = zoo.Model(zoo.MaskedLoop()).eval()
    moe_fx.prepare(model)
    compiled = torch.compile(model, backend="moe_ascend", options={"downstream": "eager"})
    with pytest.warns(MoeFxWarning, match="needs gradients"):
        compiled(torch.randn(1, 9, 32)).sum().backward()
    assert model.blocks[0].experts[0].lift.weight.grad is not None


def test_another_mode_than_recorded_runs_the_original(zoo):
    def make():
        return nn.Sequential(zoo.GatedMlp(), nn.Dropout(0.5))

    model = zoo.Model(zoo.MaskedLoop(make)).eval()
    assert moe_fx.prepare(model).prepared
    model.train()
    x = torch.randn(1, 9, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeFxWarning)
        compiled = torch.compile(model, backend="moe_ascend", options={"downstream": "eager"})
        assert not torch.equal(compiled(x), compiled(x))


def test_module_and_function_share_a_name():
    import moe_fx.preparation.report  # binds the package in moe_fx, where the function is exported

    assert not moe_fx.prepare(nn.Linear(2, 2)).blocks


def test_report_prints_and_is_plain_data(zoo):
    block = zoo.MaskedLoop()
    block.experts[3].act = nn.GELU()
    report = moe_fx.prepare(zoo.Model(zoo.BiasedGroups(), block).eval())
    text = str(report)
    assert "1 prepared, 0 need nothing, 1 left" in text
    assert "blocks.0 (BiasedGroups): E=8 k=2 silu" in text and "score=sigmoid" in text
    assert "blocks.1 (MaskedLoop): left as it was: experts.3 differs" in text
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["router"]["n_group"] == 4
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=200)
    console.print(report)
    assert "BiasedGroups" in console.file.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB and steers glibc's allocator")
def test_peak_memory_is_one_block_above_the_model():
    """In a process of its own, by the high-water mark of its memory: 8 blocks of 24 MiB, 48 MiB allowed on top."""
    # Freed tensors go back to the system at once instead of staying in the heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    program = textwrap.dedent("""
        import resource, torch
        from torch import nn
        import torch.nn.functional as F
        import torch._dynamo, moe_fx, moe_fx.preparation.install

        class Mlp(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(512, 512, bias=False) for _ in range(3))
            def forward(self, x):
                return self.c(F.silu(self.a(x)) * self.b(x))

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Linear(512, 8)
                self.experts = nn.ModuleList(Mlp() for _ in range(8))
            def forward(self, x):
                w, ids = self.gate(x).softmax(-1).topk(2)
                out = torch.zeros_like(x)
                for e, expert in enumerate(self.experts):
                    row, slot = torch.where(ids == e)
                    out.index_add_(0, row, expert(x[row]) * w[row, slot, None])
                return out

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        moe_fx.prepare(Block().eval())
        model = nn.Sequential(*(Block() for _ in range(8))).eval()
        before = peak()
        report = moe_fx.prepare(model)
        assert len(report.prepared) == 8
        stacked = sum(block.bytes_stacked for block in report.blocks)
        print(before, peak(), report.bytes_peak - report.bytes_before >> 20, stacked >> 20)
    """)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after, one_block, all_blocks = map(int, done.stdout.split())
    assert (one_block, all_blocks) == (24, 192)
    assert after - before <= 2 * one_block
