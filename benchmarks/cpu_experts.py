"""Speed of the CPU expert engine against the machine's memory and against its peers, one MoE layer at a time.

    python benchmarks/cpu_experts.py                                   # the engine: all formats, 1 and 2 threads
    python benchmarks/cpu_experts.py --install-peers                   # environments for the peers, once
    python benchmarks/cpu_experts.py --peers --threads 2 --formats w8a8 --tokens 1 8

Each cell shows microseconds per call, the bandwidth at which weights were read (the bytes of the distinct experts that
the call hit, scales included, as the candidate stores them), and that bandwidth as a fraction of what a plain streaming
read reaches; for 64 tokens and more, GFLOP/s too. Weights are cold: calls go through several layers and random
routings, which exceed the last-level cache many times.

Every candidate runs in a process of its own and answers calls in turn: a round is a few calls of each candidate, with a
streaming read before and after each, so that what slows the machine slows all of them; a fraction is taken of the two
reads beside a call. Medians are shown. On a machine that does other work too, a round in which that took more than a
tenth of the CPUs does not count; a cell for which too few quiet rounds came by counts them all and is marked with ~.

A candidate's result is compared with an fp32 reference before it is timed; one that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from catalog import ENGINE, PEERS, Candidate
from layer import FORMATS, SHAPES, Shape

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
# From here on, a row shows GFLOP/s.
PREFILL = 64

MIB = 1 << 20
STREAM_BYTES = 256 * MIB
# The layers that calls go through hold at least this many times the last-level cache.
CACHES = 32
# The largest relative error against the reference: int8 activations of this size of layer give 0.03.
ERROR_BOUND = 0.05

# A request's calls should last this long, since waking a process costs too.
REQUEST_SECONDS = 0.05
MAX_CALLS = 16
MIN_ROUNDS = 5
# The share of the CPUs that others may take in a round.
QUIET = 0.1
# A packed layer and the source that it is packed from are both in memory for a while; some peers keep both.
MEMORY_FACTOR = 2


def main() -> int:
    arguments = _arguments()
    console = Console(stderr=True)
    if arguments.install_peers:
        return _install(console)
    peers = [] if arguments.peers is None else [PEERS[name] for name in arguments.peers or PEERS]
    stream = _streaming_read()
    results = []
    for layer in arguments.layer:
        for threads in arguments.threads:
            for form in arguments.formats:
                bench = Bench(SHAPES[layer], form, threads, arguments.seconds, arguments.patience, stream, console)
                results.append(bench.run([ENGINE, *peers], arguments.tokens))
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        for table, notes in tables(results):
            Console().print(table)
            Console().print(notes, soft_wrap=True, highlight=False, markup=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="weights and activations")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens per call")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads (default: 1 2)")
    parser.add_argument("--layer", nargs="+", choices=SHAPES, default=list(SHAPES), help="which layers")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="compare with these peers (no name: with all that are installed)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each row (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        help="time to wait, for each row, for a machine that does nothing else (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--install-peers", action="store_true", help="make the peers' environments, and nothing else")
    return parser.parse_args()


def _install(console: Console) -> int:
    failures = 0
    for peer in PEERS.values():
        if peer.installs:
            with console.status(f"installing {peer.name} into {peer.folder}"):
                reason = peer.install()
            console.print(f"{peer.name}: {reason or f'installed in {peer.folder}'}")
            failures += reason is not None
    return 1 if failures else 0


def _streaming_read() -> Callable[[int], float]:
    """GB/s at which the engine's threads read memory, by their number."""
    import torch

    from moe_fx import _C

    buffer = _C.HugeBuffer(STREAM_BYTES)
    torch.frombuffer(buffer, dtype=torch.uint8).fill_(1)  # Memory that nobody wrote is one page of zeros.
    return lambda threads: STREAM_BYTES / _C.streaming_read_seconds(buffer.address, STREAM_BYTES, threads) / 1e9


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What one candidate took for one number of tokens: medians, and the time that a tenth of its calls kept below."""

    seconds: float
    fast_seconds: float
    gb_per_s: float
    fraction: float
    gflop_per_s: float
    calls: int


@dataclass
class Row:
    """One number of tokens."""

    tokens: int
    stream_gb_per_s: float
    quiet: bool
    cells: dict[str, Cell]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """One layer, format and number of threads. ``columns`` are the ops of the candidates that ran."""

    shape: Shape
    form: str
    threads: int
    columns: dict[str, str]
    errors: dict[str, float]
    unavailable: dict[str, str]
    rows: list[Row]


class Failed(Exception):
    """A candidate cannot be timed; the message says why."""


class Served:
    """A candidate's process."""

    def __init__(self, candidate: Candidate, threads: int) -> None:
        self.name, self.settle_seconds = candidate.name, candidate.settle_seconds
        self.expert_bytes = 0.0
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            candidate.command(),
            env=candidate.variables(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request of serving.py and returns its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise Failed(answer["unavailable"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return f"ended with {code}" + (f": {said[-1]}" if said else "")


class Bench:
    """One layer, format and number of threads: starts candidates and measures them in rounds."""

    def __init__(
        self,
        shape: Shape,
        form: str,
        threads: int,
        seconds: float,
        patience: float,
        stream: Callable[[int], float],
        console: Console,
    ) -> None:
        self._shape, self._form, self._threads = shape, form, threads
        self._seconds, self._patience = seconds, patience
        self._stream, self._console = stream, console
        layer_bytes = shape.experts * shape.expert_bytes(form)
        self._layers = max(2, math.ceil(CACHES * _last_level_cache() / layer_bytes))
        self._candidate_bytes = MEMORY_FACTOR * self._layers * layer_bytes

    def run(self, candidates: Iterable[Candidate], tokens: Iterable[int]) -> Result:
        """Times the first candidate with as many of the others at a time as fit in memory."""
        first, *others = candidates
        result = Result(self._shape, self._form, self._threads, {}, {}, {}, [])
        able = []
        for candidate in others:
            if self._form not in candidate.forms:
                result.unavailable[candidate.name] = f"has no {FORMATS[self._form]} kernel"
            elif candidate.missing is not None:
                result.unavailable[candidate.name] = candidate.missing
            else:
                able.append(candidate)
        at_once = int(_available_memory() // self._candidate_bytes)
        if at_once < 1:
            raise SystemExit(
                f"{self._shape.name} in {FORMATS[self._form]} needs {self._candidate_bytes / 2**30:.0f} GiB of free "
                f"memory, and {_available_memory() / 2**30:.0f} GiB are; choose other --formats or another --layer"
            )
        step = at_once - 1
        if step:
            groups = [[first, *able[start : start + step]] for start in range(0, max(1, len(able)), step)]
        else:
            groups = [[candidate] for candidate in (first, *able)]
        for group in groups:
            self._run_group(group, list(tokens), result)
        return result

    def _run_group(self, group: list[Candidate], tokens: list[int], result: Result) -> None:
        served: list[Served] = []
        try:
            for candidate in group:
                self._start(candidate, served, result)
            for count in tokens:
                if served:
                    self._add(result, self._row(served, count))
        finally:
            for one in served:
                one.close()

    def _start(self, candidate: Candidate, served: list[Served], result: Result) -> None:
        one = Served(candidate, self._threads)
        try:
            with self._console.status(f"{self._title()}: {candidate.name}: making {self._layers} layers"):
                answer = one.ask(
                    do="load",
                    form=self._form,
                    shape=self._shape.to_json(),
                    layers=self._layers,
                    threads=self._threads,
                )
            if not answer["error"] <= ERROR_BOUND:
                raise Failed(f"wrong: relative error {answer['error']:.2g}")
        except Failed as reason:
            one.close()
            result.unavailable[candidate.name] = str(reason)
            return
        one.expert_bytes = answer["expert_bytes"]
        result.columns[candidate.name] = answer["op"]
        result.errors[candidate.name] = answer["error"]
        served.append(one)

    @staticmethod
    def _add(result: Result, row: Row) -> None:
        """A later group's row joins the earlier ones'; a candidate that is in all groups keeps its first figures."""
        for earlier in result.rows:
            if earlier.tokens == row.tokens:
                earlier.cells = {**row.cells, **earlier.cells}
                earlier.left_out.update(row.left_out)
                earlier.quiet = earlier.quiet and row.quiet
                return
        result.rows.append(row)

    def _row(self, served: list[Served], tokens: int) -> Row:
        with self._console.status(f"{self._title()}: {tokens} tokens"):
            left_out: dict[str, str] = {}
            counts: dict[str, int] = {}
            for one in served:
                try:
                    seconds = one.ask(do="time", tokens=tokens, first=0, calls=1)["seconds"][0]
                    counts[one.name] = max(1, min(MAX_CALLS, round(REQUEST_SECONDS / seconds)))
                except Failed as reason:
                    left_out[one.name] = str(reason)
            running = [one for one in served if one.name in counts]
            rounds = self._rounds(running, tokens, counts, left_out)
        calm = [one for one in rounds if one.taken_by_others <= QUIET]
        quiet = len(calm) >= MIN_ROUNDS
        kept = calm if quiet else rounds
        stream = statistics.median(stream for one in kept for stream in one.streams)
        cells = {
            one.name: self._cell([r.turns[one.name] for r in kept if one.name in r.turns], tokens) for one in running
        }
        return Row(tokens, stream, quiet, cells, left_out)

    def _rounds(
        self, running: list[Served], tokens: int, counts: dict[str, int], left_out: dict[str, str]
    ) -> list[_Round]:
        """Measures until there is enough; who fails is moved from ``running`` to ``left_out``."""
        rounds: list[_Round] = []
        quiet = first = 0
        start, waited = time.perf_counter(), 0.0
        while True:
            enough = len(rounds) if waited >= self._patience else quiet
            if enough >= MIN_ROUNDS and time.perf_counter() - start - waited > self._seconds:
                return rounds
            waited += _wait_for_quiet(self._patience - waited)
            began = time.perf_counter()
            meter = _OthersMeter([os.getpid(), *(one.pid for one in running)])
            current = _Round([self._stream(self._threads)])
            for one in list(running):
                try:
                    answer = one.ask(do="time", tokens=tokens, first=first, calls=counts[one.name])
                except Failed as reason:
                    left_out[one.name] = str(reason)
                    running.remove(one)
                    continue
                time.sleep(one.settle_seconds)
                current.streams.append(self._stream(self._threads))
                stream = (current.streams[-2] + current.streams[-1]) / 2
                rates = [
                    hit * one.expert_bytes / seconds / 1e9
                    for seconds, hit in zip(answer["seconds"], answer["experts"], strict=True)
                ]
                current.turns[one.name] = _Turn(answer["seconds"], rates, stream)
            current.taken_by_others = meter.share()
            rounds.append(current)
            if current.taken_by_others <= QUIET:
                quiet += 1
            else:
                waited += time.perf_counter() - began
            first += MAX_CALLS + 1

    def _cell(self, turns: list[_Turn], tokens: int) -> Cell:
        times = sorted(seconds for turn in turns for seconds in turn.seconds)
        operations = 2 * tokens * self._shape.top_k * sum(rows * inputs for rows, inputs in self._shape.projections())
        return Cell(
            seconds=statistics.median(times),
            fast_seconds=times[len(times) // 10],
            gb_per_s=statistics.median(rate for turn in turns for rate in turn.gb_per_s),
            fraction=statistics.median(rate / turn.stream for turn in turns for rate in turn.gb_per_s),
            gflop_per_s=operations / statistics.median(times) / 1e9,
            calls=len(times),
        )

    def _title(self) -> str:
        return f"{self._shape.name}, {FORMATS[self._form]}, {self._threads} threads"


@dataclass
class _Turn:
    """A candidate's calls in a round: their times, the rates at which they read weights, and the streaming read's."""

    seconds: list[float]
    gb_per_s: list[float]
    stream: float


@dataclass
class _Round:
    streams: list[float]
    turns: dict[str, _Turn] = field(default_factory=dict)
    taken_by_others: float = 0.0


class _OthersMeter:
    """The share of all CPUs that processes other than the given ones took since it was made; 0 where unknown."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._busy, self._own, self._start = _busy_seconds(), self._own_seconds(), time.perf_counter()

    def share(self) -> float:
        """Since this was made."""
        taken = (_busy_seconds() - self._busy) - (self._own_seconds() - self._own)
        return max(0.0, taken / (time.perf_counter() - self._start) / (os.cpu_count() or 1))

    def _own_seconds(self) -> float:
        return sum(_process_seconds(pid) for pid in self._pids)


def _wait_for_quiet(patience: float) -> float:
    """Sleeps until others leave the CPUs alone, at most so long; seconds waited."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < patience:
        meter = _OthersMeter([os.getpid()])
        time.sleep(0.05)
        if meter.share() <= QUIET:
            break
        time.sleep(0.2)
    return waited


def _busy_seconds() -> float:
    """CPU time that was not idle, of all CPUs since the machine started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, interrupts, soft, stolen = map(
        int, stat.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float:
    """CPU time of a process and its threads."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _available_memory() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _last_level_cache() -> int:
    from moe_fx import _C

    info = _C.cpu_info()
    return info["l3_bytes"] or info["l2_bytes"] or 32 * MIB


# --- Showing ----------------------------------------------------------------------------------------------------------


def tables(results: list[Result]) -> list[tuple[Table, str]]:
    """Tables and their notes: without peers, one per layer and number of threads with a column per format; with peers,
    one per format too, with a column per candidate."""
    if any(len(result.columns) + len(result.unavailable) > 1 for result in results):
        return [_peers_table(result) for result in results]
    grouped: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.shape.name, result.threads), []).append(result)
    return [_formats_table(group) for group in grouped.values()]


def _formats_table(group: list[Result]) -> tuple[Table, str]:
    table = _table(group[0], [FORMATS[result.form] for result in group], "")
    for index, row in enumerate(group[0].rows):
        rows = [result.rows[index] for result in group if index < len(result.rows)]
        streams = sorted({round(each.stream_gb_per_s, 1) for each in rows})
        name = ENGINE.name
        table.add_row(
            str(row.tokens), f"{streams[0]}–{streams[-1]}", *(_text(each, each.cells.get(name)) for each in rows)
        )
    return table, _notes(group)


def _peers_table(result: Result) -> tuple[Table, str]:
    table = _table(result, list(result.columns), f", {FORMATS[result.form]}")
    for row in result.rows:
        cells = [row.cells.get(name) for name in result.columns]
        table.add_row(str(row.tokens), f"{row.stream_gb_per_s:.1f}", *(_text(row, cell) for cell in cells))
    ops = [f"{name}: {op}, relative error {result.errors[name]:.2g}" for name, op in result.columns.items()]
    return table, "\n".join([*ops, _notes([result])])


def _table(result: Result, columns: list[str], what: str) -> Table:
    table = Table(title=f"{result.shape.name}{what}, {result.threads} thread(s)")
    for heading in ("tokens", "stream\nGB/s", *columns):
        table.add_column(heading, justify="right")
    return table


def _text(row: Row, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    mark = "" if row.quiet else "~"
    text = f"{mark}{cell.seconds * 1e6:,.0f} µs\n{cell.gb_per_s:.1f} GB/s, {cell.fraction:.2f}"
    return text + (f"\n{cell.gflop_per_s:,.0f} GFLOP/s" if row.tokens >= PREFILL else "")


def _notes(results: list[Result]) -> str:
    lines = [f"{name}: {reason}" for result in results for name, reason in result.unavailable.items()]
    for result in results:
        for row in result.rows:
            lines += [f"{name}, {row.tokens} tokens: {reason}" for name, reason in row.left_out.items()]
    if not all(row.quiet for result in results for row in result.rows):
        lines.append("~ measured while other processes used the CPUs")
    return "\n".join(lines)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
