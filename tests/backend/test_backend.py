"""The backend as a whole: modes of compilation, gradients, mutation, isolation, artifacts, strictness, live check."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings

import moe_blocks as blocks
import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from moe_blocks import Block, H
from torch import nn

import moe_fx
from moe_fx import backend
from moe_fx.errors import CheckError, MoeFxWarning
from moe_fx.passes import Miss, Pass


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_modes(fullgraph, dynamic, guard):
    block = Block(blocks.batched)
    compiled = compile_with_report(block, dynamic=dynamic, fullgraph=fullgraph)
    for tokens in (6, 9, 1):
        x = torch.randn(tokens, H)
        with guard():
            assert relative_error(compiled.fn(x), block(x)) < 1e-5
    assert all(r.count("experts") == 1 for r in compiled.reports)


def test_mark_dynamic():
    block, compiled = Block(blocks.batched), None
    compiled = compile_with_report(block, dynamic=None)
    for tokens in (5, 8, 13):
        x = torch.randn(tokens, H)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert relative_error(compiled(x), block(x)) < 1e-5
    assert len(compiled.reports) == 1 and compiled.counts == dict(router=1, experts=1)


def test_graph_that_needs_gradients_runs_unfused_with_one_warning():
    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block)
    with pytest.warns(MoeFxWarning, match="needs gradients.*torch.no_grad"):
        out = compiled.fn(x)
    out.sum().backward()
    assert block.weights.w13.grad is not None
    assert compiled.counts == {} and "inference-only" in compiled.reports[0].unfused_reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled.fn(x)  # compiled already: not said again


def test_mutated_inputs_keep_their_semantics():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(blocks.batched)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x, cache):
            y = self.block(x)
            cache[:, : x.shape[0]] = y.t()
            self.count += 1
            return y, cache, cache[:, :2] * 2

    model, x = Cached(), torch.randn(6, H)
    compiled = compile_with_report(model)
    cache, want_cache = torch.zeros(H, 8), torch.zeros(H, 8)
    with torch.no_grad():
        want = model(x, want_cache)
    got = compiled(x, cache)
    assert got[1] is cache, "an output that is the mutated input stays that input"
    torch.testing.assert_close(cache, want_cache)
    torch.testing.assert_close(got[2], want[2])
    assert model.count == 2
    assert compiled.counts == dict(router=1, experts=1)


def test_inplace_scatter_of_an_unused_result_survives():
    """In dynamo's graph an in-place method's result is unused; capture must not take it for dead code."""

    def fn(x):
        mask = torch.zeros_like(x)
        mask.scatter_(1, x.argmax(-1, keepdim=True), 1)
        return mask

    x = torch.randn(3, 5)
    compiled = compile_with_report(fn)
    assert torch.equal(compiled(x), fn(x))


def test_float_attribute_is_guarded():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.weight = 1e-6, nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    model, x = Norm(), torch.randn(4, 8)
    compiled = compile_with_report(model, dynamic=True)
    for eps in (1e-6, 10.0):
        model.eps = eps
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    (first, second) = compiled.ops("rms_norm")
    assert (first.args[2], second.args[2]) == (1e-6, 10.0)


@pytest.mark.parametrize("downstream", ["eager", "aot_eager", "inductor"])
def test_a_float_that_dynamo_makes_symbolic_costs_no_second_compilation(downstream, monkeypatch):
    class Scaled(Block):
        scale = 2.0

        def forward(self, x):
            return super().forward(x) * self.scale

    exports, original = [], backend.export
    monkeypatch.setattr(backend, "export", lambda *args: exports.append(1) or original(*args))
    model, x = Scaled(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(model, dynamic=True, downstream=downstream, cache=False)
    for model.scale in (2.0, 3.0):
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 1e-5
    assert len(exports) == len(compiled.reports) == 2


@pytest.mark.filterwarnings("ignore:moe_ascend. a graph runs unfused")
def test_floats_stay_symbolic_in_a_graph_that_runs_as_it_is():
    def scaled(x, scale):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T * scale

    compiled, x = compile_with_report(scaled, dynamic=True, downstream="aot_eager"), torch.randn(6, H)
    for scale in (2.0, 3.0):
        torch.testing.assert_close(compiled(x, scale), scaled(x, scale))
    (report,) = compiled.reports
    assert "autocast region" in report.unfused_reason


def test_two_models_in_one_process_do_not_meet():
    small, large = Block(blocks.batched), Block(blocks.biased_interleaved)
    compiled = [compile_with_report(m) for m in (small, large)]
    for _ in range(2):
        for model, run in zip((small, large), compiled, strict=True):
            x = torch.randn(6, H)
            with torch.no_grad():
                assert relative_error(run(x), model(x)) < 1e-5
    assert "act" not in compiled[0].ops("experts")[0].kwargs
    assert compiled[1].ops("experts")[0].kwargs["act"] == "swiglu_oai"


def test_another_backend_is_untouched():
    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block)
    seen = []

    def other(gm, inputs):
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    with torch.no_grad():
        want = torch.compile(block, backend=other)(x)
    assert relative_error(compiled(x), want) < 1e-5
    assert not any("moe_fx" in name for name in seen)


def test_metadata_survives():
    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block)
    compiled(x)
    for node in compiled.reports[0].graph.graph.nodes:
        if node.op == "call_function":
            assert node.meta.get("val") is not None, node
            assert "stack_trace" in node.meta, node
    for site in compiled.reports[0].matched:
        assert "moe_blocks.py:" in site.source


def test_compiling_in_threads():
    models = [Block(f) for f in (blocks.batched, blocks.grouped, blocks.dense_bmm, blocks.masked_loop)]
    errors, results = [], {}

    def work(i):
        try:
            x = torch.randn(6, H, generator=torch.Generator().manual_seed(i))
            run = compile_with_report(models[i])
            with torch.no_grad():
                results[i] = relative_error(run(x), models[i](x)), run.counts
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(error < 2e-2 and counts == dict(router=1, experts=1) for error, counts in results.values())


@pytest.mark.slow
def test_no_growth_over_50_recompiles():
    """Nothing of a compilation outlives it: no graphs, no FakeTensors pile up."""

    def once():
        block, x = Block(blocks.batched), torch.randn(6, H)
        with torch.no_grad():
            torch.compile(block, backend="moe_ascend", options={"downstream": "eager"})(x)
        torch._dynamo.reset()
        # Whatever the backend, PyTorch keeps the inputs' FakeTensors of dozens of compilations if nobody collects.
        gc.collect()

    def census():
        # Each compilation has modes of its own, which its FakeTensors keep. These are not counted themselves: there are
        # dozens in a compilation, and PyTorch's caches keep one for a while.
        return sum(isinstance(o, (torch.fx.GraphModule, torch._subclasses.FakeTensorMode)) for o in gc.get_objects())

    for _ in range(5):
        once()
    before = census()
    for _ in range(50):
        once()
    # Those caches settle by a handful of objects; a leak is at least one object per recompile.
    assert census() < before + 25


def test_entry_point_needs_no_import():
    script = (
        "import torch; assert 'moe_ascend' in torch._dynamo.list_backends();"
        "f = torch.compile(torch.nn.Linear(2, 2), backend='moe_ascend', options={'downstream': 'eager'});\n"
        "with torch.no_grad(): print(f(torch.ones(1, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2])" in done.stdout


def test_nothing_matched_is_a_warning():
    with pytest.warns(MoeFxWarning, match="nothing in graph.*moe_fx.explain"):
        compile_with_report(nn.Linear(4, 4))(torch.ones(1, 4))


def test_experts_outside_the_graph_are_named_with_the_fix():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = blocks.Weights()

        def forward(self, x):
            w, ids = blocks.softmax_router(self.weights, x)
            y = torch.zeros_like(x)
            for e in ids.unique().tolist():
                token, slot = torch.where(ids == e)
                y[token] += w[token, slot, None] * blocks._expert(self.weights, e, x[token])
            return y

    loop, x = Loop(), torch.randn(6, H)
    compiled = compile_with_report(loop)
    with pytest.warns(MoeFxWarning, match="could not be captured.*moe_fx.prepare"):
        got = compiled(x)
    with torch.no_grad():
        assert relative_error(got, loop(x)) < 1e-5
    assert any("moe_fx.prepare(model)" in reason for reason in compiled.reasons)


def odd_router(m, x):
    return torch.topk(torch.sin(x @ m.gate.t()), blocks.K)


def test_strict_raises_and_names_the_site():
    compiled = compile_with_report(Block(blocks.batched, odd_router), strict=True)
    with pytest.raises(Exception, match=r"strict: these sites were not fused:\s+router at .*neither a known score"):
        compiled(torch.randn(6, H))


def test_dump_dir(tmp_path):
    compile_with_report(Block(blocks.batched), dump_dir=str(tmp_path))(torch.randn(6, H))
    (folder,) = tmp_path.iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert "00_captured.txt" in names and any(n.endswith("experts.diff") for n in names) and "report.txt" in names
    assert "+%experts" in next(folder.glob("*_experts.diff")).read_text()
    assert "aten.bmm" in (folder / "00_captured.txt").read_text()


def test_structured_trace_and_logs(tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'tests/support')\n"
        "import torch, moe_blocks as b\n"
        "f = torch.compile(b.Block(b.batched), backend='moe_ascend', options={'downstream': 'eager'})\n"
        "with torch.no_grad(): f(torch.randn(6, b.H))\n"
    )
    environment = {"TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+moe_fx", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "+%experts" in done.stderr, "diffs reach TORCH_LOGS"
    assert any("moe_fx_00_captured" in p.read_text() for p in tmp_path.iterdir())


def test_check_passes_on_a_good_model_and_dumps_a_bad_one(tmp_path, monkeypatch):
    block, x = Block(blocks.batched), torch.randn(6, H)
    good = compile_with_report(block, check=True, check_dir=str(tmp_path))
    good(x)
    assert list(tmp_path.iterdir()) == []

    class Wrong(Pass):
        """Replaces tanh by a canonical op that computes something else."""

        name = "wrong"

        def run(self, ctx):
            for node in ctx.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
                new = ctx.emit_op("rms_norm", (node.args[0], None, 1e-6), {}, like=node)
                ctx.replace(node, new)
                ctx.matched("norm", node, new, form="wrong", replaced=[node])
            ctx.finish_pass()

    bad = compile_with_report(lambda x: F.tanh(x) + 1, check=True, check_dir=str(tmp_path), extra_passes=[Wrong()])
    with pytest.raises(CheckError, match=r"moe_fx.rms_norm at .*relative L2 error") as raised:
        bad(x)
    script = str(raised.value).rsplit(" ", 1)[-1]
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "relative L2 error" in done.stdout, done.stderr


def test_check_compares_expert_sets():
    from moe_fx.check import compare_outputs

    weights, ids = torch.tensor([[0.6, 0.4]]), torch.tensor([[1, 2]], dtype=torch.int32)
    assert compare_outputs("route", (weights.flip(1), ids.flip(1)), (weights, ids.long())) == ""
    assert "other experts for 1 of 1 tokens" in compare_outputs("route", (weights, ids + 1), (weights, ids.long()))
    assert "weights" in compare_outputs("route", (weights.flip(1), ids), (weights, ids.long()))


def test_own_pass_is_scoped_to_its_compilation():
    class DropTanh(Pass):
        """Replaces tanh by relu (wrong on purpose: its effect must show here and nowhere else)."""

        name = "drop_tanh"

        def run(self, ctx):
            for node in ctx.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
                ctx.replace(node, ctx.emit(torch.ops.aten.relu.default, node.args, like=node))
                ctx.missed("tanh", node, Miss("was a tanh"))
            ctx.finish_pass()

    def fn(x):
        return x.tanh() + 1

    x = torch.randn(5)
    with_pass = compile_with_report(fn, extra_passes=[DropTanh()])
    without = compile_with_report(fn)
    assert torch.equal(with_pass(x), x.relu() + 1)
    assert torch.equal(without(x), fn(x))
    assert with_pass.reasons == ["tanh: was a tanh"] and without.reasons == []
    assert len(DropTanh().identity()) == 64


def test_a_crashing_pass_costs_the_fusion_not_the_model():
    class Crash(Pass):
        """Fails."""

        name = "crash"

        def run(self, ctx):
            raise KeyError("oops")

    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block, extra_passes=[Crash()])
    with pytest.warns(MoeFxWarning, match="runs unfused.*KeyError.*report it"):
        got = compiled(x)
    with torch.no_grad():
        assert torch.equal(got, block(x))
    with pytest.raises(Exception, match="oops"):
        compile_with_report(block, extra_passes=[Crash()], strict=True)(x)


def test_autocast_region_is_captured():
    block, x = Block(blocks.batched), torch.randn(6, H)
    compiled = compile_with_report(block)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = block(x), compiled(x)
    assert got.dtype == want.dtype and relative_error(got, want) < 2e-2


def test_public_names_resolve():
    for name in moe_fx.__all__:
        assert getattr(moe_fx, name) is not None
    with pytest.raises(AttributeError, match="it exports"):
        moe_fx.no_such_name  # noqa: B018


def test_a_graph_that_cannot_be_exported_runs_unfused():
    """vmap inside the graph defeats the pre-dispatch export; nothing of it may stay behind in functorch."""

    def fn(x):
        return torch.vmap(lambda row: row.sin() + 1)(x)

    x = torch.randn(3, 4)
    compiled = compile_with_report(fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled(x)
    assert torch.equal(got, fn(x))
    if compiled.reports[0].unfused_reason:
        assert any("runs unfused" in str(w.message) for w in caught)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
