"""Time of every pass on the whole graph of a large model: Qwen3-30B-A3B, 48 layers, without weights.

    python benchmarks/pass_time.py
    python benchmarks/pass_time.py --profile

The graph is captured once (dynamo's own time is not counted); the passes then run on copies of it, and the fastest run
counts. The target is under five seconds for all passes together.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx
from torch._subclasses import FakeTensorMode

from moe_fx.capture import capture, copy_graph_module
from moe_fx.demo_model import ModelShape, build_model
from moe_fx.dump import GraphDumper
from moe_fx.options import Options
from moe_fx.pipeline import GraphReport, lower, run_passes


def main() -> int:
    arguments = _arguments()
    console = Console(stderr=True)
    with console.status(f"capturing {arguments.layers} layers"):
        graph, capture_seconds = _captured(arguments.layers, arguments.tokens, arguments.experts_implementation)
    reports = []
    for index in range(arguments.repeat):
        with console.status(f"run {index + 1} of {arguments.repeat}"):
            reports.append(_run(graph))
    best = min(reports, key=lambda report: sum(report.pass_seconds.values()))
    if arguments.profile:
        _profile(graph)
    lower_seconds = _lower(best)
    if arguments.json:
        seconds = {"capture": capture_seconds, "passes": best.pass_seconds, "lower": lower_seconds}
        print(json.dumps({"nodes": best.nodes_before, "seconds": seconds}, indent=2))
    else:
        Console().print(_table(best, capture_seconds, lower_seconds))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48, help="layers of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per call (default: %(default)s)")
    parser.add_argument("--experts-implementation", choices=("grouped_mm", "batched_mm"), default="grouped_mm")
    parser.add_argument("--repeat", type=int, default=3, help="runs of the passes (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print the 15 functions that take the most time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def _captured(layers: int, tokens: int, experts_implementation: str) -> tuple[fx.GraphModule, float]:
    """The graph of the whole model as the passes get it, and the seconds that moe-fx took to capture it."""
    found: list[tuple[fx.GraphModule, float]] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        captured = capture(gm, example_inputs)
        found.append((captured, time.perf_counter() - start))
        return gm.forward

    with FakeTensorMode(), torch.no_grad():
        model = build_model(ModelShape(layers=layers, vocabulary=151_936), experts_implementation)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        torch.compile(model, backend=keep, dynamic=False)(input_ids=ids, use_cache=False)
    if len(found) != 1:
        raise SystemExit(f"the model was captured as {len(found)} graphs; this benchmark needs one")
    return found[0]


def _run(graph: fx.GraphModule) -> GraphReport:
    report = GraphReport("0/0", "cpu", "inductor")
    run_passes(copy_graph_module(graph), Options(), report, GraphDumper(None, "0/0"))
    return report


def _lower(report: GraphReport) -> float:
    assert report.graph is not None
    start = time.perf_counter()
    lower(report.graph, Options(), report, GraphDumper(None, report.compile_id))
    return time.perf_counter() - start


def _profile(graph: fx.GraphModule) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(_run, graph)
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(15)


def _table(report: GraphReport, capture_seconds: float, lower_seconds: float) -> Table:
    title = f"{report.nodes_before} nodes before the passes, {report.nodes_after} after"
    table = Table(title=title, caption=f"capture {capture_seconds:.2f} s, lowering to cpu {lower_seconds:.2f} s")
    table.add_column("pass")
    table.add_column("seconds", justify="right")
    table.add_column("matched", justify="right")
    table.add_column("missed", justify="right")
    for name, seconds in report.pass_seconds.items():
        ended = [site.matched for site in report.sites if site.pass_name == name]
        table.add_row(name, f"{seconds:.3f}", str(sum(ended)), str(len(ended) - sum(ended)))
    table.add_section()
    table.add_row(
        "total", f"{sum(report.pass_seconds.values()):.3f}", str(len(report.matched)), str(len(report.missed))
    )
    return table


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
