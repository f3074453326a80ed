"""Hand-off to torchair: its two modes, its own options by name, and gears for dynamic sizes.

Options are per graph: they go into a configuration of this compilation, and no pattern or pass is registered with
torchair. Converters to GE are per process: those of ``ge_converters`` are registered, once, before the first graph that
is compiled in mode ``ge``. A user's own passes (``post_grad_custom_pre_pass``,
``post_grad_custom_post_pass``) run as torchair runs them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_fx import torchair_artifacts
from moe_fx.errors import MissingToolchainError, OptionError
from moe_fx.lowering.prepared_inputs import as_parameters

if TYPE_CHECKING:
    from moe_fx.cache.artifacts import Artifacts

MODES = ("ge", "npugraph_ex")
# What torchair calls the modes; npugraph_ex had another name in earlier releases.
_NAMES = {"ge": ("max-autotune",), "npugraph_ex": ("npugraph_ex", "reduce-overhead")}
# Options of this module; all others are torchair's.
_MODE, _GEARS = "mode", "gears"


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any],
    artifacts: Artifacts | None = None,
) -> Callable[..., Any]:
    """Compile ``gm`` with torchair.

    Args:
        inputs: example inputs, fake as dynamo gives them.
        mode: ``torch.compile``'s; one of ``MODES``, default the option ``mode``, default ``ge``.
        options: ``mode``; ``gears``: sizes to compile for, ``{argument name: {dimension: [sizes]}}`` (``ge`` only, the
            dimension must be dynamic; a graph without such an argument goes without); and any option of
            ``torchair.CompilerConfig``, by its dotted name (``"debug.graph_dump.type": "py"``) or nested
            (``{"debug": {"graph_dump": {"type": "py"}}}``).
        artifacts: where graphs converted to GE are kept. ``npugraph_ex`` has no such conversion, and keeps nothing.

    Raises:
        OptionError: an unknown name or a value that torchair refuses; the message lists what is valid.
        MissingToolchainError: torchair cannot be imported.
        UnsupportedError: this torchair has no place for converters to GE.
    """
    torchair = _torchair()
    mode, config = configured(mode, options)
    inputs = as_parameters(inputs)  # Its option frozen_parameter is about them.
    if mode == "ge":
        from moe_fx.lowering.ascend import ge_converters

        ge_converters.register()
        inputs = _with_gears(gm, inputs, options.get(_GEARS) or {})
        if artifacts is not None:
            names = [name for name, _ in _flat(options) if name.split(".")[0] not in (_MODE, _GEARS)]
            return torchair_artifacts.compile_graph(gm, inputs, config, names, artifacts)
    compiled: Callable[..., Any] = torchair.get_npu_backend(compiler_config=config)(gm, list(inputs))
    return compiled


def configured(mode: str | None, options: Mapping[str, Any]) -> tuple[str, Any]:
    """The mode and a ``torchair.CompilerConfig``, with the options checked; arguments and errors as ``compile_graph``.

    Gears are checked as far as it goes without a graph.
    """
    options = dict(options)
    mode = _mode(mode, options.pop(_MODE, None))
    gears = options.pop(_GEARS, None)
    if gears is not None:
        if mode != "ge":
            raise OptionError(f"downstream_options['gears'] is for mode='ge'; {mode!r} captures each size as it comes")
        if not isinstance(gears, Mapping) or not all(isinstance(sizes, Mapping) for sizes in gears.values()):
            raise OptionError(
                f"downstream_options['gears'] is {gears!r}; give {{argument name: {{dimension: [sizes]}}}}"
            )
    return mode, configure(_torchair().CompilerConfig(), mode, options)


def knows(name: str, value: Any) -> bool:
    """Whether a downstream option with this name, and a value of this kind, is torchair's; never where it is absent."""
    if not is_installed():
        return False
    if name in (_MODE, _GEARS):
        return True
    config = _torchair().CompilerConfig()
    first, *rest = name.split(".")
    if first not in config._fixed_attrs:
        return False
    # Inductor has a plain option `debug`, which here is a group.
    is_group = hasattr(getattr(config, first), "_fixed_attrs")
    return is_group == (bool(rest) or isinstance(value, Mapping))


def is_installed() -> bool:
    """Whether torchair is there, on its own or in torch_npu."""
    # In this order: once torch_npu is imported, a look at its torchair imports that whole.
    return importlib.util.find_spec("torch_npu") is not None or importlib.util.find_spec("torchair") is not None


