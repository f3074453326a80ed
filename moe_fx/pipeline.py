"""From a captured graph to a lowered one: run the passes in order, account for every site, lower to the target."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from moe_fx.capture import copy_graph_module
from moe_fx.dump import GraphDumper
from moe_fx.lowering import targets
from moe_fx.options import Options
from moe_fx.passes import PIPELINE
from moe_fx.passes.core import Level, MatchContext, Pass, Site
from moe_fx.passes.graph import (
    CASTS,
    VIEWS,
    describe,
    getitems,
    is_op,
    module_class,
    module_path,
    peel,
    reaches,
    source_line,
    value,
)

log = logging.getLogger(__name__)


@dataclass
class GraphReport:
    """What happened to one graph.

    Attributes:
        compile_id: dynamo's ``frame/compile`` id.
        target, downstream: who runs it.
        sites: every candidate site, matched or missed, in graph order of their kinds.
        pass_seconds: time per pass, in the order they ran.
        capture_seconds: time to bring the graph to ATen.
        nodes_before, nodes_after: graph sizes around the passes.
        has_matmul: whether the graph does enough for an empty result to be worth a word.
        unfused_reason: why the whole graph ran as it was, if it did.
        cache: what came of the compile cache: ``hit``, ``miss: why`` or ``off: why``.
        artifacts: the same for each graph that torchair converted; empty for compilers with a cache of their own.
        cache_seconds: time for the key, and to read or write the entry. On a hit no pass ran: their times are zero.
        graph: the rewritten graph with canonical ops, before lowering; None for a graph from the cache.
    """

    compile_id: str
    target: str
    downstream: str
    sites: list[Site] = field(default_factory=list)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    capture_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    has_matmul: bool = False
    unfused_reason: str = ""
    cache: str = ""
    artifacts: list[str] = field(default_factory=list)
    cache_seconds: float = 0.0
    graph: fx.GraphModule | None = None

    @property
    def matched(self) -> list[Site]:
        """Sites that were rewritten."""
        return [site for site in self.sites if site.matched]

    @property
    def missed(self) -> list[Site]:
        """Sites that were left as they were."""
        return [site for site in self.sites if not site.matched]

    def count(self, kind: str) -> int:
        """Number of matched sites of a kind."""
        return sum(site.kind == kind for site in self.matched)


def active_passes(options: Options) -> list[Pass]:
    """The passes that the options switch on, in order; a pass whose requirement is off is off too."""
    active: dict[str, Pass] = {}
    for cls in PIPELINE:
        on = options.passes.get(cls.name, cls.enabled_by_default)
        if on and all(name in active for name in cls.requires):
            active[cls.name] = cls()
    return [*active.values(), *options.extra_passes]


def run_passes(gm: fx.GraphModule, options: Options, report: GraphReport, dumper: GraphDumper) -> None:
    """Rewrite ``gm`` in place and fill in ``report``."""
    ctx = MatchContext(gm, Level(options.level))
    ctx.sites += _called_by_the_model(gm.graph)
    report.nodes_before = len(gm.graph.nodes)
    dumper.graph("captured", gm.graph)
    for item in active_passes(options):
        start = time.perf_counter()
        ctx.current = item
        with GraphTransformObserver(gm, item.name, subsystem="moe_fx"):
            item.run(ctx)
        report.pass_seconds[item.name] = time.perf_counter() - start
        dumper.graph(item.name, gm.graph)
    gm.graph.lint()
    gm.recompile()
    report.sites = ctx.sites + _uncaptured_experts(gm.graph, ctx.sites) + _unread_routers(gm.graph, ctx.sites)
    report.nodes_after = len(gm.graph.nodes)
    report.has_matmul = any(_is_matmul(node) for node in gm.graph.nodes)
    report.graph = copy_graph_module(gm)  # Lowering rewrites gm in place.


def _is_matmul(node: fx.Node) -> bool:
    return str(node.target).split(".")[1:2] in [["linear"], ["mm"], ["matmul"], ["bmm"], ["addmm"], ["einsum"]]


def lower(
    gm: fx.GraphModule, options: Options, report: GraphReport, dumper: GraphDumper, mode: str | None = None
) -> None:
    """Lower canonical ops to the report's target in place, and note in each site what will run it.

    Args:
        mode: ``torch.compile``'s.
    """
    target = targets.load(report.target).configured(options, mode)
    nodes = {node.name: node for node in gm.graph.nodes}
    for site in report.matched:
        if site.node in nodes:
            site.kernel = target.kernel_for(nodes[site.node], report.downstream)
    target.lower(gm, report.downstream)
    dumper.graph("lowered", gm.graph)


# The op that blocks with packed experts run; named here, since targets are loaded only to lower for them.
_PACKED_EXPERTS = "moe_fx_cpu::experts_packed"
_KIND_OF_OP = {
    "route": "router",
    "experts_int8": "experts",
    "experts_int4": "experts",
    "experts_packed": "experts",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
}


def _called_by_the_model(graph: fx.Graph) -> list[Site]:
    """Fused ops that are in the captured graph already: blocks that ``moe_fx.prepare`` or an engine put there."""
    return [
        Site(
            kind=_KIND_OF_OP.get(name, name),
            matched=True,
            pass_name="prepare",
            module=module_path(node),
            source=source_line(node),
            form=f"prepared {node.kwargs.get('packed_as', '')}".rstrip(),
            level=Level.TOLERANCE,
            op=str(node.target).removesuffix(".default"),
            node=node.name,
            attributes=dict(node.kwargs),
        )
        for node in graph.nodes
        if (name := targets.canonical_name(node) or _packed_name(node)) is not None
    ]


def _packed_name(node: fx.Node) -> str | None:
    called = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == _PACKED_EXPERTS
    return _PACKED_EXPERTS.split("::")[1] if called else None


PREPARE_HINT = "call moe_fx.prepare(model) before torch.compile"


def _uncaptured_experts(graph: fx.Graph, sites: Sequence[Site]) -> list[Site]:
    """Routers whose selection no experts in this graph consume: their MoE block was left outside the graph."""
    nodes = {node.name: node for node in graph.nodes}
    missed_experts = any(site.kind == "experts" and not site.matched for site in sites)
    found = []
    for site in sites:
        if site.kind != "router" or not site.matched or missed_experts:
            continue
        route = nodes.get(site.node)
        if route is None or _consumed(route):
            continue
        module = module_path(route)
        found.append(
            Site(
                kind="experts",
                matched=False,
                pass_name="capture",
                module=module,
                source=source_line(route),
                reason=(
                    f"the experts that {module_class(route) or 'this router'} feeds are not in the graph "
                    f"(dynamo cannot capture their loop); {PREPARE_HINT}"
                ),
                node=route.name,
            )
        )
    return found


def _unread_routers(graph: fx.Graph, sites: Sequence[Site]) -> list[Site]:
    """Matched experts whose ids no canonical route made, and whose selection is no top-k that was already reported."""
    reported = {site.module for site in sites if site.kind == "router"}
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for site in sites:
        experts = nodes.get(site.node)
        if site.kind != "experts" or not site.matched or experts is None:
            continue
        ids = peel(experts.args[2], *VIEWS, *CASTS)
        if is_op(ids, operator.getitem):
            ids = ids.args[0]
        block = site.module.rpartition(".")[0]
        if is_op(ids, torch.ops.moe_fx.route) or any(module.startswith(block) for module in reported):
            continue
        found.append(
            Site(
                kind="router",
                matched=False,
                pass_name="router",
                module=module_path(ids) or block,
                source=source_line(ids),
                reason=f"expert ids come from {describe(ids)}, not from a top-k over scores",
                node=ids.name,
            )
        )
    return found


def _consumed(route: fx.Node) -> bool:
    """Whether the selected ids steer anything here: some floating result depends on them."""
    ids = getitems(route).get(1)
    if ids is None:
        return True
    return reaches(ids, lambda n: _is_floating(value(n)), lambda n: n.op == "call_function", limit=200)


def _is_floating(fake: object) -> bool:
    return isinstance(fake, torch.Tensor) and fake.dtype.is_floating_point
