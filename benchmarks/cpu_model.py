"""Whole-model speed on the CPU: moe_ascend against Inductor alone and eager, on Qwen3-30B-A3B's layers.

    python benchmarks/cpu_model.py
    python benchmarks/cpu_model.py --tokens 1 64 --implementations grouped_mm --layers 2

The claim under test: moe_ascend is never slower than Inductor alone. The three are called in turn, and medians are
compared. A row is left out where eager would gather more expert weights than --max-gather-gib (batched_mm copies the
weights of every token's experts).

On a machine that is shared with other work, set OMP_WAIT_POLICY=passive: GNU OpenMP's threads wait by spinning, and on
taken cores every operation then lasts as long as the scheduler's time slice.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_fx.demo_model import ModelShape, build_model, random_tokens
from moe_fx.timing import interleaved_medians

BACKENDS = ("inductor", "moe_ascend")


def main() -> int:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = ModelShape(layers=arguments.layers)
    console = Console(stderr=True)
    results = []
    for implementation in arguments.implementations:
        with console.status(f"building the model ({implementation})"):
            model = build_model(shape, implementation)
        for tokens in arguments.tokens:
            gathered = tokens * shape.top_k * shape.expert_bytes / 2**30
            if implementation == "batched_mm" and gathered > arguments.max_gather_gib:
                console.print(f"{implementation}, {tokens} tokens: left out, eager would gather {gathered:.1f} GiB")
                continue
            with console.status(f"{implementation}, {tokens} tokens: compiling"):
                candidates = _candidates(model, random_tokens(shape, tokens))
            with console.status(f"{implementation}, {tokens} tokens: measuring"):
                medians = interleaved_medians(candidates, budget_seconds=arguments.seconds)
            results.append({"implementation": implementation, "tokens": tokens, "seconds": medians})
        del model
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "layers": shape.layers, "results": results}, indent=2))
    else:
        Console().print(_table(results, shape))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="layers of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256], help="tokens per call")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=("grouped_mm", "batched_mm"),
        default=["grouped_mm", "batched_mm"],
        help="how transformers writes the experts",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--max-gather-gib", type=float, default=4.0, help="see above (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def _candidates(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The eager model and its compiled forms, each called once, so that nothing compiles while it is measured."""

    def calling(fn: Callable[..., Any]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return fn(input_ids=ids, use_cache=False)

        return call

    torch._dynamo.reset()
    candidates = {"eager": calling(model)}
    for backend in BACKENDS:
        candidates[backend] = calling(torch.compile(model, backend=backend, dynamic=False))
        candidates[backend]()
    return candidates


def _table(results: list[dict[str, Any]], shape: ModelShape) -> Table:
    table = Table(
        title=f"Qwen3-30B-A3B, {shape.layers} layer(s), bf16, {torch.get_num_threads()} threads: microseconds per call"
    )
    for heading in ("experts", "tokens", "eager", "inductor", "moe_ascend", "vs eager", "vs inductor"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for result in results:
        seconds = result["seconds"]
        ratios = [seconds[other] / seconds["moe_ascend"] for other in ("eager", "inductor")]
        table.add_row(
            result["implementation"],
            str(result["tokens"]),
            *(f"{seconds[name] * 1e6:,.0f}" for name in ("eager", *BACKENDS)),
            *(f"[{'green' if ratio >= 0.98 else 'red'}]{ratio:.2f}×[/]" for ratio in ratios),
        )
    return table


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
