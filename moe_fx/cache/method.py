"""``moe_fx.cache_compile``: a model's method compiled and kept, called as torchair's ``cache_compile`` is called.

Dynamo still traces the method in every process, which torchair's version saves and pays for: its key does not see the
method's code, so that an edited body runs as it was, and nothing guards what the trace took for granted. Here an edit
is another graph and misses, guards hold as always, and everything behind dynamo comes from the cache.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_fx.cache.store import default_cache_dir
from moe_fx.errors import OptionError
from moe_fx.torchair_handoff import options_of

__all__ = ["cache_compile"]


def cache_compile(
    func: Callable[..., Any],
    *,
    config: Any = None,
    dynamic: bool = True,
    cache_dir: str | Path | None = None,
    global_rank: int | None = None,
    tp_rank: int | None = None,
    pp_rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    backend: None = None,
    custom_decompositions: None = None,
    ge_cache: bool = False,
) -> Callable[..., Any]:
    """Compile a bound method of a module with ``backend="moe_ascend"``, as one graph.

        self.decode = moe_fx.cache_compile(self.decode_step, cache_dir="cache")

    Args:
        func: a method of a ``torch.nn.Module``, bound.
        config: a ``torchair.CompilerConfig``; what is set in it goes into ``downstream_options``, under what
            ``options`` has there. With a function in it (a pass), nothing is kept.
        dynamic: as for ``torch.compile``.
        cache_dir: where entries are kept; see :class:`moe_fx.options.Options`.
        global_rank, tp_rank, pp_rank: ranks that share the directory and must not share entries, where
            ``torch.distributed`` is not set up to tell.
        options: as for ``torch.compile``.
        backend, custom_decompositions, ge_cache: torchair's, which have no place here; refused if given.

    Returns:
        The compiled method. A graph break in it raises when it is first called.

    Raises:
        OptionError: ``func`` is no bound method of a module, ``config`` is of another kind, or one of the last three is
            given.
    """
    if not isinstance(func, types.MethodType) or not isinstance(func.__self__, torch.nn.Module):
        raise OptionError(f"cache_compile takes a method of a torch.nn.Module, such as model.decode, not {func!r}")
    torchairs = {"backend": backend, "custom_decompositions": custom_decompositions, "ge_cache": ge_cache}
    for name, given in torchairs.items():
        if given:
            raise OptionError(
                f"cache_compile takes no {name}: torchair's settings go into config, and what GE compiles is not kept"
            )
    merged = dict(options or {})
    if config is not None:
        merged["downstream_options"] = {**options_of(config), **merged.get("downstream_options", {})}
    if cache_dir is not None:
        merged["cache_dir"] = cache_dir
    ranks = {"global": global_rank, "tp": tp_rank, "pp": pp_rank}
    folder = "_".join(f"{name}{rank}" for name, rank in ranks.items() if rank is not None)
    if folder:
        merged["cache_dir"] = Path(merged.get("cache_dir") or default_cache_dir()) / folder
    compiled: Callable[..., Any] = torch.compile(
        func, backend="moe_ascend", dynamic=dynamic, fullgraph=True, options=merged
    )
    return compiled
