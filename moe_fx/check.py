"""The live check (``options={"check": True}``): every rewritten site against what it replaced, on the user's inputs.

On each call the captured graph also runs unfused, node by node. Every canonical op is then given the *unfused* values
of its inputs, and its results are compared with the unfused values that they stand for; so each op answers for itself
and no error is carried on. Routers are compared by expert sets, then by the weights of equal experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_fx.errors import CheckError
from moe_fx.lowering.ops import CANONICAL_OPS, Tolerance
from moe_fx.lowering.targets import canonical_name

if TYPE_CHECKING:
    from moe_fx.options import Options
    from moe_fx.passes.core import Site
    from moe_fx.pipeline import GraphReport


def checked(
    compiled: Callable[..., Any],
    unfused: fx.GraphModule,
    canonical: fx.GraphModule,
    report: GraphReport,
    options: Options,
) -> Callable[..., Any]:
    """Wrap ``compiled`` so that each call first checks every matched site.

    Raises (when called):
        CheckError: a site is out of tolerance or selects other experts; the message names the file with the case.
    """

    def check_then_run(*args: Any) -> Any:
        # Mutated inputs must reach the compiled graph as they came.
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with torch.no_grad():
            failure = first_failure(unfused, canonical, report.sites, copies)
        if failure is not None:
            path = failure.dump(Path(options.check_dir))
            raise CheckError(
                f"check failed: {failure.op} at {failure.module or failure.source}: {failure.what}. "
                f"The case is in {path}; run it with: python {path}"
            )
        return compiled(*args)

    return check_then_run


class Failure:
    """The first site that differs, with all that is needed to run it again."""

    def __init__(self, site: Site, what: str, args: Any, kwargs: Any, expected: Any) -> None:
        self.op, self.module, self.source, self.what = site.op, site.module, site.source, what
        self._args, self._kwargs, self._expected = args, kwargs, expected

    def dump(self, folder: Path) -> Path:
        """Write the case as ``<op>.pt`` and a script that runs it; returns the script's path."""
        folder.mkdir(parents=True, exist_ok=True)
        name = self.op.split(".")[-1]
        data = folder / f"{name}.pt"
        torch.save({"args": _plain(self._args), "kwargs": _plain(self._kwargs), "expected": self._expected}, data)
        script = folder / f"{name}.py"
        script.write_text(
            f'"""{self.op} at {self.module}: {self.what}\n\nModel source: {self.source}\n"""\n'
            "from pathlib import Path\n\n"
            "import torch\n\n"
            "from moe_fx.check import compare_outputs\n\n"
            f'case = torch.load(Path(__file__).with_suffix(".pt"))\n'
            f'actual = torch.ops.{self.op}(*case["args"], **case["kwargs"])\n'
            f'print(compare_outputs("{name}", actual, case["expected"]) or "within tolerance")\n'
        )
        return script


def first_failure(
    unfused: fx.GraphModule, canonical: fx.GraphModule, sites: list[Site], args: list[Any]
) -> Failure | None:
    """Run the unfused graph, then every canonical op on its values; the first site that differs, or None."""
    values = _run_unfused(unfused, args)
    site_of = {site.node: site for site in sites if site.matched}
    stands_for = _stands_for(canonical, site_of)
    env: dict[fx.Node, Any] = {}
    inputs = iter(values["inputs"])
    for node in canonical.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(inputs)
            continue
        if node.op == "output":
            continue
        if node.op == "get_attr":
            env[node] = getattr(canonical, str(node.target))
            continue
        if node.target is torch.ops.aten.copy_.default:
            env[node] = None
            continue
        node_args, node_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        original = stands_for.get(node, node.name)
        if node not in stands_for and original in values["nodes"] and canonical_name(node) is None:
            env[node] = values["nodes"][original]
            continue
        env[node] = node.target(*node_args, **node_kwargs)
        site = site_of.get(node.name)
        if site is not None and site.replaced:
            expected = _expected(site, values["nodes"])
            what = compare_outputs(site.op.split(".")[-1], env[node], expected)
            if what:
                return Failure(site, what, node_args, node_kwargs, expected)
        elif node in stands_for:
            env[node] = _like(values["nodes"][original], env[node])
    return None


def compare_outputs(op: str, actual: Any, expected: Any) -> str:
    """What is wrong with an op's results, or "" when they are within its tolerance."""
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, (tuple, list)) else (expected,)
    if op == "route":
        return _compare_routes(actual, expected)
    for index, (got, want) in enumerate(zip(actual, expected, strict=False)):
        if want is not None:
            tolerance = CANONICAL_OPS[op].tolerance.get(want.dtype)
            what = _compare(got, want, tolerance)
            if what:
                return f"result {index} {what}"
    return ""


def _compare_routes(actual: tuple[Any, ...], expected: Any) -> str:
    (weights, ids), (want_weights, want_ids) = actual, expected
    if want_ids is None:
        return ""
    order, want_order = ids.long().argsort(-1), want_ids.long().argsort(-1)
    ids, want_ids = ids.long().gather(-1, order), want_ids.long().gather(-1, want_order)
    different = (ids != want_ids).any(-1)
    if different.any():
        return f"selects other experts for {int(different.sum())} of {different.numel()} tokens"
    if want_weights is None:
        return ""
    tolerance = CANONICAL_OPS["route"].tolerance.get(want_weights.dtype)
    what = _compare(weights.gather(-1, order), want_weights.gather(-1, want_order), tolerance)
    return f"weights {what}" if what else ""


def _compare(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance | None) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
    if tolerance is None or got.numel() == 0:
        return "" if torch.equal(got, want) else "differs"
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return "is not finite where the unfused value is, or the reverse"
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    error, norm = (got - want).norm(), want.norm()
    if error > tolerance.rel_l2 * norm + 1e-30:
        worst = (got - want).abs().max()
        return (
            f"has relative L2 error {float(error / norm):.3g} (bound {tolerance.rel_l2:g}), largest {float(worst):.3g}"
        )
    return ""


def _plain(tree: Any) -> Any:
    """fx's immutable containers as plain ones, which ``torch.load`` reads without trusting the file."""
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(item) for item in tree]
    return tree


def _run_unfused(unfused: fx.GraphModule, args: list[Any]) -> dict[str, Any]:
    nodes: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            # A copy: later mutations of inputs (copy_) must not show in earlier values.
            nodes[n.name] = result.clone() if isinstance(result, torch.Tensor) else result
            return result

    inputs = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    Recorder(unfused, garbage_collect_values=False).run(*args)
    return {"nodes": nodes, "inputs": inputs}


def _stands_for(canonical: fx.GraphModule, site_of: dict[str, Site]) -> dict[fx.Node, str]:
    """Unpackings of canonical ops (and widened ids) -> the unfused node whose value they stand for."""
    found: dict[fx.Node, str] = {}
    for node in canonical.graph.nodes:
        site = site_of.get(node.name)
        if site is None:
            continue
        several = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        for index, name in enumerate(site.replaced):
            if name and index in several:
                found[several[index]] = name
    return found


def _expected(site: Site, nodes: dict[str, Any]) -> list[Any]:
    return [nodes.get(name) if name else None for name in site.replaced]


def _like(value: Any, sample: Any) -> Any:
    """The unfused value in the dtype and shape that the canonical op's result has (ids are int32 there)."""
    return value.to(sample.dtype) if isinstance(value, torch.Tensor) else value
