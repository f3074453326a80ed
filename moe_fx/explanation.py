"""``moe_fx.explain``: what was fused in a model, what was not, and why."""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_fx import __version__, downstream
from moe_fx.errors import MoeFxWarning
from moe_fx.lowering import targets
from moe_fx.options import Options
from moe_fx.passes.core import Level, MatchContext, Pass, Site
from moe_fx.pipeline import GraphReport

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["SCHEMA_VERSION", "Explanation", "GraphBreak", "PassSummary", "explain"]

SCHEMA_VERSION = 1
"""Version of :meth:`Explanation.to_dict`; it grows when a key changes its meaning or goes away."""


@dataclass(frozen=True)
class GraphBreak:
    """One place where dynamo ended a graph.

    Attributes:
        reason: dynamo's message: what it was, its explanation and hints.
        source: ``file:line code`` of the model; empty where dynamo had no graph to end yet.
        count: how many graphs ended there.
    """

    reason: str
    source: str
    count: int


@dataclass(frozen=True)
class PassSummary:
    """One pass over all graphs: its time, and how its candidate sites ended."""

    name: str
    seconds: float
    matched: int
    missed: int


@dataclass
class Explanation:
    """What :func:`explain` saw; prints as a table in a terminal and in a notebook.

    Attributes:
        graphs: the report of every graph, in the order they were compiled.
        graph_breaks: where dynamo cut the model into graphs.
        model: what was explained.
        recompiles: graphs that were compiled again for a frame that already had one.
        notes: what a reader must know to judge the report, such as that weights are random.
    """

    graphs: list[GraphReport]
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    model: str = ""
    recompiles: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Every candidate site of every graph."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def matched(self) -> list[Site]:
        """Sites that were rewritten."""
        return [site for site in self.sites if site.matched]

    @property
    def missed(self) -> list[Site]:
        """Sites that were left as they were; each names the first predicate that failed."""
        return [site for site in self.sites if not site.matched]

    @property
    def counts(self) -> dict[str, int]:
        """Number of matched sites by kind."""
        return dict(Counter(site.kind for site in self.matched))

    def passes_summary(self) -> list[PassSummary]:
        """Time and outcome of each pass over all graphs, in the order they run."""
        seconds: Counter[str] = Counter()
        for graph in self.graphs:
            seconds.update(graph.pass_seconds)
        matched = Counter(site.pass_name for site in self.matched)
        missed = Counter(site.pass_name for site in self.missed)
        return [PassSummary(name, time, matched[name], missed[name]) for name, time in seconds.items()]

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data, fit for JSON; ``schema`` is :data:`SCHEMA_VERSION`."""
        return {
            "schema": SCHEMA_VERSION,
            "moe_fx": __version__,
            "torch": torch.__version__,
            "model": self.model,
            "notes": list(self.notes),
            "matched": self.counts,
            "missed": dict(Counter(site.kind for site in self.missed)),
            "recompiles": self.recompiles,
            "graph_breaks": [vars(item) for item in self.graph_breaks],
            "graphs": [_graph_dict(graph) for graph in self.graphs],
        }

    def to_text(self) -> str:
        """The table as plain text of a fixed width; nothing is cut off."""
        from moe_fx import report_view

        return report_view.text(self)

    def to_html(self) -> str:
        """The table as one small page of HTML that refers to nothing outside itself."""
        from moe_fx import report_view

        return report_view.page(self)

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> RenderableType:
        from moe_fx import report_view

        return report_view.render(self)

    def _repr_html_(self) -> str:
        from moe_fx import report_view

        return report_view.fragment(self)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Compile ``model`` as ``torch.compile(model, backend="moe_ascend")`` would, run it once, and tell what was fused.

    Always traces anew, also when the model was compiled before, and leaves other compiled code as it is. The graphs
    are matched and lowered, but not given to Inductor or torchair, so this takes seconds. Nothing here raises for a
    miss: ``strict`` is ignored.

    Args:
        model: a module or function, compiled or not.
        args, kwargs: what to call it with; the call runs without gradients.
        options: as for ``torch.compile``; see :class:`moe_fx.options.Options`.
        dynamic: as for ``torch.compile``.

    Raises:
        OptionError: an option that does not exist or a value that it cannot take.
    """
    wanted = Options.from_user(options)
    model = getattr(model, "_orig_mod", model)
    observer = _Observer(dict(options or {}), wanted)
    with torch.no_grad(), _tracing_anew() as codes, warnings.catch_warnings():
        # What these warnings say is in the explanation, in more detail.
        warnings.simplefilter("ignore", MoeFxWarning)
        compiled = torch.compile(_fresh_caller(), backend=observer.backend(), dynamic=dynamic, **_isolation())
        with _graph_break_counts() as counts:
            compiled(model, args, kwargs)
    return Explanation(
        graphs=observer.reports,
        graph_breaks=_merge_breaks(observer.breaks, counts),
        model=type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", repr(model)),
        recompiles=len(codes) - len({id(code) for code in codes}),
    )


