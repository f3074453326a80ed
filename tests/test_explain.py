"""``moe_fx.explain``: it sees what the backend does, disturbs nothing, and prints so that people can read it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import fx

import moe_fx
from moe_fx import report_view
from moe_fx.demo_model import ModelShape, build_model, random_tokens
from moe_fx.errors import OptionError
from moe_fx.explanation import SCHEMA_VERSION, Explanation, GraphBreak
from moe_fx.passes.core import Level, Site
from moe_fx.pipeline import GraphReport

SHAPE = ModelShape(
    layers=3, hidden=64, expert_hidden=32, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=16, vocabulary=128
)
CALL = {"input_ids": random_tokens(SHAPE, 6), "use_cache": False}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model(SHAPE)


@pytest.fixture(scope="module")
def explanation(model: torch.nn.Module) -> Explanation:
    return moe_fx.explain(model, **CALL)


def site(**fields: Any) -> Site:
    defaults = {"kind": "router", "matched": True, "pass_name": "router", "module": "m", "source": "/a/b.py:1 x = y"}
    return Site(**{**defaults, **fields})


def explained(*sites: Site, **fields: Any) -> Explanation:
    return Explanation([GraphReport("0/0", "cpu", "inductor", sites=list(sites))], **fields)


def test_everything_of_the_model_is_found(explanation: Explanation) -> None:
    assert explanation.model == "Qwen3MoeForCausalLM"
    assert explanation.counts == {"router": 3, "experts": 3, "norm": 7, "qk_norm_rope": 3}
    assert explanation.missed == []
    assert explanation.graph_breaks == []
    assert explanation.recompiles == 0
    assert [graph.downstream for graph in explanation.graphs] == ["inductor"]


def test_kernels_are_those_of_the_users_compiler(model: torch.nn.Module, explanation: Explanation) -> None:
    assert {s.kernel for s in explanation.matched if s.kind == "norm"} == {"inductor (fused reference)"}
    eager = moe_fx.explain(model, options={"downstream": "eager"}, **CALL)
    assert {s.kernel for s in eager.matched if s.kind != "experts"} == {"reference"}
    assert all(
        s.kernel.startswith("engine (bf16, ") for s in (*explanation.matched, *eager.matched) if s.kind == "experts"
    )


def test_passes_summary_counts_sites_and_time(explanation: Explanation) -> None:
    summary = {item.name: item for item in explanation.passes_summary()}
    assert "explain" not in summary
    assert summary["router"].matched == 3
    assert summary["router"].seconds > 0


def test_an_excluded_rewrite_is_a_miss_with_its_reason(model: torch.nn.Module) -> None:
    bitwise = moe_fx.explain(model, options={"level": "bitwise", "strict": True}, **CALL)
    assert [s.kind for s in bitwise.missed] == ["experts"] * 3
    assert "level='bitwise' excludes this rewrite" in str(bitwise)


def test_a_wrong_option_is_refused_before_anything_runs() -> None:
    def never() -> None:
        raise AssertionError

    with pytest.raises(OptionError, match="unknown option 'levle'"):
        moe_fx.explain(never, options={"levle": "bitwise"})


def test_other_compiled_code_stays_valid(model: torch.nn.Module) -> None:
    compilations = 0

    def counting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return gm.forward

    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        compiled(**CALL)
        for _ in range(2):
            assert moe_fx.explain(compiled, **CALL).counts["experts"] == 3
        compiled(**CALL)
    assert compilations == 1


def test_dynamos_recompile_limit_does_not_apply(model: torch.nn.Module) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            assert len(moe_fx.explain(model, **CALL).graphs) == 1


def test_graph_breaks_are_told_with_reason_and_place() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ x
            torch._dynamo.graph_break()
            return y @ y

    broken = moe_fx.explain(Broken(), torch.ones(4, 4))
    assert len(broken.graphs) == 2
    (found,) = broken.graph_breaks
    assert "graph_break" in found.reason
    assert "test_explain.py" in found.source
    assert "graph break at " in str(broken)


def test_a_function_that_computes_nothing_has_no_graph() -> None:
    nothing = moe_fx.explain(lambda: None)
    assert nothing.graphs == []
    assert "0 graphs" in str(nothing)


def test_to_dict_is_json_with_a_schema_number(explanation: Explanation) -> None:
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["schema"] == SCHEMA_VERSION
    assert data["matched"]["experts"] == 3
    found = data["graphs"][0]["sites"][0]
    assert found["kind"] == "router"
    assert found["level"] == "bitwise"
    assert found["attributes"]["top_k"] == 2


def test_repeated_layers_share_a_row(explanation: Explanation) -> None:
    assert "model.layers.{0..2}.mlp.experts ×3" in str(explanation)


def test_ranges_have_gaps_where_layers_differ() -> None:
    layers = [*range(4), *range(8, 48)]
    sites = [site(module=f"model.layers.{i}.mlp.gate") for i in layers]
    (row,) = report_view.rows(sites)
    assert row.where == "model.layers.{0..3,8..47}.mlp.gate"
    assert row.count == 44


def test_ranges_in_two_places() -> None:
    sites = [site(module=f"layers.{i}.experts.{j}.act") for i in range(3) for j in range(4)]
    (row,) = report_view.rows(sites)
    assert (row.where, row.count) == ("layers.{0..2}.experts.{0..3}.act", 12)


def test_sites_that_ended_differently_have_rows_of_their_own() -> None:
    sites = [site(module="layers.0"), site(module="layers.1", matched=False, reason="no")]
    assert [row.where for row in report_view.rows(sites)] == ["layers.0", "layers.1"]


def test_reasons_that_differ_in_node_names_share_a_row() -> None:
    sites = [site(module=f"layers.{i}", matched=False, reason=f"odd (at %add_{i} = aten.add)") for i in range(3)]
    (row,) = report_view.rows(sites)
    assert row.outcome == "odd (at %add_0 = aten.add)"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_width_cuts_a_reason(width: int) -> None:
    reason = " ".join(f"word{i}" for i in range(60))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(explained(site(matched=False, reason=reason)))
    words = console.export_text().split()
    assert all(f"word{i}" in words for i in range(60))


def test_text_holds_unfused_graphs_notes_and_breaks() -> None:
    found = explained(site(level=Level.BITWISE), notes=["a note"], graph_breaks=[GraphBreak("why", "f.py:3 y", 2)])
    found.graphs[0].unfused_reason = "no reason at all"
    text = str(found)
    for part in ("note: a note", "graph 0/0 runs unfused: no reason at all", "graph break at f.py:3 y ×2: why"):
        assert part in text
    assert "\x1b" not in text


def test_html_is_escaped() -> None:
    page = explained(site(matched=False, module="<script>", reason="a < b [bold]"), model="<i>").to_html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "a &lt; b [bold]" in page
    assert page.startswith("<!doctype html>")


def test_notebooks_get_a_fragment(explanation: Explanation) -> None:
    assert explanation._repr_html_().startswith('<div class="moe-fx">')


def test_explaining_does_not_import_transformers() -> None:
    code = (
        "import sys, torch, moe_fx; moe_fx.explain(torch.nn.Linear(2, 2), torch.ones(1, 2));"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
