"""What the compile cache saves at start: a cold and a warm first call of a Qwen3-30B-A3B-shaped model of 48 layers.

    python benchmarks/cache_start.py
    python benchmarks/cache_start.py --layers 8 --dynamic --downstream eager

Each start is a process of its own; caches (moe-fx's and Inductor's) are made for the benchmark and removed. The graph
is the real model's: 48 layers of 128 experts, 8 per token, 32 heads over 4. Only its widths are small (hidden size 64),
since compiling does not depend on them. moe-fx's share is its backend's time without the downstream compiler's; the
target is under a tenth when warm. ``Inductor's alone`` is a start with ``cache=False`` over a filled Inductor cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STARTS = {"cold": True, "Inductor's alone": False, "warm": True}
"""Each start, and whether it uses moe-fx's cache. They run in this order."""


@dataclass
class Start:
    """Seconds of one first call, by what they went to, and what came of the cache."""

    cache: str
    total: float
    dynamo: float
    key_and_entry: float
    capture: float
    passes: float
    moe_fx: float
    downstream: float
    matched: int


def main() -> int:
    arguments = _arguments()
    if arguments.child:
        print(json.dumps(asdict(_first_call(arguments))))
        return 0
    console, starts = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in STARTS.items():
            with console.status(f"{name} start"):
                starts[name] = _run_child(Path(folder), cache)
    if arguments.json:
        print(json.dumps({name: asdict(start) for name, start in starts.items()}, indent=2))
    else:
        Console().print(_table(starts, arguments))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48, help="layers of the model (default: %(default)s)")
    parser.add_argument("--dynamic", action="store_true", help="symbolic sizes")
    parser.add_argument("--downstream", choices=("inductor", "eager", "aot_eager"), default="inductor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_child(folder: Path, cache: bool) -> Start:
    environment = {
        **os.environ,
        "MOE_FX_CACHE_DIR": str(folder / "moe_fx"),
        "MOE_FX_CACHE": "on" if cache else "off",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def _first_call(arguments: argparse.Namespace) -> Start:
    import torch

    from moe_fx import backend, downstream
    from moe_fx.demo_model import ModelShape, build_model, random_tokens
    from moe_fx.pipeline import GraphReport

    warnings.simplefilter("ignore")
    shape = ModelShape(layers=arguments.layers, hidden=64, expert_hidden=32, head_dim=16, vocabulary=256)
    model, ids = build_model(shape), random_tokens(shape, 16)
    seconds: dict[str, float] = {}
    reports: list[GraphReport] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return run

    downstream.compile_graph = timed("downstream", downstream.compile_graph)  # type: ignore[assignment]
    options = {"downstream": arguments.downstream, "report": reports.append}
    compiled = torch.compile(
        model, backend=timed("backend", backend.moe_ascend), dynamic=arguments.dynamic, options=options
    )
    start = time.perf_counter()
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    total = time.perf_counter() - start
    (report,) = reports
    return Start(
        cache=report.cache,
        total=total,
        dynamo=total - seconds["backend"],
        key_and_entry=report.cache_seconds,
        capture=report.capture_seconds,
        passes=sum(report.pass_seconds.values()),
        moe_fx=seconds["backend"] - seconds["downstream"],
        downstream=seconds["downstream"],
        matched=len(report.matched),
    )


def _table(starts: dict[str, Start], arguments: argparse.Namespace) -> Table:
    cold, warm = starts["cold"], starts["warm"]
    table = Table(
        title=f"first call, {arguments.layers} layers, {'dynamic' if arguments.dynamic else 'static'} sizes, seconds",
        caption=f"moe-fx's share of a warm start is {warm.moe_fx / cold.moe_fx:.1%} of a cold one's",
    )
    table.add_column("")
    for name in starts:
        table.add_column(name, justify="right")
    rows = {
        "moe-fx: capture": "capture",
        "moe-fx: passes": "passes",
        "moe-fx: key, entry": "key_and_entry",
        "moe-fx in all": "moe_fx",
        f"downstream ({arguments.downstream})": "downstream",
        "dynamo, and the call": "dynamo",
        "first call": "total",
    }
    for label, field in rows.items():
        table.add_row(label, *(f"{getattr(start, field):.2f}" for start in starts.values()))
    table.add_row("sites matched", *(str(start.matched) for start in starts.values()))
    table.add_row("cache", *(start.cache for start in starts.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
