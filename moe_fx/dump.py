"""Artifacts of one compilation: readable graphs and diffs, in ``dump_dir``, TORCH_LOGS and the structured trace."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from torch import fx
from torch._logging import trace_structured

from moe_fx.graph_text import graph_text

log = logging.getLogger("moe_fx.graphs")


class GraphDumper:
    """Writes a graph after each step of one compilation, and what the step changed.

    Files are ``<dump_dir>/graph_<frame>_<compile>/<step>_<name>.txt`` and ``.diff``. With ``TORCH_LOGS=+moe_fx`` the
    diffs go to the log; with ``TORCH_TRACE`` the graphs go to the structured trace as ``moe_fx_<step>_<name>``.
    """

    def __init__(self, dump_dir: str | None, compile_id: str) -> None:
        self._folder = None if dump_dir is None else Path(dump_dir) / f"graph_{compile_id.replace('/', '_')}"
        self._step = 0
        self._before = ""

    def graph(self, name: str, graph: fx.Graph) -> None:
        """Record the graph as it is after step ``name``."""
        step = f"{self._step:02d}_{name}"
        self._step += 1
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"moe_fx_{step}", "encoding": "string"},
            payload_fn=lambda: graph_text(graph, module_comments=True),
        )
        if self._folder is None and not log.isEnabledFor(logging.DEBUG):
            return
        text = graph_text(graph, module_comments=True)
        diff = "".join(
            difflib.unified_diff(
                self._before.splitlines(keepends=True),
                text.splitlines(keepends=True),
                fromfile="before",
                tofile=f"after {name}",
                n=1,
            )
        )
        first, self._before = self._before == "", text
        if not first and diff:
            log.debug("%s\n%s", step, diff)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{step}.txt").write_text(text)
            if not first:
                (self._folder / f"{step}.diff").write_text(diff)

    def text(self, name: str, content: str) -> None:
        """Record any other text artifact of the compilation."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(content)
