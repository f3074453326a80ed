"""The attention pass, switched on, on real transformers models: its own budgets, exact in both directions."""

from __future__ import annotations

import pytest
import torch
from compiling import compile_with_report, relative_error
from moe_families import FAMILIES, OTHER_FAMILIES, token_ids

ON = {"attention": True}
# As for the models without the pass (test_families.py).
LOGITS_BOUND = 2e-2
REPEATED, NATIVE, EQUAL = "sdpa, repeat_kv, masked", "sdpa, enable_gqa, causal", "sdpa, masked"

# Family -> (matched attention sites, their form).
BUDGETS = {
    "qwen3_moe": (2, REPEATED),
    "qwen2_moe": (2, REPEATED),
    "qwen3_next": (1, REPEATED),
    "mixtral": (2, REPEATED),
    "deepseek_v2": (2, EQUAL),
    "deepseek_v3": (2, EQUAL),
    "glm4_moe": (2, REPEATED),
    "minimax_m2": (2, REPEATED),
    "olmoe": (2, REPEATED),
    "gpt_oss": (0, ""),
    "afmoe": (2, NATIVE),
    "ernie4_5_moe": (2, REPEATED),
    "exaone_moe": (2, REPEATED),
    "flex_olmo": (2, REPEATED),
    "granitemoe": (2, REPEATED),
    "granitemoehybrid": (0, ""),
    "hunyuan_v1_moe": (2, REPEATED),
    "hy_v3": (2, REPEATED),
    "laguna": (2, REPEATED),
    "minimax": (1, REPEATED),
    "nemotron_h": (1, REPEATED),
    "cohere2_moe": (2, REPEATED),
}
# Sites that must be reported as missed, with words of the reason; all others must have none.
MISSES = {"gpt_oss": (2, "attention sinks")}
ALL = {**FAMILIES, **OTHER_FAMILIES}


def attention_forms(compiled):
    return [s.form for report in compiled.reports for s in report.matched if s.kind == "attention"]


def check_family(name, *, dynamic=False, **options):
    model, ids = ALL[name].build(), token_ids()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    compiled = compile_with_report(model, dynamic=dynamic, passes=ON, **options)
    assert relative_error(compiled(ids, use_cache=False).logits, want) <= LOGITS_BOUND
    count, form = BUDGETS[name]
    assert attention_forms(compiled) == [form] * count
    assert {kind: n for kind, n in compiled.counts.items() if kind != "attention"} == ALL[name].budget
    n_missed, reason = MISSES.get(name, (0, ""))
    assert len(compiled.reasons) == n_missed
    assert all(text.startswith("attention: ") and reason in text for text in compiled.reasons)


def test_every_family_has_a_budget():
    assert list(BUDGETS) == list(ALL)


@pytest.mark.parametrize("name", BUDGETS)
def test_family_meets_its_budget(name):
    check_family(name, check=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "afmoe"])
def test_dynamic_shapes(name):
    check_family(name, dynamic=True)


def test_inductor_finishes_the_graph():
    check_family("qwen3_moe", downstream="inductor")


def test_decode_on_a_static_cache():
    """One query over the whole cache, behind its mask."""
    from transformers import StaticCache

    model = FAMILIES["qwen3_moe"].build()

    def decode(run):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(token_ids(2, 5), past_key_values=cache, position_ids=torch.arange(5).expand(2, -1), use_cache=True)
            step = dict(past_key_values=cache, position_ids=torch.full((2, 1), 5), use_cache=True)
            return run(token_ids(2, 1), **step).logits

    compiled = compile_with_report(model, passes=ON)
    assert relative_error(decode(compiled), decode(model)) <= LOGITS_BOUND
    assert attention_forms(compiled) == [REPEATED, REPEATED]
    queries, keys = ({n.args[i].meta["val"].shape[2] for n in compiled.ops("attention")} for i in (0, 1))
    assert (queries, keys) == ({1}, {16})


def test_attention_of_eager_models_is_missed_with_the_way_out():
    model = FAMILIES["mixtral"].build()
    model.set_attn_implementation("eager")
    compiled = compile_with_report(model, passes=ON)
    compiled(token_ids(), use_cache=False)
    assert len(compiled.reasons) == 2
    assert all("attn_implementation='sdpa'" in reason for reason in compiled.reasons)
