"""Real transformers models: outputs against eager, expert sets equal, match budgets exact."""

from __future__ import annotations

import pytest
import torch
from compiling import compile_with_report, relative_error
from moe_families import FAMILIES, OTHER_FAMILIES, token_ids

# Model-level bound on logits: a few roundings of the dtype per layer (tiny models agree much closer).
LOGITS_BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def check_family(family, implementation, *, dynamic=False, dtype=torch.bfloat16, **options):
    model = family.build(implementation, dtype)
    ids = token_ids()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    # check=True compares every site with what it replaced, routers by expert sets.
    compiled = compile_with_report(model, dynamic=dynamic, check=True, **options)
    got = compiled(ids, use_cache=False).logits
    assert compiled.reasons == []
    assert compiled.counts == family.budget
    assert len(compiled.reports) == 1
    assert relative_error(got, want) <= LOGITS_BOUND[dtype]
    return model, compiled


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_meets_its_budget(name, implementation, dynamic):
    check_family(FAMILIES[name], implementation, dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_other_dtypes(name, dtype):
    check_family(FAMILIES[name], "grouped_mm", dtype=dtype)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_families_outside_the_list(name, implementation):
    check_family(OTHER_FAMILIES[name], implementation)


@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_shapes_serve_other_lengths_without_recompiling(name):
    model = FAMILIES[name].build()
    compiled = compile_with_report(model, dynamic=True)
    for batch, length in ((2, 6), (2, 9), (3, 7)):
        ids = token_ids(batch, length)
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        assert relative_error(compiled(ids, use_cache=False).logits, want) <= LOGITS_BOUND[torch.bfloat16]
    assert len(compiled.reports) <= 2, "a new length recompiled"
    assert all(r.count("experts") == FAMILIES[name].budget["experts"] for r in compiled.reports)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_inductor_finishes_the_graph(name):
    family = FAMILIES[name]
    model = family.build()
    ids = token_ids()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    compiled = compile_with_report(model, downstream="inductor", fullgraph=True)
    assert relative_error(compiled(ids, use_cache=False).logits, want) <= LOGITS_BOUND[torch.bfloat16]
    assert compiled.counts == family.budget


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_static_cache_prefill_and_decode(name):
    from transformers import StaticCache

    model = FAMILIES[name].build()
    ids = token_ids(2, 5)

    def decode(run):
        cache = StaticCache(config=model.config, max_cache_len=16)
        tokens, outputs = ids, []
        for step in range(3):
            start = 0 if step == 0 else 4 + step
            positions = torch.arange(start, start + tokens.shape[1])
            kwargs = dict(past_key_values=cache, position_ids=positions.expand(2, -1), use_cache=True)
            with torch.no_grad():
                logits = run(tokens, **kwargs).logits[:, -1]
            outputs.append(logits)
            tokens = logits.argmax(-1, keepdim=True)
        return torch.stack(outputs)

    compiled = compile_with_report(model)
    want, got = decode(model), decode(compiled)
    assert relative_error(got, want) <= LOGITS_BOUND[torch.bfloat16]
    assert compiled.counts.get("experts", 0) >= 1


def test_generate_matches_eager_tokens():
    model = FAMILIES["qwen3_moe"].build(dtype=torch.float32)
    ids = token_ids(1, 4)
    kwargs = dict(max_new_tokens=4, do_sample=False, disable_compile=True)
    with torch.no_grad():
        want = model.generate(ids, **kwargs)
    reports = []
    model.forward = torch.compile(
        model.forward, backend="moe_ascend", options={"downstream": "eager", "report": reports.append}
    )
    with torch.no_grad():
        got = model.generate(ids, **kwargs)
    assert torch.equal(got, want)
    assert reports and all(r.count("experts") == 2 for r in reports)


@pytest.mark.slow
def test_real_qwen3_30b_layer():
    """One layer at the real shape of Qwen3-30B-A3B: H=2048, I=768, E=128, k=8, 32/4 heads of 128."""
    model = FAMILIES["qwen3_moe"].build(
        num_hidden_layers=1, hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=512,
    )  # fmt: skip
    ids = token_ids(1, 17)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    compiled = compile_with_report(model, check=True)
    assert relative_error(compiled(ids, use_cache=False).logits, want) <= LOGITS_BOUND[torch.bfloat16]
    assert compiled.counts == dict(router=1, experts=1, norm=3, qk_norm_rope=1)
