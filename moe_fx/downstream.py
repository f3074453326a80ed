"""Hand-off: the compilers that finish a rewritten graph. Each takes an ordinary GraphModule and returns a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from moe_fx import torchair_artifacts, torchair_handoff
from moe_fx.errors import MissingToolchainError, OptionError
from moe_fx.lowering.prepared_inputs import hoist

if TYPE_CHECKING:
    from moe_fx.cache.artifacts import Artifacts

CompiledFn = Callable[..., Any]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def resolve(name: str, target: str) -> str:
    """The downstream compiler's name, with ``auto`` decided by the target.

    Raises:
        MissingToolchainError: torchair was asked for and is not installed.
    """
    has_torchair = torchair_handoff.is_installed()
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
    artifacts: Artifacts | None = None,
    automatic: bool = False,
) -> CompiledFn:
    """Compile ``gm`` with the named downstream compiler.

    Args:
        mode: ``torch.compile``'s mode, for Inductor; ``ge`` or ``npugraph_ex``, for torchair.
        config: the compiler's own options (Inductor config patches; for torchair see ``torchair_handoff``).
        artifacts: where a compiler without a cache of its own keeps what it made; Inductor has its own.
        automatic: ``auto`` chose the compiler, for this graph; what is meant for the one it may choose for another
            (Inductor, torchair) is checked and left out. A name that both know goes to both.

    Raises:
        OptionError: a mode or config that the compiler does not take.
    """
    if automatic and name in ("inductor", "torchair"):
        mode, config = _own(name, mode, config or {})
    modes = torchair_handoff.MODES if name == "torchair" else MODES
    if mode not in (None, *modes):
        raise OptionError(f"mode={mode!r} is unknown to downstream={name!r}; valid modes: {', '.join(modes)}")
    if name not in ("inductor", "torchair") and (config or mode not in (None, "default")):
        given = "downstream_options" if config else f"mode={mode!r}"
        raise OptionError(f"{given} is for downstream='inductor' or 'torchair', not {name!r}")
    inputs, with_prepared = hoist(gm, example_inputs)
    return with_prepared(_COMPILERS[name](gm, inputs, Request(mode, dict(config or {}), artifacts)))


def _own(name: str, mode: str | None, config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Mode and options without what only the other compiler knows; what neither knows stays, to be refused."""
    we_know, they_know = _inductor_knows, torchair_handoff.knows
    if name == "torchair":
        we_know, they_know = they_know, we_know
    theirs = {key: value for key, value in config.items() if not we_know(key, value) and they_know(key, value)}
    ours = {key: value for key, value in config.items() if key not in theirs}
    if name == "torchair":
        return (None if mode in MODES else mode), ours
    is_torchairs = mode in torchair_handoff.MODES and torchair_handoff.is_installed()
    if is_torchairs or theirs:
        torchair_handoff.configured(mode if is_torchairs else None, theirs)
    return (None if is_torchairs else mode), ours


def _inductor_knows(name: str, value: Any) -> bool:
    from torch._inductor import config as inductor_config

    entry = inductor_config._config.get(name.replace("-", "_"))  # type: ignore[attr-defined]
    # torchair has a group of options `debug`, which here is a plain one.
    return entry is not None and (isinstance(entry.default, Mapping) or not isinstance(value, Mapping))


@dataclass(frozen=True)
class Request:
    """What a downstream compiler is asked for besides the graph; see :func:`compile_graph`."""

    mode: str | None
    config: Mapping[str, Any]
    artifacts: Artifacts | None


def decompositions(name: str) -> Mapping[Any, Callable[..., Any]]:
    """The table by which the named compiler takes ops apart, for cache keys; empty where it has none of its own."""
    if name == "torchair":
        return torchair_artifacts.decompositions()
    if name != "inductor":
        return {}
    from torch._inductor.decomposition import select_decomp_table

    table: Mapping[Any, Callable[..., Any]] = select_decomp_table()
    return table


def _inductor(gm: fx.GraphModule, inputs: list[Any], request: Request) -> CompiledFn:
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(request.mode) if request.mode else {})
    for key, value in request.config.items():
        key = key.replace("-", "_")
        if key not in inductor_config._config:  # type: ignore[attr-defined]
            raise OptionError(f"downstream_options names {key!r}, which Inductor's config does not have")
        patches[key] = value
    compiled: Any = compile_fx(gm, inputs, config_patches=patches)
    return compiled


def _eager(gm: fx.GraphModule, inputs: list[Any], request: Request) -> CompiledFn:
    return gm.forward


def _aot_eager(gm: fx.GraphModule, inputs: list[Any], request: Request) -> CompiledFn:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, inputs)


def _torchair(gm: fx.GraphModule, inputs: list[Any], request: Request) -> CompiledFn:
    return torchair_handoff.compile_graph(gm, inputs, request.mode, request.config, request.artifacts)


_COMPILERS: dict[str, Callable[[fx.GraphModule, list[Any], Request], CompiledFn]] = {
    "inductor": _inductor,
    "eager": _eager,
    "aot_eager": _aot_eager,
    "torchair": _torchair,
}