def _torchair() -> Any:
    try:
        import torch_npu  # noqa: F401  Makes torchair importable.
        import torchair
    except ImportError as error:
        raise MissingToolchainError(
            f"torchair cannot be imported ({error}); install the torch_npu for your CANN and source CANN's set_env.sh, "
            f"or use downstream='inductor' (or 'eager')"
        ) from error
    return torchair


def configure(config: Any, mode: str, options: Mapping[str, Any]) -> Any:
    """Set the mode and the given options in a ``torchair.CompilerConfig``, and return it; see ``compile_graph``."""
    _set_mode(config, mode)
    for name, value in _flat(options):
        *path, last = name.split(".")
        place = config
        for part in path:
            _check_name(place, part, name)
            place = getattr(place, part)
        _check_name(place, last, name)
        try:
            setattr(place, last, value)
        except (TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OptionError(f"downstream_options[{name!r}] = {value!r}: {reason}") from error
    return config


def options_of(config: Any) -> dict[str, Any]:
    """The options with which ``compile_graph`` goes by a ``torchair.CompilerConfig`` like this one: all that were set.

    Raises:
        OptionError: it is none.
    """
    modes = [mode for mode, names in _NAMES.items() if getattr(getattr(config, "mode", None), "value", None) in names]
    if not modes:
        raise OptionError(f"config is {config!r}; give a torchair.CompilerConfig")
    return {_MODE: modes[0], **dict(_changed(config, type(config)()))}


def _changed(place: Any, fresh: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in place._fixed_attrs:
        value, default = getattr(place, name), getattr(fresh, name)
        if hasattr(value, "as_dict"):
            if hasattr(value, "_fixed_attrs"):  # Not so `export`, which torchair.dynamo_export sets.
                yield from _changed(value, default, f"{prefix}{name}.")
            continue
        # As it was set: ``value`` has True as "1", which is not taken back.
        value, default = getattr(value, "_value", value), getattr(default, "_value", default)
        if value != default and prefix + name != _MODE:
            yield prefix + name, value


def _mode(given: str | None, option: str | None) -> str:
    if given is not None and option is not None and given != option:
        raise OptionError(f"mode={given!r}, but downstream_options['mode'] is {option!r}; give one of them")
    mode = given or option or MODES[0]
    if mode not in MODES:
        raise OptionError(f"mode={mode!r} is unknown to torchair; valid modes: {', '.join(MODES)}")
    return mode


def _set_mode(config: Any, mode: str) -> None:
    for name in _NAMES[mode]:
        try:
            config.mode = name
            return
        except ValueError:
            continue
    raise OptionError(f"this torchair has no mode {mode!r}; install a newer torch_npu or use mode='ge'")


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_name(place: Any, part: str, name: str) -> None:
    valid = [attribute for attribute in getattr(place, "_fixed_attrs", ()) if not attribute.startswith("_")]
    if part not in getattr(place, "_fixed_attrs", ()):
        where = f"{type(place).__name__} has {', '.join(valid)}" if valid else "that is not a group of options"
        raise OptionError(f"downstream_options names {name!r}, which torchair's config does not have: {where}")


def _with_gears(gm: fx.GraphModule, inputs: Sequence[Any], gears: Mapping[str, Mapping[int, Any]]) -> list[Any]:
    """Example inputs, those named marked as ``torchair.inference.set_dim_gears`` does; users' tensors stay unmarked."""
    marked = list(inputs)
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        name = getattr(getattr(node, "_dynamo_source", None), "local_name", node.name)
        if name in gears and isinstance(inputs[index], torch.Tensor):
            marked[index] = node.meta.get("example_value", node.meta.get("val", inputs[index]))
            _set_gears(name, marked[index], gears[name])
    return marked


def _set_gears(name: str, tensor: torch.Tensor, sizes: Mapping[int, Any]) -> None:
    from torchair.inference import set_dim_gears

    for dimension in sizes:
        if not isinstance(dimension, int) or not 0 <= dimension < tensor.dim():
            raise OptionError(
                f"downstream_options['gears'][{name!r}] names dimension {dimension!r}; {name!r} has {tensor.dim()} "
                f"dimensions, counted from 0"
            )
        if isinstance(tensor.shape[dimension], int):
            raise OptionError(
                f"gears for dimension {dimension} of {name!r}, which is fixed; compile with dynamic=True or "
                f"torch._dynamo.mark_dynamic it"
            )
    try:
        set_dim_gears(tensor, dict(sizes))
    except AssertionError as error:
        raise OptionError(f"downstream_options['gears'][{name!r}]: {error}") from error