class _Observer:
    """Runs the real backend on every graph and keeps what it reports."""

    def __init__(self, given: dict[str, Any], wanted: Options) -> None:
        self.reports: list[GraphReport] = []
        self.breaks: list[GraphBreak] = []
        self._given = given
        self._wanted = wanted

    def backend(self) -> Callable[..., Any]:
        """A backend of its own identity, so that dynamo finds no code compiled for it."""
        from moe_fx.backend import moe_ascend

        # `wraps` also lets moe_fx.integrations.tracing see that this is moe_ascend.
        @functools.wraps(moe_ascend)
        def observed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            self._note_break(gm)
            wanted = self._wanted
            target = targets.of_devices(example_inputs) if wanted.target == "auto" else wanted.target
            finisher = downstream.resolve(wanted.downstream, target)
            probe = _KernelProbe(target, finisher)
            overrides = {
                "report": self.reports.append,
                "downstream": "eager",
                "downstream_options": {},
                "extra_passes": [*wanted.extra_passes, probe],
                "strict": False,
                # An explanation is made by matching, and it needs the graph that the passes leave.
                "cache": False,
            }
            compiled = moe_ascend(gm, example_inputs, options=self._given | overrides)
            probe.amend(self.reports[-1])
            return compiled

        return observed

    def _note_break(self, gm: fx.GraphModule) -> None:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            self.breaks.append(GraphBreak(reason.reason, _source(reason.user_stack), 1))


class _KernelProbe(Pass):
    """Note which kernels the user's own downstream compiler would run; the graphs here are finished by eager."""

    name = "explain"
    level = Level.BITWISE

    def __init__(self, target: str, finisher: str) -> None:
        self._target = targets.load(target)
        self._finisher = finisher
        self._kernels: dict[str, str] = {}

    def run(self, ctx: MatchContext) -> None:
        """Look at the canonical ops; the graph stays as it is."""
        for node in ctx.graph.nodes:
            if targets.canonical_name(node) is not None:
                self._kernels[node.name] = self._target.kernel_for(node, self._finisher)

    def amend(self, report: GraphReport) -> None:
        """Put in the report what the user's own compilation would have, and take this pass out of it."""
        report.downstream = self._finisher
        report.cache = "off: an explanation always matches anew"
        report.pass_seconds.pop(self.name, None)
        for site in report.matched:
            site.kernel = self._kernels.get(site.node, site.kernel)


_SERIAL = itertools.count()


def _fresh_caller() -> Callable[..., Any]:
    """A function with code and globals of its own that calls its first argument.

    Dynamo keeps compiled code, its limits and what it learnt of dynamic shapes per code object, and its helpers in the
    frame's globals. With this one as the outermost frame, a model without graph breaks keeps nothing of an explanation;
    the frames after a graph break do keep code, under a guard on a backend that is gone.
    """

    def caller(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    code = caller.__code__.replace(co_name=f"moe_fx_explain_{next(_SERIAL)}")
    return types.FunctionType(code, {"__builtins__": builtins, "__name__": __name__})


def _isolation() -> dict[str, Any]:
    """Keep the code compiled after a graph break out of the limits of the user's own, where torch can (2.13)."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


@contextlib.contextmanager
def _tracing_anew() -> Iterator[list[types.CodeType]]:
    """Lift dynamo's recompile limits, and list the code object of each frame that is compiled."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    codes: list[types.CodeType] = []
    handle = register_bytecode_hook(lambda code, new_code: codes.append(code))
    limit = 1 << 20
    try:
        with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
            yield codes
    finally:
        handle.remove()


@contextlib.contextmanager
def _graph_break_counts() -> Iterator[Counter[str]]:
    """Dynamo's graph breaks by reason, filled in at the end."""
    from torch._dynamo.utils import counters

    before, new = Counter(counters["graph_break"]), Counter[str]()
    yield new
    new.update(Counter(counters["graph_break"]) - before)


def _merge_breaks(located: Sequence[GraphBreak], counts: Mapping[str, int]) -> list[GraphBreak]:
    """Breaks with their places, then those that dynamo only counted.

    Dynamo counts a break again in each frame that it retries, so its counts are no numbers of places.
    """
    places = Counter((item.reason, item.source) for item in located)
    breaks = [GraphBreak(reason, source, count) for (reason, source), count in places.items()]
    known = {item.reason for item in located}
    return breaks + [GraphBreak(reason, "", 1) for reason in counts if reason not in known]


def _source(stack: Sequence[Any]) -> str:
    if not stack:
        return ""
    frame = stack[-1]
    return f"{frame.filename}:{frame.lineno} {frame.line or ''}".strip()


def _graph_dict(graph: GraphReport) -> dict[str, Any]:
    return {
        "compile_id": graph.compile_id,
        "target": graph.target,
        "downstream": graph.downstream,
        "unfused_reason": graph.unfused_reason,
        "nodes_before": graph.nodes_before,
        "nodes_after": graph.nodes_after,
        "cache": graph.cache,
        "artifacts": list(graph.artifacts),
        "cache_seconds": graph.cache_seconds,
        "capture_seconds": graph.capture_seconds,
        "pass_seconds": dict(graph.pass_seconds),
        "sites": [_site_dict(site) for site in graph.sites],
    }


def _site_dict(site: Site) -> dict[str, Any]:
    return {
        "kind": site.kind,
        "matched": site.matched,
        "pass": site.pass_name,
        "module": site.module,
        "source": site.source,
        "form": site.form,
        "level": site.level.value if site.level else None,
        "op": site.op,
        "attributes": {name: _plain(given) for name, given in site.attributes.items()},
        "kernel": site.kernel,
        "reason": site.reason,
    }


def _plain(value: Any) -> Any:
    """An attribute as JSON has it; dtypes and symbolic numbers by name."""
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
