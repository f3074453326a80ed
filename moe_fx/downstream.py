"""Hand-off: the compilers that finish a rewritten graph. Each takes an ordinary GraphModule and returns a callable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from moe_fx.errors import MissingToolchainError, OptionError

CompiledFn = Callable[..., Any]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def resolve(name: str, target: str) -> str:
    """The downstream compiler's name, with ``auto`` decided by the target.

    Raises:
        MissingToolchainError: torchair was asked for and is not installed.
    """
    has_torchair = importlib.util.find_spec("torchair") is not None or importlib.util.find_spec("torch_npu") is not None
    if name == "auto":
        return "torchair" if target == "ascend" and has_torchair else "inductor"
    if name == "torchair" and not has_torchair:
        raise MissingToolchainError(
            "downstream='torchair' needs torch_npu, which brings torchair and is not installed here; "
            "install torch_npu for your CANN, or use downstream='inductor' (or 'eager')"
        )
    return name


def compile_graph(
    name: str,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> CompiledFn:
    """Compile ``gm`` with the named downstream compiler.

    Args:
        mode: ``torch.compile``'s mode, for Inductor.
        config: the compiler's own options (Inductor config patches).

    Raises:
        OptionError: a mode or config that the compiler does not take.
    """
    if mode not in (None, *MODES):
        raise OptionError(f"mode={mode!r} is unknown to backend='moe_ascend'; valid modes: {', '.join(MODES)}")
    if name != "inductor" and (config or mode not in (None, "default")):
        given = "downstream_options" if config else f"mode={mode!r}"
        raise OptionError(f"{given} is for downstream='inductor', not {name!r}")
    return _COMPILERS[name](gm, list(example_inputs), mode, dict(config or {}))


def _inductor(gm: fx.GraphModule, inputs: list[Any], mode: str | None, config: dict[str, Any]) -> CompiledFn:
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode) if mode else {})
    for key, value in config.items():
        key = key.replace("-", "_")
        if key not in inductor_config._config:  # type: ignore[attr-defined]
            raise OptionError(f"downstream_options names {key!r}, which Inductor's config does not have")
        patches[key] = value
    compiled: Any = compile_fx(gm, inputs, config_patches=patches)
    return compiled


def _eager(gm: fx.GraphModule, inputs: list[Any], mode: str | None, config: dict[str, Any]) -> CompiledFn:
    return gm.forward


def _aot_eager(gm: fx.GraphModule, inputs: list[Any], mode: str | None, config: dict[str, Any]) -> CompiledFn:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, inputs)


def _torchair(gm: fx.GraphModule, inputs: list[Any], mode: str | None, config: dict[str, Any]) -> CompiledFn:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("npu")(gm, inputs)


_COMPILERS: dict[str, Callable[[fx.GraphModule, list[Any], str | None, dict[str, Any]], CompiledFn]] = {
    "inductor": _inductor,
    "eager": _eager,
    "aot_eager": _aot_eager,
    "torchair": _torchair,
}
