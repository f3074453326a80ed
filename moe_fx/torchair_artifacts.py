"""GE graphs that torchair made, kept in the compile cache, by way of torchair's semi-private classes.

An artifact is the Python text that torchair writes for a converted graph: the serialized GE graph, its compile options
and a ``kernel`` function. ``Artifacts`` gives it back only from an entry that belongs to this user, is closed to others
and has its hash; then, and only then, it is executed.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_fx.cache.errors import Uncacheable

if TYPE_CHECKING:
    from moe_fx.cache.artifacts import Artifacts

KIND = "torchair-ge"
# Settings for the sake of what a conversion writes or runs besides its result.
_SIDE_EFFECTS = ("debug", "dump_config", "export", "aoe_config")
# Converters of these are covered by the versions of torch_npu and of moe-fx.
_COVERED = ("torchair", "torch_npu", "moe_fx")
_TORCHS_OPS = ("aten", "prim", "prims", "_c10d_functional")


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """torchair's own table of decompositions; empty where this torchair has none to show."""
    import torch_npu  # noqa: F401  Makes torchair importable.

    try:
        from torchair._utils import get_npu_default_decompositions
    except ImportError:
        return {}
    table: Mapping[Any, Callable[..., Any]] = get_npu_default_decompositions()
    return table


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Any, options: Sequence[str], artifacts: Artifacts
) -> Callable[..., Any]:
    """Compile ``gm`` in GE mode as ``torchair.get_npu_backend`` does, with its conversion to GE kept in ``artifacts``.

    Args:
        inputs: example inputs, marked with their gears.
        config: a ``torchair.CompilerConfig``.
        options: dotted names of what the user set in it.
    """
    import torchair

    try:
        from torchair import npu_fx_compiler as private
        from torchair.configs.compiler_config import _check_config_support
        from torchair.core.utils import _init_debug_logging

        with_aot, merged = private._compile_graph_with_aot, private._get_merged_decompositions
        convert, process_communication = private.get_compiler(config), private._process_send_recv
        _ = private._CompiledFxGraph.load_artifacts, private._CompiledFxArtifacts
        written = [name for name in options if name.split(".")[0] in _SIDE_EFFECTS]
        if written:
            raise Uncacheable(f"the torchair option {written[0]!r} asks for what only a conversion gives")
    except (ImportError, AttributeError, Uncacheable) as reason:
        artifacts.outcomes.append(f"off: {reason}")
        compiled: Callable[..., Any] = torchair.get_npu_backend(compiler_config=config)(gm, list(inputs))
        return compiled

    def compiler(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            more = {"torchair": _more_components(graph, example_inputs)}
        except Uncacheable as reason:
            artifacts.outcomes.append(f"off: {reason}")
            result: Callable[..., Any] = convert(graph, example_inputs)
            return result
        return artifacts.get_or_compile(
            KIND, graph, compile=lambda: convert(graph, example_inputs), dump=_dump, load=_load, more=more
        )

    _init_debug_logging()
    _check_config_support(config)
    with contextlib.suppress(ImportError):
        from torch_npu.dynamo._deterministic_guard import install_npu_deterministic_level_guard

        install_npu_deterministic_level_guard()
    process_communication(gm, config)
    compiled = with_aot(gm, compiler, list(inputs), config, merged(config), is_cache=False)
    return compiled


def _dump(compiled: Any) -> bytes:
    """The text for a converted graph, as torchair's ``dump_artifacts`` makes it but fit for another process.

    ``enable_cache`` writes communication groups by their ranks, not by this process's names for them, and refuses
    graphs that draw random numbers.
    """
    try:
        text = compiled.runner.codegen(extend_config={}, enable_cache=True)
    except Exception as error:
        raise Uncacheable(f"torchair cannot write the graph as code: {error}") from error
    if not isinstance(text, str):
        raise Uncacheable("torchair does not write a graph with these options as code")
    _check_names(text)
    return text.encode()


def _load(body: bytes) -> Any:
    from torchair.npu_fx_compiler import _CompiledFxArtifacts, _CompiledFxGraph

    return _CompiledFxGraph.load_artifacts(_CompiledFxArtifacts(py_code=body.decode()))


def _check_names(text: str) -> None:
    """Refuse text whose kernel would fail when called: sizes are written as sympy has them, ``Max(1, s0)`` too."""
    try:
        module = compile(text, "<torchair>", "exec")
    except SyntaxError as error:
        raise Uncacheable(f"torchair's code for the graph is no valid Python: {error}") from error
    defined = {i.argval for i in dis.get_instructions(module) if i.opname in ("STORE_NAME", "STORE_GLOBAL")}
    kernels = [c for c in module.co_consts if isinstance(c, types.CodeType) and c.co_name == "kernel"]
    used = {
        i.argval for code in kernels for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    unknown = sorted(used - defined - set(vars(builtins)))
    if not kernels or unknown:
        raise Uncacheable(f"torchair's code for the graph does not stand alone: {', '.join(unknown) or 'no kernel'}")


def _more_components(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """What a conversion goes by and the graph does not show: marks on inputs; torch_npu's determinism and use of HF32.

    Raises:
        Uncacheable: converters or patterns take part whose changes the key would not show.
    """
    import torch_npu

    _check_converters(gm)
    _check_patterns()
    level = getattr(torch_npu.npu, "_get_deterministic_level", lambda: None)()
    hf32 = [torch_npu.npu.matmul.allow_hf32, torch_npu.npu.conv.allow_hf32]
    return repr([level, hf32, [_marks(value) for value in inputs]])


def _marks(value: Any) -> list[Any]:
    if not isinstance(value, torch.Tensor):
        return []
    from torchair.inference._gear_utils import get_dim_gears

    parameter = isinstance(value, torch.nn.Parameter) or hasattr(value, "_torchair_is_parameter")
    gears = sorted((get_dim_gears(value) or {}).items())
    return [gears, getattr(value, "_dynamo_static_input_type", None), parameter]


def _check_converters(gm: fx.GraphModule) -> None:
    from torchair._ge_concrete_graph.ge_converter import custom  # noqa: F401  Registers converters.

    for op in {node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}:
        converter = getattr(op, "_ge_converter", None)
        if converter is None:
            if op.namespace not in _TORCHS_OPS:
                raise Uncacheable(f"torchair makes the GE converter of {op} as it compiles")
        elif not _is_covered(inspect.unwrap(converter)):
            raise Uncacheable(f"the GE converter of {op} is neither torchair's nor moe-fx's")


def _check_patterns() -> None:
    try:
        from torchair.patterns.pattern_pass_manager import _pattern_manager
    except ImportError:
        return
    for entries in _pattern_manager().pass_dict.patterns.values():
        for entry in entries:
            closure = inspect.getclosurevars(entry.extra_check).nonlocals
            if not _is_covered(closure.get("replace_fn")):
                raise Uncacheable("patterns are registered with torchair whose changes the key would not show")


def _is_covered(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] in _COVERED
