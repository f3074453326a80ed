"""transformers' ``eager`` experts under moe_ascend: one graph, no action by the user, nothing changed for others."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import moe_fx.backend  # noqa: E402 - as torch.compile(backend="moe_ascend") does: installs the hook
from moe_fx.integrations import transformers as hook  # noqa: E402

TINY = dict(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts=4, num_experts_per_tok=2, num_local_experts=4,
    n_routed_experts=4, max_position_embeddings=64, first_k_dense_replace=1, num_dense_layers=1, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MLA = dict(
    n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    num_key_value_heads=4, n_shared_experts=1,
)  # fmt: skip
# family -> (config, MoE layers)
FAMILIES = {
    "qwen3_moe": ({}, 2),
    "mixtral": ({}, 2),
    "deepseek_v3": (MLA, 1),
    "gpt_oss": ({}, 2),
    "minimax_m2": ({}, 2),
    "afmoe": (dict(num_shared_experts=1), 1),
}


def tiny(family: str, experts: str = "eager", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A small model with random weights."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = transformers.AutoConfig.for_model(family, **{**TINY, **FAMILIES[family][0]})
    torch.manual_seed(0)
    attention = "eager" if family == "gpt_oss" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
    )
    return model.eval()


def fuse(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Logits and reports of one call in a single graph."""
    reports: list = []
    torch._dynamo.reset()
    options = {"downstream": "eager", "report": reports.append}
    with torch.no_grad():
        compiled = torch.compile(model, backend="moe_ascend", fullgraph=True, options=options)
        return compiled(x, use_cache=False).logits, reports


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_experts_are_one_graph(family):
    model = tiny(family)
    x = torch.arange(6)[None] + 3
    with torch.no_grad():
        wanted = model(x, use_cache=False).logits
    got, reports = fuse(model, x)
    assert [r.count("experts") for r in reports] == [FAMILIES[family][1]]
    assert torch.linalg.norm(got.float() - wanted.float()) <= 2e-2 * torch.linalg.norm(wanted.float())
    with torch.no_grad():
        assert torch.equal(model(x, use_cache=False).logits, wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_see_the_untouched_model(backend):
    model = tiny("mixtral")
    x = torch.arange(6)[None] + 3
    fuse(model, x)
    with torch.no_grad():
        wanted = model(x, use_cache=False).logits
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        got = torch.compile(model, backend=counter)(x, use_cache=False).logits
    assert counter.frame_count > 1  # the loop over experts still breaks graphs there
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_no_warning_on_the_way(experts):
    model = tiny("qwen3_moe", experts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, reports = fuse(model, torch.arange(6)[None])
    assert [str(w.message) for w in caught] == []
    assert reports[0].count("experts") == 2


def test_fp32_takes_the_fallback_op():
    _, reports = fuse(tiny("qwen3_moe", dtype=torch.float32), torch.arange(6)[None])
    assert [r.count("experts") for r in reports] == [2]


def test_compile_before_transformers_is_imported():
    program = textwrap.dedent("""
        import sys, torch
        torch.compile(torch.nn.Linear(2, 2), backend="moe_ascend")
        assert "transformers" not in sys.modules
        from transformers import MixtralConfig, MixtralForCausalLM
        import transformers.integrations.moe as experts
        assert experts._moe_fx_hook
        from moe_fx.integrations.transformers import _PatchOnImport
        assert not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path)
        config = MixtralConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=2, num_local_experts=4, vocab_size=32)
        config._experts_implementation = "eager"
        model, reports = MixtralForCausalLM(config).eval(), []
        with torch.no_grad():
            torch.compile(model, backend="moe_ascend", fullgraph=True,
                          options={"downstream": "eager", "report": reports.append})(torch.arange(4)[None])
        print(len(reports), reports[0].count("experts"))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]


def test_an_unknown_interface_is_named_with_the_way_out():
    class Module:
        pass

    with pytest.warns(moe_fx.MoeFxWarning, match=r"transformers 5.*set_experts_implementation\('grouped_mm'\)"):
        hook._patch(Module())


def test_prepare_leaves_hooked_models_alone():
    report = moe_fx.prepare(tiny("qwen3_moe"))
    assert len(report.needs_nothing) == 2 and not report.prepared and not report.left
    assert report.needs_nothing[0].module == "model.layers.0.mlp.experts"
