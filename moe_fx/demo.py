"""``python -m moe_fx.demo``: what moe-fx does to a real model, on the CPU, in about two minutes.

Builds a Qwen3-MoE with the layers of Qwen3-30B-A3B and random weights, compiles it with Inductor alone and with
``backend="moe_ascend"``, and reports what was fused, how far the results are from eager, and how the three compare in
speed for one token and for a short prompt. Exit status: 0 when all MoE blocks were fused and the results agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moe_fx.backend import moe_ascend
from moe_fx.demo_model import ModelShape, build_model, random_tokens
from moe_fx.errors import CheckError, MoeFxError
from moe_fx.explanation import Explanation
from moe_fx.pipeline import GraphReport
from moe_fx.timing import interleaved_medians

__all__ = ["DemoReport", "main", "render", "run"]

# Relative L2 error of bf16 logits against eager: the bound on `experts` itself, or twice what Inductor alone shows. It
# keeps fp32 where eager rounds to bf16, which now and then tips a tie in a router.
LOGITS_BOUND = 2e-2
LOGITS_BOUND_OVER_INDUCTOR = 2.0
_PER_LAYER = ("router", "experts", "qk_norm_rope")


@dataclass(frozen=True)
class Accuracy:
    """Logits of a compiled model against eager on the prompt."""

    max_abs: float
    rel_l2: float
    top1_agreement: float


@dataclass
class DemoReport:
    """Everything that the demo found; ``problems`` is empty when all is well."""

    shape: ModelShape
    tokens: int
    explanation: Explanation | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    experts_equal: bool = False
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        return {
            "shape": asdict(self.shape),
            "tokens": self.tokens,
            "threads": torch.get_num_threads(),
            "explanation": self.explanation.to_dict() if self.explanation else None,
            "accuracy": {name: asdict(accuracy) for name, accuracy in self.accuracy.items()},
            "experts_equal": self.experts_equal,
            "seconds_per_call": self.seconds,
            "problems": self.problems,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, print its report and return the exit status; ``argv`` defaults to the process's arguments."""
    arguments = _arguments(argv)
    shape = ModelShape(layers=arguments.layers)
    progress = Console(stderr=arguments.json)
    try:
        report = run(shape, tokens=arguments.tokens, console=progress)
    except MoeFxError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(render(report))
    return 1 if report.problems else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moe_fx.demo", description="Show what moe-fx does to a model.")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="layers of the model (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def run(
    shape: ModelShape, *, tokens: int = 64, console: Console | None = None, seconds_per_timing: float = 6.0
) -> DemoReport:
    """Build, compile, compare and measure.

    Args:
        shape: of the model; tests give a tiny one.
        tokens: length of the prompt.
        console: where progress goes; nowhere when None.
        seconds_per_timing: how long to measure each number of tokens.
    """
    steps = _Steps(console)
    report = DemoReport(shape, tokens)
    prompt, one_token = random_tokens(shape, tokens), random_tokens(shape, 1)
    with torch.no_grad(), warnings.catch_warnings():
        # Dynamo's remarks on the model's code: it is not the user's. Misses are in the report.
        warnings.simplefilter("ignore")
        with steps("build the model"):
            model = build_model(shape)
        with steps("run eager"):
            expected = _logits(model, prompt)
        graphs: list[GraphReport] = []
        calls: dict[str, Callable[..., Any]] = {"eager": model}
        with steps("compile with Inductor alone"):
            calls["inductor"] = _compiled(model, (prompt, one_token), backend="inductor")
        with steps("compile with moe_ascend"):
            options = {"report": graphs.append}
            calls["moe_ascend"] = _compiled(model, (prompt, one_token), backend="moe_ascend", options=options)
        report.explanation = Explanation(graphs[:1], model=type(model).__name__)
        with steps("compare with eager"):
            for name in ("inductor", "moe_ascend"):
                report.accuracy[name] = _compare(_logits(calls[name], prompt), expected)
        with steps("check the selected experts, op by op"):
            report.experts_equal, check_failure = _check(model, prompt)
        for ids in (one_token, prompt):
            with steps(f"time {_tokens_text(ids.shape[1])}"):
                candidates = {name: _bound(call, ids) for name, call in calls.items()}
                report.seconds[str(ids.shape[1])] = interleaved_medians(candidates, budget_seconds=seconds_per_timing)
    report.problems = [*_problems(report), *([check_failure] if check_failure else [])]
    return report


class _Steps:
    """Shows each step while it runs, and how long it took."""

    def __init__(self, console: Console | None) -> None:
        self._console = console

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        if self._console is None:
            yield
            return
        start = time.perf_counter()
        with self._console.status(what):
            yield
        self._console.print(f"[green]✓[/] {what} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)


def _logits(call: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = call(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def _bound(call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], object]:
    return lambda: call(input_ids=ids, use_cache=False)


def _compiled(model: torch.nn.Module, inputs: Sequence[torch.Tensor], **how: Any) -> Callable[..., Any]:
    """The compiled model, called on each input, so that nothing is left to compile."""
    compiled = torch.compile(model, dynamic=False, **how)
    for ids in inputs:
        compiled(input_ids=ids, use_cache=False)
    return compiled


def _compare(got: torch.Tensor, want: torch.Tensor) -> Accuracy:
    return Accuracy(
        max_abs=float((got - want).abs().max()),
        rel_l2=float((got - want).norm() / want.norm()),
        top1_agreement=float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    )


def _check(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[bool, str]:
    """Whether every router selects eager's experts, with what the check found wrong, if anything.

    The live check gives each fused op the very inputs that the unfused one had: end to end, a rounding before a router
    may rightly tip a tie.
    """
    checking = torch.compile(model, backend=moe_ascend, dynamic=False, options={"check": True, "downstream": "eager"})
    try:
        checking(input_ids=prompt, use_cache=False)
    except CheckError as error:
        return "moe_fx.route" not in str(error), str(error)
    return True, ""


def _problems(report: DemoReport) -> list[str]:
    assert report.explanation is not None
    problems = [f"the graph runs unfused: {g.unfused_reason}" for g in report.explanation.graphs if g.unfused_reason]
    counts = report.explanation.counts
    for kind in _PER_LAYER:
        if counts.get(kind, 0) != report.shape.layers:
            problems.append(f"{counts.get(kind, 0)} of {report.shape.layers} layers had their {kind} matched")
    problems += [f"{site.kind} at {site.module} was missed: {site.reason}" for site in report.explanation.missed]
    error = report.accuracy["moe_ascend"].rel_l2
    bound = max(LOGITS_BOUND, LOGITS_BOUND_OVER_INDUCTOR * report.accuracy["inductor"].rel_l2)
    if not error <= bound:
        problems.append(f"the logits' relative L2 error against eager is {error:.2g}, above {bound:.2g}")
    return problems


def _tokens_text(count: int) -> str:
    return "1 token (decode)" if count == 1 else f"{count} tokens (prefill)"


def render(report: DemoReport) -> RenderableType:
    """The report for a terminal."""
    shape = report.shape
    parts: list[RenderableType] = [
        Text(
            f"\nQwen3-MoE, {shape.layers} layers of {shape.experts} experts ({shape.top_k} per token), "
            f"bf16, {torch.get_num_threads()} threads\n",
            style="bold",
        )
    ]
    if report.explanation is not None:
        parts.append(report.explanation)
    parts += [_accuracy_table(report), _speed_table(report)]
    if report.problems:
        parts += [Text(f"✗ {problem}", style="bold red") for problem in report.problems]
    else:
        parts.append(Text("✓ every MoE block is fused, and the results agree with eager", style="bold green"))
    return Group(*parts)


def _accuracy_table(report: DemoReport) -> Table:
    table = Table(title="\nlogits against eager", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("", "max abs error", "relative L2", "same top-1"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, accuracy in report.accuracy.items():
        table.add_row(name, f"{accuracy.max_abs:.3g}", f"{accuracy.rel_l2:.3g}", f"{accuracy.top1_agreement:.1%}")
    same = "equal" if report.experts_equal else "different"
    table.caption = f"experts selected on equal inputs: {same}"
    table.caption_justify = "left"
    return table


def _speed_table(report: DemoReport) -> Table:
    table = Table(title="\nspeed", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("", "eager", "inductor", "moe_ascend", "against eager", "against inductor"):
        table.add_column(heading, justify="right" if heading else "left")
    for count, seconds in report.seconds.items():
        ours = seconds["moe_ascend"]
        table.add_row(
            _tokens_text(int(count)),
            *(f"{seconds[name] * 1e3:.1f} ms" for name in ("eager", "inductor", "moe_ascend")),
            *(f"{seconds[name] / ours:.2f}×" for name in ("eager", "inductor")),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
