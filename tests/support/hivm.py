"""Reads HIVM, the Ascend compiler's last public form of a kernel: how much on-chip memory, and which loops run scalar.

Plain text in, plain numbers out. Imports nothing but the standard library: the compile worker, a process without torch
or pytest, calls it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

CONSTANT = re.compile(r"^\s*(%\w+) = arith\.constant (-?\d+) : (?:i64|i32|index)$")
BUFFER = re.compile(r"hivm\.hir\.pointer_cast\(([^)]*)\)[^:]*: memref<(.*), #hivm\.address_space<(\w+)>>$")
SHAPED = re.compile(r"memref<((?:[\d?]+x)*)([a-z]+\d+)")
LOOP = re.compile(r"scf\.(?:for|while|parallel)\b")
# A loop with a constant trip count: lower bound, upper bound and step are names of constants.
RANGE = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
TOUCHES_ELEMENT = re.compile(r"\bmemref\.(?:load|store)\b|\bhivm\.hir\.(?:load|store)\b")
COMPUTES = re.compile(r"\b((?:arith|math)\.\w+) .*: (\w+)$")
# What a loop does for its own sake: indices, casts, the choice between two buffers.
HOUSEKEEPING = re.compile(r"arith\.(?:constant|index_cast|extui|extsi|extf|trunci|truncf|select|bitcast)")


@dataclass(frozen=True)
class ScalarLoop:
    """A loop in which the scalar unit handles one element a turn, where a vector unit would take 64 to 256.

    Attributes:
        does: "gather" (an element at a time from global memory), "scatter" (to it), or the operations, such as
            "arith.cmpi i64"; "copy" when there are none.
        trips: number of turns, times those of loops around it that do nothing else; None when only the launch knows.
    """

    does: str
    trips: int | None

    def __str__(self) -> str:
        return f"{self.does} x {'?' if self.trips is None else self.trips}"


def memory_bytes(hivm: str) -> dict[str, int]:
    """Return the end of the highest buffer in each address space: "ub" (unified buffer), "cbuf" (L1), "cc" (L0C).

    Buffers share addresses when their lifetimes do not meet, so sums of sizes would say too much. From run to run the
    compiler may lay them out in another order, with an end that differs by a few hundred bytes.
    """
    constants: dict[str, int] = {}
    ends: dict[str, int] = {}
    for line in hivm.splitlines():
        if constant := CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif buffer := BUFFER.search(line):
            size = math.ceil(_elements(f"memref<{buffer[2]}") * _bits(buffer[2]) / 8)
            for address in buffer[1].split(", "):
                ends[buffer[3]] = max(ends.get(buffer[3], 0), constants[address] + size)
    return ends


def scalar_loops(hivm: str) -> list[ScalarLoop]:
    """Return the innermost loops that touch memory one element at a time and hold no operation on more than one.

    A loop over rows that moves a row at a time is none, nor is the kernel's loop over blocks.
    """
    constants = {m[1]: int(m[2]) for m in map(CONSTANT.match, hivm.splitlines()) if m}
    found = []
    for loop in _loops(hivm.splitlines()):
        if loop.holds_loop or not any(map(TOUCHES_ELEMENT.search, loop.body)) or any(map(_is_wide, loop.body)):
            continue
        trips = _trips(loop.header, constants)
        around = loop.around
        while around and trips is not None and not any(map(_is_wide, around.body)):
            turns = _trips(around.header, constants)
            trips = None if turns is None else trips * turns
            around = around.around
        found.append(ScalarLoop(_what_it_does(loop.body), trips))
    return sorted(found, key=str)


@dataclass
class _Loop:
    """A loop, the lines in it that are in no loop inside it, and the loop around it."""

    header: str
    around: _Loop | None
    body: list[str] = field(default_factory=list)
    holds_loop: bool = False


def _elements(line: str) -> int:
    """Elements of the largest memref in a line; a dimension that only the launch knows counts as many."""
    sizes = [[1 << 16 if d == "?" else int(d) for d in m[1].split("x")[:-1]] for m in SHAPED.finditer(line)]
    return max(map(math.prod, sizes), default=0)


def _bits(memref: str) -> int:
    return int(re.search(r"(?:^|x)[a-z]+(\d+)", memref)[1])


def _is_wide(line: str) -> bool:
    """Does the line hand more than one element to a vector, cube or transfer unit?"""
    return _elements(line.partition("hivm.hir.")[2]) > 1


def _loops(lines: list[str]) -> list[_Loop]:
    """Every loop of a module. MLIR is printed with a block's end below its start, and what is inside further right."""
    loops: list[_Loop] = []
    inside: _Loop | None = None
    for line in lines:
        while inside and _indent(line) <= _indent(inside.header) and not line.lstrip().startswith("} do"):
            inside = inside.around
        if LOOP.search(line):
            if inside:
                inside.holds_loop = True
            inside = _Loop(line, inside)
            loops.append(inside)
        elif inside:
            inside.body.append(line)
    return loops


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _what_it_does(body: list[str]) -> str:
    if any("memref.load" in line and "address_space<gm>" in line for line in body):
        return "gather"
    if any(re.search(r"hivm\.hir\.store|memref\.store.*address_space<gm>", line) for line in body):
        return "scatter"
    found = (COMPUTES.search(line) for line in body)
    steps = {f"{m[1]} {m[2]}" for m in found if m and m[2] != "index" and not HOUSEKEEPING.match(m[1])}
    return ", ".join(sorted(steps)) or "copy"


def _trips(header: str, constants: dict[str, int]) -> int | None:
    match = RANGE.search(header)
    bounds = [constants.get(name) for name in match.groups()] if match else [None]
    if any(bound is None for bound in bounds):
        return None
    lower, upper, step = bounds
    return max(0, math.ceil((upper - lower) / step))
