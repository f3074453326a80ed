"""What the compile cache saves at start: a cold and a warm first call of a Qwen3-30B-A3B-shaped model of 48 layers.

    python benchmarks/cache_start.py
    python benchmarks/cache_start.py --layers 8 --dynamic --downstream eager
    python benchmarks/cache_start.py --downstream torchair --mode npugraph_ex       # with torch_npu, on an NPU
    PYTHONPATH=tests/ascend python benchmarks/cache_start.py --downstream torchair  # or over the stand-in for CANN

Each start is a process of its own; caches (moe-fx's and Inductor's) are made for the benchmark and removed. The graph
is the real model's: 48 layers of 128 experts, 8 per token, 32 heads over 4. Only its widths are small (hidden size 64),
since compiling does not depend on them. moe-fx's share is its backend's time without the downstream compiler's, and
with what it spends to keep or to read torchair's converted graph; the target is under a tenth when warm. ``Inductor's
alone`` is a start with ``cache=False`` over a filled Inductor cache. Over torchair, attention is written out by the
model (``"eager"``).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STARTS = {"cold": True, "Inductor's alone": False, "warm": True}
"""Each start, and whether it uses moe-fx's cache. They run in this order; the second is for Inductor alone."""


@dataclass
class Start:
    """Seconds of one first call, by what they went to, and what came of the cache.

    Attributes:
        artifact: to keep or to read what torchair converted.
        moe_fx: all of moe-fx's, the artifact included.
        conversion: torchair's, from FX to GE.
        downstream: all of the downstream compiler's, the conversion and torchair's import included, the artifact not.
    """

    cache: str
    artifacts: str
    total: float
    dynamo: float
    call: float
    key_and_entry: float
    capture: float
    passes: float
    artifact: float
    moe_fx: float
    conversion: float
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
            if cache or arguments.downstream == "inductor":
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
    parser.add_argument("--downstream", choices=("inductor", "eager", "aot_eager", "torchair"), default="inductor")
    parser.add_argument("--mode", choices=("ge", "npugraph_ex"), default="ge", help="torchair's (default: %(default)s)")
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
    over_torchair = arguments.downstream == "torchair"
    if over_torchair:
        _load_stand_in()
    import torch

    from moe_fx import backend, downstream
    from moe_fx.cache.artifacts import Artifacts
    from moe_fx.demo_model import ModelShape, build_model, random_tokens
    from moe_fx.pipeline import GraphReport

    warnings.simplefilter("ignore")
    shape = ModelShape(layers=arguments.layers, hidden=64, expert_hidden=32, head_dim=16, vocabulary=256)
    model, ids = build_model(shape), random_tokens(shape, 12)
    options: dict[str, Any] = {"downstream": arguments.downstream}
    if over_torchair:
        model.set_attn_implementation("eager")  # type: ignore[operator]
        model, ids = model.to("npu"), ids.to("npu")
        options["downstream_options"] = {"mode": arguments.mode}
    seconds: dict[str, float] = defaultdict(float)
    reports: list[GraphReport] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    get_or_compile = timed("artifact", Artifacts.get_or_compile)

    def with_conversion(*args: Any, compile: Callable[[], Any], **kwargs: Any) -> Any:
        return get_or_compile(*args, compile=timed("conversion", compile), **kwargs)

    Artifacts.get_or_compile = with_conversion  # type: ignore[method-assign]
    compilers = downstream._COMPILERS
    compilers[arguments.downstream] = timed("downstream", compilers[arguments.downstream])
    compile_graph = timed("backend", backend.moe_ascend)
    compiled = torch.compile(
        model,
        backend=lambda *args, **kwargs: timed("call", compile_graph(*args, **kwargs)),
        dynamic=arguments.dynamic,
        options={**options, "report": reports.append},
    )
    start = time.perf_counter()
    if over_torchair:  # Whoever asks for it first would be charged with it.
        timed("import", importlib.import_module)("torchair.npu_fx_compiler")
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    total = time.perf_counter() - start
    (report,) = reports
    artifact = seconds["artifact"] - seconds["conversion"]
    return Start(
        cache=report.cache,
        artifacts=", ".join(report.artifacts),
        total=total,
        dynamo=total - seconds["import"] - seconds["backend"] - seconds["call"],
        call=seconds["call"],
        key_and_entry=report.cache_seconds,
        capture=report.capture_seconds,
        passes=sum(report.pass_seconds.values()),
        artifact=artifact,
        moe_fx=seconds["backend"] - seconds["downstream"] + artifact,
        conversion=seconds["conversion"],
        downstream=seconds["import"] + seconds["downstream"] - artifact,
        matched=len(report.matched),
    )


def _load_stand_in() -> None:
    """Put the stand-in under torch_npu, before torch is imported, where ``PYTHONPATH`` leads to it."""
    if importlib.util.find_spec("host_cann") is not None:
        importlib.import_module("host_cann.preload")
        importlib.import_module("host_cann").install()


def _table(starts: dict[str, Start], arguments: argparse.Namespace) -> Table:
    cold, warm = starts["cold"], starts["warm"]
    over_torchair = arguments.downstream == "torchair"
    finisher = f"torchair, {arguments.mode}" if over_torchair else arguments.downstream
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
        "moe-fx: converted graph": "artifact",
        "moe-fx in all": "moe_fx",
        "FX to GE": "conversion",
        f"downstream in all ({finisher})": "downstream",
        "dynamo": "dynamo",
        "the call": "call",
        "first call": "total",
    }
    of_ge = ("artifact", "conversion")
    for label, field in rows.items():
        if field not in of_ge or warm.artifacts:
            table.add_row(label, *(f"{getattr(start, field):.2f}" for start in starts.values()))
    table.add_row("sites matched", *(str(start.matched) for start in starts.values()))
    table.add_row("cache", *(start.cache for start in starts.values()))
    if warm.artifacts:
        table.add_row("cache of converted graphs", *(start.artifacts for start in starts.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
