"""Products fused with an all-reduce, as engines write them, go through the passes and both modes of torchair untouched.

Two processes are two ranks: each compiles the layer over its shards, and the stand-in's operators talk over gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

RANKS = 2
PROGRAM = """
import json, sys
sys.path[:0] = PATHS
import host_cann.preload
import torch
import host_cann
host_cann.install()
import torch.distributed as dist
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter, npu_ops

rank, mode, dynamic, store = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "dynamic", sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
npu_ops.GROUPS["tp"] = dist.group.WORLD
H, I, E, K = 32, 48, 8, 2

# What vllm-ascend brings as an operator of its own; torch_npu 2.13 has none.
engine = torch.library.Library("engine", "DEF")
engine.define("matmul_allreduce_add_rmsnorm(Tensor x1, Tensor x2, Tensor residual, Tensor gamma, str group,"
              " float epsilon) -> (Tensor, Tensor)")
fused = torch.ops.engine.matmul_allreduce_add_rmsnorm

@torch.library.register_fake("engine::matmul_allreduce_add_rmsnorm", lib=engine)
def fake(x1, x2, residual, gamma, group, epsilon):
    return torch.empty_like(residual), torch.empty_like(residual)

def kernel(x1, x2, residual, gamma, group, epsilon):
    y = npu_ops.npu_mm_all_reduce_base(x1, x2, group)
    normed, _, total = npu_ops.npu_add_rms_norm(y, residual, gamma, epsilon)
    return normed, total

eager_kernels.add_kernel(fused.default, kernel)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shapes = dict(v=(H, H), o=(H, H), gate=(E, H), w13=(E, 2 * I, H), w2=(E, H, I), s13=(2 * I, H), s2=(H, I))
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape).div(shape[-1] ** 0.5).bfloat16()))
        self.norm, self.last = (torch.nn.RMSNorm(H, eps=1e-6).bfloat16() for _ in range(2))

    def shard(self):
        half = lambda t, dim: torch.nn.Parameter(t.detach().chunk(2, dim)[rank].clone())
        def gate_up(t, dim):
            return torch.nn.Parameter(torch.cat([p.chunk(2, dim)[rank] for p in t.detach().chunk(2, dim)], dim))
        self.v, self.o, self.w2, self.s2 = half(self.v, 0), half(self.o, 1), half(self.w2, 2), half(self.s2, 1)
        self.w13, self.s13 = gate_up(self.w13, 1), gate_up(self.s13, 0)
        return self

    def experts(self, h):
        weights, ids = torch.softmax((h @ self.gate.t()).float(), -1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = ids.reshape(-1)
        rows = torch.bmm(self.w13[flat], h.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
        gate, up = rows.chunk(2, -1)
        rows = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (rows * weights.to(rows.dtype).reshape(-1, 1)).view(-1, K, H).sum(1)

    def shared(self, h):
        gate, up = F.linear(h, self.s13).chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x):
        raise NotImplementedError


class Whole(Layer):
    def forward(self, x):
        total = x + (x @ self.v.t()) @ self.o.t()
        h = self.norm(total)
        total = total + (self.shared(h) @ self.s2.t() + self.experts(h))
        return self.last(total), total


class Sharded(Layer):
    # fused_norm: the engine's operator for product, all-reduce, addition and norm; else torch_npu's for the first two.
    fused_norm = False

    def forward(self, x):
        if self.fused_norm:
            h, total = fused(x @ self.v.t(), self.o.t(), x, self.norm.weight, "tp", 1e-6)
        else:
            total = x + torch.ops.npu.npu_mm_all_reduce_base(x @ self.v.t(), self.o.t(), "tp")
            h = self.norm(total)
        total = total + torch.ops.npu.npu_mm_all_reduce_base(self.shared(h), self.s2.t(), "tp", x3=self.experts(h))
        return self.last(total), total


torch.manual_seed(0)
whole, layer = Whole(), Sharded()
layer.load_state_dict(whole.state_dict())
layer.fused_norm = mode == "npugraph_ex"
xs = [torch.randn(n, H).bfloat16() for n in ((6, 9, 6) if dynamic else (6, 6, 6))]
with torch.no_grad():
    want = [whole(x) for x in xs]
run = compile_with_report(
    layer.shard().npu(), dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True,
    downstream_options={"mode": mode},
)
errors = [relative_error(a.cpu(), b) for x, pair in zip(xs, want) for a, b in zip(run(x.npu()), pair)]
report = run.reports[0]
nodes = [] if report.graph is None else report.graph.graph.nodes  # None from the cache.
print(json.dumps(dict(
    errors=errors,
    graphs=len(run.reports),
    counts=run.counts,
    kernels=sorted(site.kernel for site in report.matched),
    reductions=[(str(n.target), len(n.users)) for n in nodes if "allreduce" in str(n.target).replace("_", "")],
    fakes=all(n.meta.get("val") is not None for n in nodes if n.op == "call_function"),
    ge={kind: ge_interpreter.COUNTS[kind] for kind in ("MatmulAllReduce", "AddRmsNorm", "MoeFinalizeRoutingV2")},
    replayed=2 in eager_kernels.EVENTS,
    cache=[report.cache.partition(":")[0], *report.artifacts],
)))
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    here = Path(__file__).parent
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("PATHS", repr([str(here), str(here.parent / "support")])))
    return path


def run(program: Path, mode: str, sizes: str) -> list[dict[str, Any]]:
    """What both ranks say."""
    store = program.with_name(f"store_{uuid.uuid4().hex}")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), mode, sizes, str(store)],
            env={**os.environ, "PYTHONWARNINGS": "ignore"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    done = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(errors for _, errors in done)
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_fused_reductions_survive(mode: str, sizes: str, program: Path) -> None:
    base, fused = "npu.npu_mm_all_reduce_base.default", "engine.matmul_allreduce_add_rmsnorm.default"
    for found in run(program, mode, sizes):
        assert max(found["errors"]) < 2e-2
        assert found["graphs"] == 1 and found["fakes"]
        if mode == "ge":
            # Addition and norm behind torch_npu's operator are still fused; the reductions are those that were written.
            assert found["reductions"] == [[base, 1], [base, 1]]
            assert found["counts"] == dict(router=1, experts=1, norm=2)
            assert found["ge"] == dict(MatmulAllReduce=6, AddRmsNorm=6, MoeFinalizeRoutingV2=3)
        else:
            assert found["reductions"] == [[fused, 2], [base, 1]]
            assert found["counts"] == dict(router=1, experts=1, norm=1)
            assert found["replayed"]
        assert all(kernel.startswith("torch_npu ") for kernel in found["kernels"])


def test_each_rank_starts_from_its_own_entries(program: Path) -> None:
    cold, warm = run(program, "ge", "dynamic"), run(program, "ge", "dynamic")
    assert [found["cache"] for found in cold + warm] == [["miss", "miss"]] * RANKS + [["hit", "hit"]] * RANKS
    for before, after in zip(cold, warm, strict=True):
        assert all(after[name] == before[name] for name in ("errors", "kernels", "ge"))
