"""The CPU target's forms of ``experts`` against the reference, alone and inside a lowered graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from moe_fx.capture import capture
from moe_fx.lowering.cpu import TARGET, experts
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.spec import Sample
from moe_fx.lowering.targets import canonical_name

OP = CANONICAL_OPS["experts"]


def samples(dtype: torch.dtype) -> list[Sample]:
    return list(OP.samples(dtype, torch.Generator().manual_seed(0)))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("strangers", [False, True], ids=["", "ids out of range"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(experts.gathered, torch.bfloat16), (experts.gathered, torch.float32), (experts.grouped, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_form_equals_the_reference(form: Callable[..., torch.Tensor], dtype: torch.dtype, strangers: bool) -> None:
    for sample in samples(dtype):
        x, weights, ids, *projections = sample.args
        if strangers:
            ids = ids.clone()
            ids[0, 0], ids[-1, -1] = 99, -1
            ids[0, -1] = 1
        want = OP.reference(x, weights, ids, *projections, **sample.kwargs)
        got = form(x, weights, ids, *projections, **sample.kwargs)
        assert relative_error(got, want) < OP.tolerance[dtype].rel_l2, sample.name


def lowered(
    tokens: int, *, dynamic: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[fx.GraphModule, str, float]:
    """An ``experts`` node of 8 experts and k = 2 lowered for Inductor: the graph, its kernel's name and its error."""
    rng = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(*shape, generator=rng).to(dtype) * 0.1 for shape in ((8, 96, 64), (8, 64, 48)))
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = capture(gm, inputs)
        (node,) = [n for n in graph.graph.nodes if canonical_name(n) == "experts"]
        kernel = TARGET.kernel_for(node, "inductor")
        TARGET.lower(graph, "inductor")
        found.extend((graph, kernel))
        return graph.forward

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.moe_fx.experts(x, weights, ids, w13, w2)

    x = torch.randn(tokens, 64, generator=rng).to(dtype)
    ids = torch.stack([torch.randperm(8, generator=rng)[:2] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, 2, generator=rng)
    with torch.no_grad():
        got = torch.compile(call, backend=backend, dynamic=dynamic)(x, weights, ids)
    return (*found, relative_error(got, call(x, weights, ids)))


@pytest.mark.parametrize(
    ("tokens", "dynamic", "kernel"),
    [(4, False, "inductor (gathered)"), (5, False, "inductor (grouped)"), (4, True, "inductor (grouped)")],
)
def test_the_number_of_tokens_decides(tokens: int, dynamic: bool, kernel: str) -> None:
    graph, name, error = lowered(tokens, dynamic=dynamic)
    assert name == kernel
    assert not any(canonical_name(node) for node in graph.graph.nodes)
    assert error < OP.tolerance[torch.bfloat16].rel_l2


def test_what_grouped_mm_does_not_take_runs_the_reference() -> None:
    graph, name, error = lowered(40, dtype=torch.float32)
    assert name == "reference"
    assert any(canonical_name(node) == "experts" for node in graph.graph.nodes)
    assert error == 0


def test_other_compilers_get_the_reference() -> None:
    graph = fx.Graph()
    node = graph.call_function(OP.overload)
    assert TARGET.kernel_for(node, "eager") == "reference"


def test_inductor_never_stores_gathered_weights() -> None:
    """The point of the gathered form: weights are read in place inside one reduction."""
    from torch._inductor.utils import run_and_get_code

    sample = next(s for s in samples(torch.bfloat16) if s.name == "silu-T3")
    compiled = torch.compile(lambda *args: experts.gathered(*args), dynamic=False)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *sample.args)
    assert "bmm" not in code
    pairs, inter, hidden = 6, 48, 64
    assert f"({pairs}, {2 * inter}, {hidden})" not in code
    assert f"({pairs}, {hidden}, {inter})" not in code
