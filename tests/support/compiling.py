"""Compile a callable with moe_ascend and look at what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_fx.pipeline import GraphReport


@dataclass
class Compiled:
    """A compiled callable and the reports of its graphs, filled in as graphs compile."""

    fn: Callable[..., Any]
    reports: list[GraphReport]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.fn(*args, **kwargs)

    @property
    def counts(self) -> dict[str, int]:
        """Matched sites by kind."""
        return dict(Counter(site.kind for report in self.reports for site in report.matched))

    @property
    def reasons(self) -> list[str]:
        """Why sites were missed."""
        return [f"{site.kind}: {site.reason}" for report in self.reports for site in report.missed]

    @property
    def forms(self) -> list[str]:
        """Forms of the matched sites."""
        return [site.form for report in self.reports for site in report.matched]

    def ops(self, name: str) -> list[torch.fx.Node]:
        """Canonical nodes of one op in the rewritten graphs."""
        target = getattr(torch.ops.moe_fx, name).default
        return [n for r in self.reports if r.graph for n in r.graph.graph.nodes if n.target is target]


def compile_with_report(
    fn: Any, *, dynamic: bool | None = False, fullgraph: bool = False, downstream: str = "eager", **options: Any
) -> Compiled:
    """``torch.compile(fn, backend="moe_ascend")`` with its reports collected; eager downstream unless told."""
    reports: list[GraphReport] = []
    options = {"downstream": downstream, "report": reports.append, **options}
    compiled = torch.compile(fn, backend="moe_ascend", dynamic=dynamic, fullgraph=fullgraph, options=options)
    return Compiled(compiled, reports)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
