"""Hand-off to torchair: its two modes, its own options by name, and gears for dynamic sizes.

Everything is per graph: the options go into a configuration of this compilation, and nothing is registered with
torchair. A user's own passes (``post_grad_custom_pre_pass``, ``post_grad_custom_post_pass``) run as torchair runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_fx import torchair_artifacts
from moe_fx.errors import OptionError

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
            dimension must be dynamic); and any option of ``torchair.CompilerConfig``, by its dotted name
            (``"debug.graph_dump.type": "py"``) or nested (``{"debug": {"graph_dump": {"type": "py"}}}``).
        artifacts: where graphs converted to GE are kept. ``npugraph_ex`` has no such conversion, and keeps nothing.

    Raises:
        OptionError: an unknown name or a value that torchair refuses; the message lists what is valid.
    """
    import torch_npu  # noqa: F401  Makes torchair importable.
    import torchair

    from moe_fx.lowering.ascend import ge_converters

    # A graph from the cache was lowered, which registers them too, in another process.
    ge_converters.register()
    options = dict(options)
    mode = _mode(mode, options.pop(_MODE, None))
    gears = options.pop(_GEARS, None)
    config = configure(torchair.CompilerConfig(), mode, options)
    if gears is not None:
        if mode != "ge":
            raise OptionError(f"downstream_options['gears'] is for mode='ge'; {mode!r} captures each size as it comes")
        inputs = _with_gears(gm, inputs, gears)
    if mode == "ge" and artifacts is not None:
        names = [name for name, _ in _flat(options)]
        return torchair_artifacts.compile_graph(gm, inputs, config, names, artifacts)
    compiled: Callable[..., Any] = torchair.get_npu_backend(compiler_config=config)(gm, list(inputs))
    return compiled


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


def _with_gears(gm: fx.GraphModule, inputs: Sequence[Any], gears: Any) -> list[Any]:
    """Example inputs marked as ``torchair.inference.set_dim_gears`` marks them; the user's tensors stay as they are."""
    from torchair.inference import set_dim_gears

    if not isinstance(gears, Mapping):
        raise OptionError("downstream_options['gears'] must be {argument name: {dimension: [sizes]}}")
    marked = list(inputs)
    by_name = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        name = getattr(getattr(node, "_dynamo_source", None), "local_name", node.name)
        fake = node.meta.get("example_value", node.meta.get("val", inputs[index]))
        if isinstance(fake, torch.Tensor) and not isinstance(inputs[index], torch.nn.Parameter):
            by_name[name] = marked[index] = fake
    for name, sizes in gears.items():
        if name not in by_name:
            known = ", ".join(key for key in by_name if key.isidentifier())
            raise OptionError(f"downstream_options['gears'] names {name!r}; the graph's tensor arguments are: {known}")
        for dimension in sizes:
            if isinstance(by_name[name].shape[dimension], int):
                raise OptionError(
                    f"gears for dimension {dimension} of {name!r}, which is fixed; compile with dynamic=True or "
                    f"torch._dynamo.mark_dynamic it"
                )
        try:
            set_dim_gears(by_name[name], dict(sizes))
        except AssertionError as error:
            raise OptionError(f"downstream_options['gears'][{name!r}]: {error}") from error
    return marked
