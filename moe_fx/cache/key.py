"""The components of a compilation's key, each the digest of one kind of thing that the result depends on.

Components have names so that a miss can say which of them changed. Whatever cannot be put into a component for certain
(a function among the options, a pass without source) makes the compilation :class:`Uncacheable` instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from moe_fx.cache import environment, sources
from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_identity import device_types, graph_lines
from moe_fx.cache.values import held, plain
from moe_fx.options import ENV_PREFIX, Options
from moe_fx.passes.core import Pass

__all__ = ["compile_components", "graph_digest"]

# Options that say where something is kept or whom to tell; the compiled graph is the same with any of them. What needs
# more than the graph (dumps, live checks) does not use the cache at all.
_NOT_IN_KEY = ("cache", "cache_dir", "cache_max_mib", "dump_dir", "check_dir", "report")
_OF_THEIR_OWN = ("extra_passes",)


def compile_components(
    gm: fx.GraphModule,
    options: Options,
    *,
    target: str,
    downstream: str,
    mode: str | None,
    sizes: str,
    decompositions: Mapping[Any, Callable[..., Any]],
    passes: list[Pass],
) -> dict[str, str]:
    """What the lowered form of ``gm`` depends on.

    Args:
        gm: dynamo's graph with its floats made constant (``capture.specialize``).
        target, downstream, mode: as the options and devices decided.
        sizes: what is known of symbolic sizes (``SizeGuards.describe``).
        decompositions: the downstream compiler's table.
        passes: those that would run, in order.

    Raises:
        Uncacheable: something is not certain to be told apart from its changes.
    """
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    named = [ENV_PREFIX + name.upper() for name in given]
    own = [item for item in passes if item not in options.extra_passes]
    return {
        "graph": graph_digest(gm),
        "sizes": _digest(sizes),
        "options": _digest({name: given[name] for name in given if name not in _NOT_IN_KEY + _OF_THEIR_OWN}),
        "extra passes": _digest([_extra_pass(item) for item in options.extra_passes]),
        "plan": _digest([[item.name, item.identity()] for item in own]),
        "target": _digest([target, downstream, mode]),
        "sources": sources.digest(),
        "decompositions": environment.decompositions(decompositions),
        "versions": _digest(environment.versions(target)),
        "hardware": _digest(environment.hardware(target, device_types(gm))),
        "modes": _digest(environment.modes()),
        "ranks": _digest(environment.world()),
        "variables": _digest(environment.variables(named)),
    }


def graph_digest(gm: fx.GraphModule) -> str:
    """See :func:`graph_lines`."""
    total = hashlib.sha256()
    for line in graph_lines(gm):
        total.update(line.encode())
        total.update(b"\n")
    return total.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value, ""), sort_keys=True).encode()).hexdigest()


def _extra_pass(item: Pass) -> Any:
    """A user's pass: the source of its modules and how class and instance are set up; or what its ``identity`` says."""
    cls = type(item)
    if cls.identity is not Pass.identity:
        return [cls.__qualname__, item.identity()]
    bases = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("moe_fx", "abc", "builtins", "typing")]
    try:
        modules = [importlib.import_module(base.__module__) for base in bases]
        sources_of = [inspect.getsource(module) for module in modules]
        for module in modules:
            sources.require_unchanged(
                f"{module.__name__}, the module of the pass {item.name!r},", Path(module.__file__ or "")
            )
    except (ImportError, OSError, TypeError) as error:
        raise Uncacheable(f"the pass {item.name!r} has no source file; override its identity()") from error
    members = [_members(base, item) for base in bases]
    state = [plain(value, _of(item, name)) for name, value in sorted(vars(item).items())]
    return [cls.__qualname__, item.identity(), sources_of, members, sorted(vars(item)), state]


def _members(base: type, item: Pass) -> list[Any]:
    """What a class has besides its module's source: values set later, methods put in, and what methods enclose."""
    found = []
    for name, member in sorted(vars(base).items()):
        if name.startswith("__") or name == "_abc_impl":
            continue
        if isinstance(member, types.MemberDescriptorType):  # Of __slots__: the instance has the value.
            member = getattr(item, name, None)
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        found.append([name, held(function, _of(item, name))])
    return found


def _of(item: Pass, name: str) -> str:
    return f"{name} of the pass {item.name!r}"
