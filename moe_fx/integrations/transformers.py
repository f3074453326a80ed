"""transformers 5.x: capture ``eager`` experts, only while this backend traces.

An ``eager`` experts module loops over the experts that were hit, which breaks dynamo's graph at every iteration and
keeps all expert matmuls out of it. While this backend traces, such a module runs transformers' own graph-friendly
``grouped_mm`` function instead. Eager calls, and other backends in the same process, see the untouched model.

What changes between releases, and what is done about it:

* 5.1 and later look the experts function up by name at every call: that lookup answers. In 5.0 the forward that the
  decorator ``use_experts_implementation`` puts on a class decides by itself: that forward is wrapped.
* 5.3 and later ask for torch's version on the way to a grouped matmul, through cached functions that log. Dynamo warns
  about the cache, and up to 5.8 breaks the graph at the logger. The answer cannot change: it is taken as a constant.
* ``batched_mm``, which ``generate`` switches to for decoding, branches on tensor values in 5.1 and masks by arithmetic
  in 5.2: there it is answered with ``grouped_mm`` too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from moe_fx.errors import MoeFxWarning
from moe_fx.integrations.tracing import tracing_for_moe_ascend

_PACKAGE = "transformers.integrations"
_MODULE = f"{_PACKAGE}.moe"
_DECORATOR = "use_experts_implementation"
_MARK = "_moe_fx_hook"
_VERSION_PREDICATES = ("is_torch_available", "is_torch_greater_or_equal", "is_torch_less_or_equal")
_RELEASES_WITH_UNTRACEABLE_BATCHED_MM = ((5, 1), (5, 2))


def install() -> None:
    """Install the hook now if transformers is loaded, else as soon as it loads its experts interface."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _patch(module)
    elif not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


def captures(module: torch.nn.Module) -> bool:
    """Whether the module's experts function is chosen by transformers' experts interface, which this hook answers."""
    forward = getattr(type(module), "forward", None)
    by_decorator = getattr(forward, "__globals__", {}).get("__name__") == _MODULE
    return by_decorator or hasattr(forward, _MARK)


class _PatchOnImport:
    """Import hook that patches the experts interface when transformers loads it after ``torch.compile`` was called."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Let the other finders find the module, and patch it once it is executed."""
        if name != _MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_and_patch(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _patch(module)

            spec.loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    """Hook one release's experts interface, once."""
    if getattr(module, _MARK, False):
        return
    setattr(module, _MARK, True)
    for name in _VERSION_PREDICATES:
        if name in vars(module):
            setattr(module, name, _constant_while_tracing(getattr(module, name)))
    interface: Any = getattr(module, "ExpertsInterface", object)
    if "get_interface" in vars(interface):
        interface.get_interface = _graph_friendly(interface.get_interface)
    elif hasattr(module, "grouped_mm_experts_forward") and hasattr(module, _DECORATOR):
        _patch_decorated_classes(module)
    else:
        release = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
        warnings.warn(
            f"moe_ascend: transformers {release} chooses its experts function in a way that moe-fx does not know, so"
            " 'eager' experts stay outside the compiled graph; call model.set_experts_implementation('grouped_mm')"
            " before torch.compile, and report the release to moe-fx.",
            MoeFxWarning,
            stacklevel=3,
        )


def _constant_while_tracing(predicate: Callable[..., bool]) -> Callable[..., bool]:
    @torch.compiler.assume_constant_result
    def constant(*args: Any, **kwargs: Any) -> bool:
        return predicate(*args, **kwargs)

    def asked(*args: Any, **kwargs: Any) -> bool:
        # Called only while our backend traces, so that other backends meet transformers' own function.
        if tracing_for_moe_ascend():
            return constant(*args, **kwargs)
        return predicate(*args, **kwargs)

    return asked


def _graph_friendly(lookup: Callable[..., Any]) -> Callable[..., Any]:
    """``ExpertsInterface.get_interface`` of transformers 5.1 and later."""
    replaced = ("eager", None, "batched_mm") if _batched_mm_is_untraceable() else ("eager", None)

    def get_interface(self: Any, experts_implementation: str | None, default: Callable[..., Any]) -> Any:
        if experts_implementation in replaced and tracing_for_moe_ascend():
            return lookup(self, "grouped_mm", default)
        return lookup(self, experts_implementation, default)

    get_interface.__doc__ = lookup.__doc__
    return get_interface


def _batched_mm_is_untraceable() -> bool:
    release = str(getattr(sys.modules.get("transformers"), "__version__", "")).split(".")[:2]
    return tuple(int(part) for part in release if part.isdigit()) in _RELEASES_WITH_UNTRACEABLE_BATCHED_MM


def _patch_decorated_classes(module: Any) -> None:
    """transformers 5.0: the classes that the decorator made, and those that it will make."""
    for cls in _subclasses(torch.nn.Module):
        forward = vars(cls).get("forward")
        if getattr(forward, "__globals__", None) is vars(module):
            _patch_forward(cls, module)
    decorator = getattr(module, _DECORATOR)

    def use_experts_implementation(experts_class: type | None = None, **options: Any) -> Any:
        if experts_class is None:
            decorate = decorator(**options)
            return lambda cls: _patch_forward(decorate(cls), module)
        return _patch_forward(decorator(experts_class, **options), module)

    setattr(module, _DECORATOR, use_experts_implementation)
    package = sys.modules.get(_PACKAGE)
    if package is not None and _DECORATOR in vars(package):  # The package keeps what it has handed out.
        setattr(package, _DECORATOR, use_experts_implementation)


def _patch_forward(cls: Any, module: Any) -> type:
    original, grouped_mm = cls.forward, module.grouped_mm_experts_forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._experts_implementation == "eager" and tracing_for_moe_ascend():
            return grouped_mm(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    forward.__doc__ = original.__doc__
    setattr(forward, _MARK, True)
    cls.forward = forward
    return cls


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)
