"""transformers 5.x: capture ``eager`` experts, only while this backend traces.

An ``eager`` experts module loops over the experts that were hit, which breaks dynamo's graph at every iteration and
keeps all expert matmuls out of it. transformers looks its experts function up by name at every call; while this backend
traces, that lookup answers ``eager`` with transformers' own graph-friendly ``grouped_mm`` function. Eager calls, and
other backends in the same process, see the untouched model.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from moe_fx.errors import MoeFxWarning
from moe_fx.integrations.tracing import tracing_for_moe_ascend

_MODULE = "transformers.integrations.moe"
_MARK = "_moe_fx_hook"


def install() -> None:
    """Install the hook now if transformers is loaded, else as soon as it loads its experts interface."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _patch(module)
    elif not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


class _PatchOnImport:
    """Import hook that patches the experts interface when transformers loads it after ``torch.compile`` was called."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Let the other finders find the module, and patch it once it is executed."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_and_patch(module: Any) -> None:
                execute(module)
                _patch(module)

            spec.loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None or getattr(interface, _MARK, False):
        return
    setattr(interface, _MARK, True)
    if "get_interface" in vars(interface):  # transformers 5.1 and later
        interface.get_interface = _graph_friendly(interface.get_interface)
    else:  # transformers 5.0: ``ALL_EXPERTS_FUNCTIONS[name]``, used only for names other than "eager"
        _patch_decorator_closures(module)


def _graph_friendly(lookup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(lookup)
    def get_interface(self: Any, experts_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        if experts_implementation in ("eager", None) and tracing_for_moe_ascend():
            return lookup(self, "grouped_mm", default)  # type: ignore[no-any-return]
        return lookup(self, experts_implementation, default)  # type: ignore[no-any-return]

    return get_interface


def _patch_decorator_closures(module: Any) -> None:
    warnings.warn(
        "moe_ascend: this transformers release looks its experts function up in a way that cannot be hooked; "
        "call model.set_experts_implementation('grouped_mm') before torch.compile to have the experts captured.",
        MoeFxWarning,
        stacklevel=2,
    )
