"""Tensor parallelism survives the passes: every site still matches on shards, every collective stays once, in place."""

from __future__ import annotations

import copy

import moe_blocks as blocks
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from moe_families import FAMILIES, token_ids
from tensor_parallel import RANKS, on_two_ranks, rank_zero, shard
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moe_fx.passes.graph import is_collective, module_path, peel, source_line

pytestmark = pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
H, I, DTYPE = 16, 24, torch.float32  # noqa: E741


@pytest.fixture
def mesh():
    with rank_zero() as mesh:
        yield mesh


def graph_of(compiled):
    (report,) = compiled.reports
    assert report.unfused_reason == ""
    return report.graph.graph


def op(node):
    return str(node.target).split(".")[1]


def collectives(compiled):
    """Names of the collectives in graph order, waits left out; each is waited for once, by its only user."""
    found = [n for n in graph_of(compiled).nodes if is_collective(n) and op(n) != "wait_tensor"]
    for node in found:
        (user,) = node.users
        assert op(user) == "wait_tensor"
    return [op(n) for n in found]


def reduced(compiled):
    """(op, module) that made each all-reduced value, in graph order."""
    reductions = [n for n in graph_of(compiled).nodes if is_collective(n) and op(n) == "all_reduce"]
    return [(op(n.args[0]), module_path(n.args[0])) for n in reductions]


# --- transformers' models, sharded by their own plans -----------------------------------------------------------------

# gpt-oss has no such plan, only one for expert parallelism.
PLANNED = [name for name in FAMILIES if name != "gpt_oss"]


