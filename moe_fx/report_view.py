"""How an :class:`~moe_fx.explain.Explanation` looks: in a terminal, as plain text, and in HTML.

All three show the same rows. Sites of repeated layers that ended alike share one row, so that a model of 48 layers is
as readable as one of two.
"""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moe_fx.explanation import Explanation
    from moe_fx.passes.core import Site

__all__ = ["TEXT_WIDTH", "Row", "fragment", "page", "render", "rows", "text"]

TEXT_WIDTH = 160
"""Columns of the plain-text form; longer cells wrap."""

_HEADINGS = ("kind", "where", "source", "form", "level", "runs on, or why not")


@dataclass(frozen=True)
class Row:
    """One line of the table: a site, or the sites of repeated layers."""

    matched: bool
    kind: str
    where: str
    source: str
    form: str
    level: str
    outcome: str
    count: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts under the headings."""
        where = self.where or "(no module)"
        times = f" ×{self.count}" if self.count > 1 else ""
        return self.kind, where + times, self.source, self.form, self.level, self.outcome


def rows(sites: Iterable[Site]) -> list[Row]:
    """Rows in the order in which their first sites were found."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        # Layers differ in the names of their nodes, which reasons quote.
        outcome = site.kernel if site.matched else re.sub(r"(%[A-Za-z_]+)\d*", r"\1", site.reason)
        key = (site.matched, site.kind, _short_source(site.source), site.form, site.level, outcome)
        groups.setdefault(key, []).append(site)
    found = []
    for members in groups.values():
        first = members[0]
        for where, count in _merge_paths(Counter(site.module for site in members)):
            found.append(
                Row(
                    matched=first.matched,
                    kind=first.kind,
                    where=where,
                    source=_short_source(first.source),
                    form=first.form,
                    level=first.level.value if first.level else "",
                    outcome=first.kernel if first.matched else first.reason,
                    count=count,
                )
            )
    return found


def _short_source(source: str) -> str:
    """``file:line`` without folders and code."""
    match = re.match(r"(.*?:\d+)(?: |$)", source)
    return PurePath(match[1]).name if match else source


