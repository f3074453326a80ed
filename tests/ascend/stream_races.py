"""What a captured graph does on which stream, and whether its streams wait where one needs or reuses what another has.

The stand-in runs all calls at once and in order, whatever their streams, so results show no race. This follows calls
while they are captured, with a vector clock for each stream and event, and compares those that touch the same memory.
Addresses are those that torch_npu's own allocator gives, which reuses memory as on hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAIN = "main"
# They start nothing on the device.
_LEFT_OUT = ("scope_enter", "scope_exit", "tagged_event_record", "tagged_event_wait", "hold", "get_npu_format")


@dataclass
class Access:
    """One call's use of a range of memory."""

    call: str
    stream: str
    time: int
    start: int
    end: int
    writes: bool


@dataclass
class Streams:
    """The calls of a capture."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    """Stream and operator, in order."""
    races: list[str] = field(default_factory=list)
    """Calls on the same memory of which neither waits for the other."""

    def on(self, stream: str) -> list[str]:
        """The operators on one stream."""
        return [call for where, call in self.calls if where == stream]


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Streams) -> None:
        super().__init__()
        self.seen = seen
        self.accesses: list[Access] = []
        # By stream: how much of each stream's work is done when its next call starts; the same by event.
        self.clocks: dict[str, Counter[str]] = {}
        self.events: dict[int, Counter[str]] = {}
        self.names: dict[int, str] = {}
        self.entered = MAIN

    def stream(self) -> str:
        return self.names.setdefault(torch.npu.current_stream().stream_id, self.entered)

    def clock(self) -> Counter[str]:
        return self.clocks.setdefault(self.stream(), Counter())

    def record(self, event: Any) -> None:
        self.events[id(event)] = Counter(self.clock())

    def wait(self, event: Any) -> None:
        self.clocks[self.stream()] = self.clock() | self.events[id(event)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stream = self.stream()
        if func.namespace == "air" and func._opname.startswith("scope_"):
            self.entered = args[1][0] if func._opname == "scope_enter" else MAIN
        result = func(*args, **kwargs)
        if func._opname in _LEFT_OUT or func.is_view:
            return result
        self.seen.calls.append((stream, func._opname))
        time = self.clock()[stream] = self.clock()[stream] + 1
        # The tensor that a prefetch names beside the weight is not read.
        reads, results = _memory((args[:1] if func._opname == "npu_prefetch" else args, kwargs)), _memory(result)
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = _memory([named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write])
        for found, writes in ((reads, False), (results - reads | written, True)):
            for start, end in sorted(found):
                self._check(Access(func._opname, stream, time, start, end, writes))
        return result

    def _check(self, new: Access) -> None:
        for old in self.accesses:
            shared = old.start < new.end and new.start < old.end and (old.writes or new.writes)
            if shared and old.stream != new.stream and self.clocks[new.stream][old.stream] < old.time:
                self.seen.races.append(f"{old.call} on {old.stream} and {new.call} on {new.stream}")
        self.accesses.append(new)


def _memory(tree: Any) -> set[tuple[int, int]]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()}


@contextmanager
def watched(monkeypatch: Any) -> Iterator[Streams]:
    """What is captured meanwhile."""
    from torchair._acl_concrete_graph.acl_graph import AclGraph

    seen = Streams()
    watch = _Watch(seen)
    event, capture = torch.npu.Event, AclGraph.capture

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch, watch:
            for name, follow in (("record", watch.record), ("wait", watch.wait)):
                patch.setattr(event, name, _followed(getattr(event, name), follow))
            return capture(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AclGraph, "capture", watching)
        yield seen


def _followed(method: Any, follow: Any) -> Any:
    def call(self: Any, *args: Any) -> Any:
        follow(self)
        return method(self, *args)

    return call