@pytest.mark.parametrize("name", PLANNED)
def test_sharded_family_meets_the_budget_of_the_whole_one(name, mesh, tmp_path):
    compiled = compile_with_report(shard(FAMILIES[name].build(), mesh), dump_dir=str(tmp_path))
    compiled(token_ids(), use_cache=False)
    assert compiled.counts == FAMILIES[name].budget
    assert compiled.reasons == []
    captured = next(tmp_path.rglob("*captured*")).read_text()
    written = [line.split("_c10d_functional.")[1].split("(")[0] for line in captured.splitlines() if "_c10d" in line]
    assert collectives(compiled) == [name for name in written if name != "wait_tensor"]
    assert {made_by for made_by, _ in reduced(compiled)} <= {"linear", "experts"}
    assert sum(made_by == "experts" for made_by, _ in reduced(compiled)) == FAMILIES[name].budget["experts"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_collectives_stay_where_the_plan_put_them(implementation, dynamic, mesh):
    compiled = compile_with_report(shard(FAMILIES["qwen3_moe"].build(implementation), mesh), dynamic=dynamic)
    compiled(token_ids(), use_cache=False)
    layers = [f"model.layers.{i}" for i in range(2)]
    parts = (("linear", "self_attn.o_proj"), ("experts", "mlp.experts"))
    assert reduced(compiled) == [(made_by, f"{layer}.{part}") for layer in layers for made_by, part in parts]
    assert len(compiled.ops("add_rms_norm")) == 4
    for node in compiled.ops("add_rms_norm"):
        assert any(is_collective(peel(x)) for x in node.args[:2])
    for node in compiled.ops("experts"):
        assert [x.meta["val"].shape[1:] for x in node.args[3:5]] == [(32, 64), (64, 16)]  # Shards of I = 32.


# --- Hand-written blocks over shards, as engines have them ------------------------------------------------------------


def in_place(x):
    dist.all_reduce(x)
    return x


def functional(x):
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


REDUCTIONS = dict(in_place=in_place, functional=functional)


class Layer(nn.Module):
    """A row-parallel output projection and experts of a sharded width, with the two norms around them."""

    def __init__(self, forward, reduce=in_place):
        super().__init__()
        self.weights = blocks.Weights()
        self.out = nn.Linear(blocks.H, blocks.H, bias=False)
        self.norm, self.last = nn.RMSNorm(blocks.H, eps=1e-6), nn.RMSNorm(blocks.H, eps=1e-6)
        self.reduce, self.layer = reduce, forward

    def experts(self, x):
        return blocks.batched(self.weights, x, *blocks.softmax_router(self.weights, x))

    def forward(self, x):
        return self.layer(self, x)


def layer(m, x):
    x = x + m.reduce(m.out(x))
    y = m.reduce(m.experts(m.norm(x)))
    x = x + y
    return m.last(x), x


def compile_layer(forward, reduce=in_place):
    module, x = Layer(forward, reduce), torch.randn(6, blocks.H)
    with torch.no_grad():
        want = module(x.clone())
    compiled = compile_with_report(module)
    for one, other in zip(compiled(x), want, strict=True):
        assert relative_error(one, other) <= 1e-6
    return compiled


@pytest.mark.parametrize("name", REDUCTIONS)
def test_layer_over_shards(name, mesh):
    compiled = compile_layer(layer, REDUCTIONS[name])
    assert compiled.counts == dict(router=1, experts=1, norm=2)
    assert [made_by for made_by, _ in reduced(compiled)] == ["linear", "experts"]
    assert collectives(compiled) == ["all_reduce"] * 2
    for node in compiled.ops("add_rms_norm"):
        assert sum(is_collective(n) for n in node.args[:2]) == 1
    assert len(compiled.ops("add_rms_norm")) == 2


def test_one_reduction_for_routed_and_shared_experts(mesh):
    def forward(m, x):
        h = m.norm(x)
        return m.last(x + m.reduce(m.experts(h) + m.out(h))), x

    compiled = compile_layer(forward)
    assert compiled.counts == dict(router=1, experts=1, norm=2)
    assert reduced(compiled)[0][0] == "add" and collectives(compiled) == ["all_reduce"]


def test_residual_that_is_added_before_the_reduction_stays_before_it(mesh):
    def forward(m, x):
        y = m.reduce(x + m.experts(m.norm(x)))
        return m.last(y), y

    compiled = compile_layer(forward)
    assert compiled.counts == dict(router=1, experts=1, norm=2)
    assert compiled.ops("add_rms_norm") == []
    assert [made_by for made_by, _ in reduced(compiled)] == ["add"]


def test_norm_of_partial_sums_stays_before_the_reduction(mesh):
    def forward(m, x):
        return m.reduce(m.last(x + m.experts(m.norm(x)))), x

    compiled = compile_layer(forward)
    (reduction,) = [n for n in graph_of(compiled).nodes if is_collective(n) and op(n) == "all_reduce"]
    (fused,) = compiled.ops("add_rms_norm")
    assert reduction.args[0].args[0] is fused


def test_experts_are_not_fused_across_a_reduction(mesh):
    """Each slot's rows are reduced before they are weighed and summed: k times the traffic, but what was written."""

    def forward(m, x):
        w, ids = blocks.softmax_router(m.weights, x)
        flat = ids.reshape(-1)
        h = torch.bmm(m.weights.w13[flat], x.repeat_interleave(blocks.K, 0).unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, -1)
        out = m.reduce(torch.bmm(m.weights.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1))
        return (out * w.reshape(-1, 1)).view(-1, blocks.K, blocks.H).sum(1), x

    compiled = compile_layer(forward)
    assert "experts" not in compiled.counts
    assert any(reason.startswith("experts: ") for reason in compiled.reasons)
    assert collectives(compiled) == ["all_reduce"]


# --- torch.distributed.tensor.parallel: graphs that compute with DTensors ---------------------------------------------


class Mlp(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = (nn.Linear(H, I, bias=bias) for _ in range(2))
        self.down = nn.Linear(I, H, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def parallel(module, mesh, gate=None, up=None, down=None):
    plan = dict(gate=gate or ColwiseParallel(), up=up or ColwiseParallel(), down=down or RowwiseParallel())
    return parallelize_module(module, mesh, plan)


def compile_parallel(module, *inputs, **options):
    with torch.no_grad():
        want = module(*inputs)
    compiled = compile_with_report(module, **options)
    torch.testing.assert_close(compiled(*inputs), want)
    return compiled


@pytest.mark.parametrize("downstream", ["eager", "inductor"])
def test_projections_of_dtensors_are_projections_of_shards(downstream, mesh):
    compiled = compile_parallel(parallel(Mlp(), mesh), torch.randn(2, 3, H), downstream=downstream)
    assert compiled.counts == dict(swiglu=1)
    assert reduced(compiled) == [("linear", "down")]
    inputs = [n.meta["val"].shape for n in graph_of(compiled).find_nodes(op="placeholder")]
    assert sorted(inputs) == sorted([(2, 3, H), (I // RANKS, H), (I // RANKS, H), (H, I // RANKS)])


def test_sites_say_where_the_model_wrote_them(mesh):
    compiled = compile_parallel(parallel(Mlp(), mesh), torch.randn(2, 3, H))
    (site,) = compiled.reports[0].matched
    assert "F.silu(self.gate(x)) * self.up(x)" in site.source
    assert [module_path(n) for n in graph_of(compiled).nodes if op_is_linear(n)] == ["gate", "up", "down"]


def op_is_linear(node):
    return node.op == "call_function" and op(node) == "linear"


def test_bias_of_partial_products_is_not_added_on_every_rank(mesh):
    """What DTensor does about it is no plain projection of shards, and stays as DTensor does it."""
    compiled = compile_parallel(parallel(Mlp(bias=True), mesh), torch.randn(2, 3, H))
    assert compiled.counts == dict(swiglu=1)
    assert reduced(compiled) != [("linear", "down")] and collectives(compiled) == ["all_reduce"]


def test_sequence_parallel_block_keeps_its_collectives(mesh):
    module = parallel(
        Mlp(),
        mesh,
        gate=ColwiseParallel(input_layouts=Shard(1)),
        up=ColwiseParallel(input_layouts=Shard(1)),
        down=RowwiseParallel(output_layouts=Shard(1)),
    )
    compiled = compile_with_report(module)
    compiled(torch.randn(2, 4, H))
    assert compiled.counts == dict(swiglu=1)
    gathers = ["all_gather_into_tensor"] * 2
    assert collectives(compiled) == [*gathers, "reduce_scatter_tensor"]


def test_computing_with_dtensors_between_projections(mesh):
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.down = nn.Linear(H, 2 * I, bias=False), nn.Linear(I, H, bias=False)

        def forward(self, x):
            gate, up = self.gate(x).unflatten(-1, (I, 2)).unbind(-1)
            return self.down(F.silu(gate) * up)

    plan = dict(gate=ColwiseParallel(use_local_output=False), down=RowwiseParallel())
    compiled = compile_parallel(parallelize_module(Merged(), mesh, plan), torch.randn(2, 3, H))
    assert collectives(compiled) == ["all_reduce"]
    assert all(source_line(n) for n in graph_of(compiled).nodes if n.op == "call_function")


def test_dynamic_shapes_over_shards(mesh):
    module = parallel(Mlp(), mesh)
    compiled = compile_with_report(module, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, H)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
    assert len(compiled.reports) == 1
    assert compiled.counts == dict(swiglu=1)


class Resharded(nn.Module):
    """Tokens are spread over the ranks between the MLP and what comes after it."""

    def __init__(self, mesh):
        super().__init__()
        self.mlp, self.mesh = parallel(Mlp(), mesh), mesh

    def forward(self, x):
        y = DTensor.from_local(self.mlp(x), self.mesh, [Replicate()]).redistribute(placements=[Shard(1)])
        return (y * 2).redistribute(placements=[Replicate()]).to_local()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_symbolic_length_that_may_not_divide_is_not_sharded_by_guess(dynamic, mesh):
    """Rank 0 holds 3 of 5 tokens: a symbolic shard does not tell the whole length, a static spec does."""
    compiled = compile_with_report(Resharded(mesh), dynamic=dynamic)
    assert compiled(torch.randn(2, 5, H)).shape == (2, 5, H)
    assert compiled.counts == ({} if dynamic else dict(swiglu=1))
    assert ("may not be a multiple of 2" in compiled.reports[0].unfused_reason) == dynamic


def test_result_that_is_a_dtensor_leaves_the_graph_unfused_and_says_so(mesh):
    module = parallel(Mlp(), mesh, down=RowwiseParallel(output_layouts=Replicate(), use_local_output=False))
    x = torch.randn(2, 3, H)
    with torch.no_grad():
        want = module(x)
    compiled = compile_with_report(module)
    with pytest.warns(match=r"returns a DTensor.*\.to_local\(\)"):
        got = compiled(x)
    assert type(got) is type(want) and got.placements == want.placements
    torch.testing.assert_close(got.to_local(), want.to_local())


def test_training_over_dtensors_runs_as_ever(mesh):
    module = parallel(Mlp(), mesh)
    compiled = torch.compile(module, backend="moe_ascend", options=dict(downstream="aot_eager"))
    with pytest.warns(match="needs gradients"):
        compiled(torch.randn(2, 3, H)).sum().backward()
    assert module.down.weight.grad is not None


# --- Two real ranks ---------------------------------------------------------------------------------------------------


def logits_of_families(mesh, names):
    return {name: _logits(shard(FAMILIES[name].build(dtype=DTYPE), mesh)) for name in names}


def _logits(model):
    compiled = compile_with_report(model)
    return compiled(token_ids(), use_cache=False).logits, compiled.counts


def test_families_on_two_ranks_agree_with_the_whole_models(tmp_path):
    names = ["qwen3_moe", "deepseek_v3", "olmoe"]
    results = on_two_ranks(logits_of_families, tmp_path, names)
    for name in names:
        with torch.no_grad():
            want = FAMILIES[name].build(dtype=DTYPE)(token_ids(), use_cache=False).logits
        for result in results:
            logits, counts = result[name]
            assert counts == FAMILIES[name].budget
            assert relative_error(logits, want) <= 1e-5


def mlp_on_rank(mesh, module, x, downstream):
    compiled = compile_with_report(parallel(module, mesh), downstream=downstream)
    return compiled(x), compiled.counts


def test_dtensor_projections_on_two_ranks_agree_with_the_whole_ones(tmp_path):
    module, x = Mlp(bias=True), torch.randn(2, 3, H)
    with torch.no_grad():
        want = copy.deepcopy(module)(x)
    for got, counts in on_two_ranks(mlp_on_rank, tmp_path, module, x, "eager"):
        assert counts == dict(swiglu=1)
        assert relative_error(got, want) <= 1e-6
