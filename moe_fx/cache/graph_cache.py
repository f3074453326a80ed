"""One compilation's use of the cache: look the graph up, or keep what it was lowered to.

Nothing in here makes a compilation fail. What stands in the way is said once, in the report and (where the user can do
something about it) as a warning, and the graph is compiled as if there were no cache.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from moe_fx import downstream, dump
from moe_fx.cache import graph_codec, report_codec
from moe_fx.cache.artifacts import Artifacts
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.guards import SizeGuards
from moe_fx.cache.key import compile_components
from moe_fx.cache.store import Header, Store, key_of, open_store
from moe_fx.capture import keep_dynamo_metadata
from moe_fx.errors import CacheError, MoeFxWarning
from moe_fx.options import Options
from moe_fx.pipeline import GraphReport, active_passes

__all__ = ["GraphCache"]

_KIND = "graph"
# Headers that a miss compares itself with, to say what changed; only misses, which compile for seconds, pay for it.
_COMPARED = 200


class GraphCache:
    """The cache for one graph.

    Args:
        gm: dynamo's graph with its floats made constant (``capture.specialize``).
        options: the user's.
        report: the graph's; ``report.cache`` says what came of it: ``hit``, ``miss: ...`` or ``off: ...``.
        mode: ``torch.compile``'s.

    Attributes:
        artifacts: for the downstream compiler.
    """

    def __init__(self, gm: fx.GraphModule, options: Options, report: GraphReport, mode: str | None) -> None:
        start = time.perf_counter()
        self._given, self._report = gm, report
        self._store: Store | None = None
        self._components: dict[str, str] = {}
        try:
            _refuse(options)
            store = open_store(options)
            self._guards = SizeGuards(gm)
            self._components = compile_components(
                gm,
                options,
                target=report.target,
                downstream=report.downstream,
                mode=mode,
                sizes=self._guards.describe(),
                decompositions=downstream.decompositions(report.downstream),
                passes=active_passes(options),
            )
            self._store = store
        except Uncacheable as reason:
            report.cache = f"off: {reason}"
        except Exception as error:
            self._give_up(error)
        self.artifacts = Artifacts(self._store, self._components)
        report.cache_seconds = time.perf_counter() - start

    def restore(self) -> fx.GraphModule | None:
        """The lowered graph from an entry, with the report filled in; None for a miss."""
        if self._store is None:
            return None
        start = time.perf_counter()
        try:
            return self._restore(self._store)
        except Exception as error:
            self._give_up(error)
            return None
        finally:
            self._report.cache_seconds += time.perf_counter() - start

    def keep(self, lowered: fx.GraphModule) -> fx.GraphModule:
        """Write an entry for the lowered graph, and give back what a hit would restore from it.

        A cold start hands over the same graph as a warm one: the downstream compiler's own cache then finds its entry.
        """
        if self._store is None:
            return lowered
        start = time.perf_counter()
        try:
            graph = graph_codec.encode(lowered, self._given, self._report.target)
            guards = self._guards.added()
            body = json.dumps({"graph": graph, "guards": guards, "report": report_codec.encode(self._report)}).encode()
            restored = self._with_metadata(graph_codec.decode(json.loads(body)["graph"], self._given))
            variant = self._guards.variant(guards)
            self._store.write(_KIND, self._components, body, variant=variant, about=_about(self._report))
            return restored
        except Uncacheable as reason:
            self._report.cache = f"off: {reason}"
        except Exception as error:
            self._give_up(error)
        finally:
            self._report.cache_seconds += time.perf_counter() - start
        return lowered

    def _restore(self, store: Store) -> fx.GraphModule | None:
        reasons = []
        for path in store.find(key_of(_KIND, self._components)):
            try:
                _, body = store.read(path)
                data = json.loads(body)
                if not self._guards.hold(data["guards"]):
                    reasons.append(f"the entry holds for sizes with {data['guards']}")
                    continue
                restored = self._with_metadata(graph_codec.decode(data["graph"], self._given))
                report_codec.decode_into(self._report, data["report"])
            except FileNotFoundError:
                continue
            except Exception as error:  # An entry that is no use must not stand in the way of its successor.
                what = str(error) if isinstance(error, CacheError) else f"cache entry {path.name}: {error!r}"
                reasons.append(what)
                _warn(f"{what}; the graph is compiled anew and the entry replaced.")
                continue
            store.touch(path)
            self._report.cache = "hit"
            return restored
        self._report.cache = "miss: " + ("; ".join(reasons) or _what_changed(store, self._components))
        return None

    def _with_metadata(self, graph: fx.GraphModule) -> fx.GraphModule:
        keep_dynamo_metadata(self._given, graph)
        for node in graph.graph.find_nodes(op="placeholder"):
            if "example_value" in node.meta:
                node.meta["val"] = node.meta["example_value"]
        return graph

    def _give_up(self, error: Exception) -> None:
        self._store = None
        if isinstance(error, CacheError):
            self._report.cache = f"off: {error}"
            _warn(f"{error}; the graph is compiled without the cache.")
        else:
            what = f"{type(error).__name__}: {error}"
            self._report.cache = f"off: {what}"
            _warn(f"the compile cache failed ({what}). This is a bug in moe-fx: please report it.")


def _refuse(options: Options) -> None:
    """Compilations that need the steps themselves and not only their result."""
    if not options.cache:
        raise Uncacheable("cache=False")
    if options.check:
        raise Uncacheable("check=True compares with the unfused graph")
    if options.dump_dir is not None:
        raise Uncacheable("dump_dir is set, and dumps are written by the passes as they run")
    if dump.log.isEnabledFor(logging.DEBUG):
        raise Uncacheable("TORCH_LOGS asks for what each pass changes")


def _what_changed(store: Store, components: dict[str, str]) -> str:
    """The components in which the nearest entry differs."""
    nearest: Sequence[str] | None = None
    for path in store.files()[:_COMPARED]:
        try:
            header = store.header(path)
        except (CacheError, FileNotFoundError):
            continue
        if header.kind == _KIND:
            different = _differences(header, components)
            if nearest is None or len(different) < len(nearest):
                nearest = different
    if nearest is None:
        return "the cache is empty"
    if "graph" in nearest:
        return "no entry for this graph"
    return f"{', '.join(nearest)} changed"


def _differences(header: Header, components: dict[str, str]) -> list[str]:
    return [name for name, digest in components.items() if header.components.get(name) != digest]


def _about(report: GraphReport) -> dict[str, Any]:
    matched = dict(Counter(site.kind for site in report.matched))
    return {"target": report.target, "downstream": report.downstream, "nodes": report.nodes_after, "matched": matched}


def _warn(message: str) -> None:
    warnings.warn(f"moe_ascend: {message}", MoeFxWarning, stacklevel=5)
