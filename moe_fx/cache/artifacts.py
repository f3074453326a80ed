"""What a downstream compiler made, kept beside lowered graphs: for compilers without a cache of their own.

A downstream compiler that can write its result as bytes and read it back calls :meth:`Artifacts.get_or_compile` at the
place where it has its own graph (after AOTAutograd, say). Inductor needs none of this: its own cache hits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import fx

from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.key import graph_digest
from moe_fx.cache.store import Store, key_of
from moe_fx.errors import MoeFxWarning

__all__ = ["Artifacts"]

Compiled = TypeVar("Compiled")


class Artifacts:
    """The artifacts of one compilation.

    Args:
        store: where they are kept; None keeps nothing.
        components: what the compilation depends on besides its graph; see ``key.compile_components``.

    Attributes:
        outcomes: ``hit`` or ``miss...`` of each artifact that was asked for, in order.
    """

    def __init__(self, store: Store | None, components: Mapping[str, str]) -> None:
        self._store = store
        self._components = {name: digest for name, digest in components.items() if name != "graph"}
        self.outcomes: list[str] = []

    def get_or_compile(
        self,
        kind: str,
        gm: fx.GraphModule,
        *,
        compile: Callable[[], Compiled],
        dump: Callable[[Compiled], bytes],
        load: Callable[[bytes], Compiled],
        more: Mapping[str, str] | None = None,
    ) -> Compiled:
        """The compiled form of ``gm``: loaded where it is kept, else compiled and kept.

        Args:
            kind: the compiler's name.
            gm: the graph as the compiler gets it, with ``val`` or ``example_value`` on its placeholders.
            compile: makes the compiled form.
            dump, load: it as bytes, and back; ``dump`` raises ``Uncacheable`` for what cannot be kept. What ``load``
                runs is trusted as far as the entry is: it was written by this user, nobody else could change it, and
                its contents have their hash. Whatever ``load`` raises makes the entry a miss.
            more: components of the key besides the graph's and the compilation's, as text.
        """
        if self._store is None:
            return compile()
        try:
            components = {**self._components, **(more or {}), "graph": graph_digest(gm)}
        except Uncacheable as reason:
            self.outcomes.append(f"off: {reason}")
            return compile()
        outcome, known = "miss", _guards(gm)
        for path in self._find(kind, components):
            try:
                _, body = self._store.read(path)
                loaded = load(body)
            except FileNotFoundError:
                continue
            except Exception as error:
                outcome = f"miss: {error}"
                warnings.warn(f"moe_ascend: {error}; it is made anew", MoeFxWarning, stacklevel=2)
                continue
            self._store.touch(path)
            self.outcomes.append("hit")
            return loaded
        self.outcomes.append(outcome)
        compiled = compile()
        try:
            if _guards(gm) != known:
                raise Uncacheable("the compiled form holds for some sizes only")
            self._store.write(kind, components, dump(compiled))
        except Uncacheable as reason:
            self.outcomes[-1] = f"off: {reason}"
        except Exception as error:  # Whatever it is, the compiled form is there.
            warnings.warn(f"moe_ascend: {error}; the next start compiles again", MoeFxWarning, stacklevel=2)
        return compiled

    def _find(self, kind: str, components: Mapping[str, str]) -> list[Path]:
        try:
            return [] if self._store is None else self._store.find(key_of(kind, components))
        except OSError:
            return []


def _guards(gm: fx.GraphModule) -> int:
    """How many conditions on sizes there are: a compiler that adds one has made something for these sizes."""
    nodes = gm.graph.find_nodes(op="placeholder")
    mode = torch._guards.detect_fake_mode([n.meta.get("val", n.meta.get("example_value")) for n in nodes])
    env = None if mode is None else mode.shape_env
    return 0 if env is None else len(env.guards) + len(env.replacements)
