"""What a downstream compiler made, kept beside lowered graphs: for compilers without a cache of their own.

A downstream compiler that can write its result as bytes and read it back calls :meth:`Artifacts.get_or_compile` at the
place where it has its own graph (after AOTAutograd, say). Inductor needs none of this: its own cache hits.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import fx

from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.guards import SizeGuards
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
                its contents have their hash. Whatever ``load`` raises makes the entry a miss. What ``compile`` asks
                about sizes becomes a condition of the entry, as in ``guards``.
            more: components of the key besides the graph's and the compilation's, as text.
        """
        if self._store is None:
            return compile()
        outcome, sizes = "miss", SizeGuards(gm)
        try:
            # More is known of sizes by now, and ``compile`` need not ask for it.
            known = hashlib.sha256(sizes.describe().encode()).hexdigest()
            components = {**self._components, **(more or {}), "graph": graph_digest(gm), "sizes": known}
        except Uncacheable as reason:
            self.outcomes.append(f"off: {reason}")
            return compile()
        for path in self._find(kind, components):
            try:
                header, body = self._store.read(path)
                guards = header.about.get("guards", "")
                if not sizes.hold(guards):
                    outcome = f"miss: the entry holds for sizes with {guards}"
                    continue
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
            guards = sizes.added()
            about = {"guards": guards} if guards else None
            self._store.write(kind, components, dump(compiled), variant=sizes.variant(guards), about=about)
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