def _merge_paths(paths: Counter[str]) -> list[tuple[str, int]]:
    """Paths that differ in numbers only, as one path with ranges: ``layers.{0..47}.mlp``."""
    merged: dict[tuple[str, ...], int] = {tuple(path.split(".")): count for path, count in paths.items()}
    depth = max(map(len, merged), default=0)
    for position in reversed(range(depth)):
        groups: dict[tuple[object, ...], dict[int, tuple[str, ...]]] = {}
        kept: dict[tuple[str, ...], int] = {}
        for path in merged:
            if position < len(path) and path[position].isdecimal():
                key = (path[:position], path[position + 1 :])
                groups.setdefault(key, {})[int(path[position])] = path
            else:
                kept[path] = merged[path]
        for members in groups.values():
            whole = next(iter(members.values()))
            if len(members) > 1:
                whole = (*whole[:position], _ranges(sorted(members)), *whole[position + 1 :])
            kept[whole] = sum(merged[path] for path in members.values())
        merged = kept
    return [(".".join(path), count) for path, count in merged.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """``{0..3,7}`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


# --- Facts beside the table, as plain sentences ----------------------------------------------------------------------


def _headline(explanation: Explanation) -> str:
    targets = sorted({f"{graph.target}, finished by {graph.downstream}" for graph in explanation.graphs})
    name = explanation.model or "model"
    graphs = _count(len(explanation.graphs), "graph")
    return f"{name}: {graphs}" + (f" ({'; '.join(targets)})" if targets else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _totals(explanation: Explanation) -> str:
    def listing(sites: Sequence[Site]) -> str:
        counts = Counter(site.kind for site in sites)
        return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"

    return f"matched: {listing(explanation.matched)}; missed: {listing(explanation.missed)}"


def _unfused(explanation: Explanation) -> Iterator[str]:
    for graph in explanation.graphs:
        if graph.unfused_reason:
            yield f"graph {graph.compile_id} runs unfused: {graph.unfused_reason}"


def _breaks(explanation: Explanation) -> Iterator[str]:
    for item in explanation.graph_breaks:
        times = f" ×{item.count}" if item.count > 1 else ""
        where = f" at {item.source}" if item.source else ""
        yield f"graph break{where}{times}: {_short_reason(item.reason)}"


def _short_reason(reason: str) -> str:
    """Dynamo's message without its context for dynamo's developers."""
    reason = reason.split("Developer debug context:")[0]
    return "\n".join(line.rstrip() for line in reason.strip().splitlines() if line.strip())


def _facts(explanation: Explanation) -> Iterator[str]:
    if explanation.recompiles:
        yield _count(explanation.recompiles, "recompile")
    if explanation.graphs:
        before = sum(graph.nodes_before for graph in explanation.graphs)
        after = sum(graph.nodes_after for graph in explanation.graphs)
        yield f"nodes: {before} before the passes, {after} after"
        capture = sum(graph.capture_seconds for graph in explanation.graphs)
        times = [("capture", capture), *((p.name, p.seconds) for p in explanation.passes_summary())]
        total = sum(seconds for _, seconds in times)
        yield f"time: {total:.2f} s (" + ", ".join(f"{name} {seconds:.2f}" for name, seconds in times) + ")"
        outcomes = Counter(graph.cache for graph in explanation.graphs if graph.cache)
        if outcomes:
            yield "compile cache: " + "; ".join(f"{text} ×{n}" if n > 1 else text for text, n in outcomes.items())


# --- Terminal and plain text -----------------------------------------------------------------------------------------


def render(explanation: Explanation) -> RenderableType:
    """The explanation for a rich console."""
    parts: list[RenderableType] = [Text(_headline(explanation), style="bold")]
    parts += [Text(f"note: {note}", style="yellow") for note in explanation.notes]
    found = rows(explanation.sites)
    if found:
        parts.append(_Sites(found))
    parts.append(Text(_totals(explanation), style="red" if explanation.missed else "green"))
    parts += [Text(line, style="red") for line in _unfused(explanation)]
    parts += [_indented(line) for line in _breaks(explanation)]
    parts += [Text(line, style="dim") for line in _facts(explanation)]
    return Group(*parts)


class _Sites:
    """The rows: one line each where they fit, else two."""

    def __init__(self, found: Sequence[Row]) -> None:
        self._rows = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._wide()
        fits = console.measure(wide, options=options.update(width=_UNLIMITED)).maximum <= options.max_width
        yield wide if fits or options.max_width >= TEXT_WIDTH else self._narrow()

    def _wide(self) -> Table:
        table = Table("", *_HEADINGS, box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in table.columns[1:]:
            column.overflow = "fold"
        for row in self._rows:
            *cells, outcome = row.cells
            table.add_row(_mark(row), *map(Text, cells), _outcome(row, outcome))
        return table

    def _narrow(self) -> Padding:
        table = Table.grid("", "", "", padding=(0, 2, 0, 0))
        table.columns[2].overflow = "fold"
        for row in self._rows:
            kind, where, source, form, level, outcome = row.cells
            table.add_row(_mark(row), Text(kind), Text(where))
            details = Text("".join(f"{part}, " for part in (source, form, level) if part), style="dim")
            table.add_row("", "", details.append_text(_outcome(row, outcome)))
        return Padding(table, (1, 0))


# Wide enough for any row on one line.
_UNLIMITED = 10_000


def _mark(row: Row) -> Text:
    return Text("✓", style="green") if row.matched else Text("✗", style="bold red")


def _outcome(row: Row, outcome: str) -> Text:
    return Text(outcome, style="" if row.matched else "not dim red")


def _indented(message: str) -> Group:
    """The first line as it is, the rest of a long message under it."""
    first, _, rest = message.partition("\n")
    return Group(Text(first, style="yellow"), *([Padding(Text(rest), (0, 0, 0, 2))] if rest else []))


def text(explanation: Explanation) -> str:
    """The explanation without colour, :data:`TEXT_WIDTH` columns wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=TEXT_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(render(explanation))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


# --- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = (
    ".moe-fx{font:13px/1.5 system-ui,sans-serif}.moe-fx table{border-collapse:collapse;margin:.6em 0}"
    ".moe-fx th,.moe-fx td{text-align:left;vertical-align:top;padding:2px 12px 2px 0;border-bottom:1px solid #8884}"
    ".moe-fx code{font-family:ui-monospace,monospace}.moe-fx .missed{color:#c62828}.moe-fx pre{white-space:pre-wrap}"
)


def fragment(explanation: Explanation) -> str:
    """The explanation as one ``<div>``, for a notebook."""
    lines = [f"<h3>{html.escape(_headline(explanation))}</h3>"]
    lines += [f"<p>note: {html.escape(note)}</p>" for note in explanation.notes]
    found = rows(explanation.sites)
    if found:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *_HEADINGS))
        lines.append(f"<table><tr>{head}</tr>" + "".join(map(_html_row, found)) + "</table>")
    lines.append(f"<p><b>{html.escape(_totals(explanation))}</b></p>")
    lines += [f'<p class="missed">{html.escape(line)}</p>' for line in _unfused(explanation)]
    lines += [f"<pre>{html.escape(line)}</pre>" for line in _breaks(explanation)]
    lines += [f"<p>{html.escape(line)}</p>" for line in _facts(explanation)]
    return f'<div class="moe-fx"><style>{_STYLE}</style>' + "\n".join(lines) + "</div>"


def _html_row(row: Row) -> str:
    kind, where, source, form, level, outcome = map(html.escape, row.cells)
    state, mark = ("matched", "✓") if row.matched else ("missed", "✗")
    return (
        f'<tr class="{state}"><td>{mark}</td><td>{kind}</td><td><code>{where}</code></td>'
        f"<td><code>{source}</code></td><td>{form}</td><td>{level}</td><td>{outcome}</td></tr>"
    )


def page(explanation: Explanation) -> str:
    """The explanation as a page of its own."""
    title = html.escape(_headline(explanation))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
        f"<body>\n{fragment(explanation)}\n</body></html>\n"
    )
