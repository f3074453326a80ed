"""Real transformers 4.x blocks, which loop over a ModuleList of experts; installed into a folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

RELEASE = "4.57.6"
REQUIREMENTS = (f"transformers=={RELEASE}", "huggingface_hub<1.0", "tokenizers>=0.22,<=0.23")

PROGRAM = """
import sys, torch, moe_fx, transformers
from transformers import AutoConfig, AutoModelForCausalLM
tiny = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8, vocab_size=64, num_experts=8, num_experts_per_tok=2,
            num_local_experts=8, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
            shared_expert_intermediate_size=24)
assert transformers.__version__.startswith("4.")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sys.argv[1], **tiny), torch_dtype=torch.bfloat16).eval()
x = torch.arange(6)[None] + 3
# A mask of one's own: transformers 4.57 makes its masks with vmap.
mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
with torch.no_grad():
    wanted = model(x, attention_mask=mask, use_cache=False).logits
    report = moe_fx.prepare(model)
    assert torch.equal(model(x, attention_mask=mask, use_cache=False).logits, wanted)
    graphs = []
    options = {"downstream": "eager", "report": graphs.append}
    compiled = torch.compile(model, backend="moe_ascend", fullgraph=True, options=options)
    got = compiled(x, attention_mask=mask, use_cache=False).logits
fused = sum("moe_fx.experts" in str(n.target) for graph in graphs for n in graph.graph.graph.nodes)
error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
print(len(report.prepared), len(report.left), len(graphs), fused, sum(g.count("router") for g in graphs), error)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 4.x release in it."""
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--no-deps", *REQUIREMENTS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        command[-len(REQUIREMENTS) - 1 :] = ["requests"]  # with what it needs itself
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"pip could not install transformers {RELEASE}: {lines[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "blocks"), [("mixtral", 2), ("qwen3_moe", 2), ("qwen2_moe", 2), ("olmoe", 2), ("deepseek_v3", 1)]
)
def test_blocks_of_transformers_4(family, blocks, target):
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), family],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr:
        pytest.skip(f"transformers {RELEASE} does not import here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    prepared, left, graphs, experts, routers, error = done.stdout.split()[-6:]
    assert (int(prepared), int(left), int(graphs), int(experts), int(routers)) == (blocks, 0, 1, blocks, blocks)
    assert float(error) <= 2e-2
