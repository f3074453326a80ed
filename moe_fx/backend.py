"""The ``torch.compile`` backend ``moe_ascend``: capture, match, lower, hand off; unfused whenever fusing cannot work.

Found through the entry-point group ``torch_dynamo_backends``. Importing this module, which ``torch.compile`` does
before any tracing, also installs the hooks that make transformers' eager experts traceable, and keep the sizes of
attention symbolic on NPUs (only while this backend traces).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moe_fx import downstream
from moe_fx.cache.artifacts import Artifacts
from moe_fx.cache.graph_cache import GraphCache
from moe_fx.capture import copy_graph_module, export, needs_gradients, restart_with_constant_floats, specialize
from moe_fx.check import checked
from moe_fx.dump import GraphDumper
from moe_fx.errors import CaptureError, MoeFxError, MoeFxWarning, UnsupportedError
from moe_fx.integrations import torch_npu as torch_npu_hook
from moe_fx.integrations import transformers as transformers_hook
from moe_fx.lowering import targets
from moe_fx.options import Options
from moe_fx.pipeline import PREPARE_HINT, GraphReport, lower, run_passes
from moe_fx.shards import over_shards

transformers_hook.install()
torch_npu_hook.install()


def moe_ascend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one dynamo graph.

    Args:
        gm, example_inputs: as dynamo gives them to a backend.
        options: see :class:`moe_fx.options.Options`.
        mode: ``torch.compile``'s mode, passed to Inductor.

    Returns:
        A callable with the graph's calling convention.
    """
    local, refusal = None, None
    try:
        local = None if needs_gradients(example_inputs) else over_shards(gm, example_inputs)
    except CaptureError as error:
        refusal = error
    if local is not None:
        return local.called_with_dtensors(moe_ascend(local.gm, local.inputs, options=options, mode=mode))
    opts = Options.from_user(options)
    target = targets.of_devices(example_inputs) if opts.target == "auto" else opts.target
    finisher = downstream.resolve(opts.downstream, target)
    compile_id = str(torch._guards.CompileContext.current_compile_id() or "0/0")
    report = GraphReport(compile_id, target, finisher)

    def finish(graph: fx.GraphModule, artifacts: Artifacts | None = None) -> Callable[..., Any]:
        compiled = downstream.compile_graph(
            finisher,
            graph,
            example_inputs,
            mode=mode,
            config=opts.downstream_options,
            artifacts=artifacts,
            automatic=opts.downstream == "auto",
        )
        report.artifacts = list(artifacts.outcomes) if artifacts is not None else []
        if opts.report is not None:  # Last: dynamo may restart a compilation from within the downstream compiler.
            opts.report(report)
        return compiled

    if needs_gradients(example_inputs):
        report.unfused_reason = "the graph needs gradients, and fused ops are inference-only"
        _warn(f"{report.unfused_reason}; it runs unfused. Call the model under torch.no_grad() to fuse it.")
        return finish(gm)

    if finisher != "eager" and refusal is None:
        restart_with_constant_floats(gm)
    dumper = GraphDumper(opts.dump_dir, compile_id)
    unfused = canonical = None
    try:
        if refusal is not None:
            raise refusal
        start = time.perf_counter()
        specialized = specialize(gm)
        cache = GraphCache(specialized, opts, report, mode)
        restored = cache.restore()
        if restored is not None:
            fused = restored
        else:
            fused = export(specialized, example_inputs)
            report.capture_seconds = time.perf_counter() - start - report.cache_seconds
            unfused = copy_graph_module(fused) if opts.check else None
            run_passes(fused, opts, report, dumper)
            canonical = copy_graph_module(fused) if opts.check else None
            lower(fused, opts, report, dumper, mode)
            fused = cache.keep(fused)
    except Exception as error:
        if opts.strict:
            raise
        report.sites, report.unfused_reason = [], f"{type(error).__name__}: {error}"
        advice = "" if isinstance(error, MoeFxError) else " This is a bug in moe-fx: please report it."
        _warn(f"a graph runs unfused, because it could not be rewritten ({report.unfused_reason}).{advice}")
        return finish(gm)

    _account(report, opts)
    if opts.dump_dir is not None:  # Laying a report out takes longer than a hit in the cache.
        dumper.text("report.txt", _plain_report(report))
    compiled = finish(fused, cache.artifacts)
    if unfused is not None and canonical is not None:
        return checked(compiled, unfused, canonical, report, opts)
    return compiled


def _account(report: GraphReport, opts: Options) -> None:
    """Nothing stays silent: misses raise in strict mode, and an unfused MoE or an empty result warns."""
    if opts.strict and report.missed:
        lines = [f"{site.kind} at {site.module or site.source}: {site.reason}" for site in report.missed]
        raise UnsupportedError("strict: these sites were not fused:\n  " + "\n  ".join(lines))
    uncaptured = [site for site in report.missed if PREPARE_HINT in site.reason]
    if uncaptured:
        where = ", ".join(sorted({site.module or "a router" for site in uncaptured})[:3])
        _warn(f"the experts behind {where} could not be captured and run unfused; {PREPARE_HINT}.")
    elif not report.matched and report.has_matmul:
        misses = f"{len(report.missed)} candidate sites missed" if report.missed else "no candidate site found"
        _warn(f"nothing in graph {report.compile_id} was fused ({misses}); moe_fx.explain(model, ...) tells why.")


def _plain_report(report: GraphReport) -> str:
    from moe_fx.explanation import Explanation

    return Explanation([report]).to_text()


def _warn(message: str) -> None:
    warnings.warn(f"moe_ascend: {message}", MoeFxWarning, stacklevel=3)
