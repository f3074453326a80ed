"""Reading a module of stacked experts (transformers 5.x): what it computes, of which of its parameters.

The module is captured alone, on the meta device, by the same passes that match whole models; the one ``moe_fx.experts``
that they make of it names its weights and attributes. Neither class nor parameter names are looked at.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_fx.errors import MoeFxWarning
from moe_fx.lowering.targets import canonical_name
from moe_fx.passes.core import MatchContext, Miss, Pass, require
from moe_fx.passes.graph import CASTS, dtype, is_op
from moe_fx.preparation.block import Unfit

# Operands of `experts` after (x, weights, ids), in its order.
OPERANDS = ("w13", "w2", "b13", "b2", "w3", "b3")
_TOKENS, _TOP_K = 5, 2
_SERIAL = itertools.count()


@dataclass(frozen=True)
class ModuleForm:
    """How an experts module is called, and what it computes.

    Attributes:
        names: the parameters of its forward, in order.
        x, weights, ids: which of them are the tokens [T, H], the routing weights and the expert ids [T, k].
        x_dtype, weights_dtype: what these are cast to first, if they are.
        operands: for each operand of ``moe_fx.experts`` that there is, the name of the module's parameter.
        attributes: of ``moe_fx.experts`` that differ from its defaults.
    """

    names: tuple[str, ...]
    x: str
    weights: str
    ids: str
    x_dtype: torch.dtype | None
    weights_dtype: torch.dtype | None
    operands: Mapping[str, str]
    attributes: Mapping[str, Any]


def read_experts_module(module: nn.Module, n_experts: int) -> ModuleForm:
    """Read a module whose 3-D parameters are stacked for ``n_experts`` experts.

    Raises:
        Unfit: it takes other inputs than tokens, routing weights and expert ids.
        Miss: it cannot be captured, or is not matched as experts; the reason says which.
    """
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if len(names) < 3:
        raise Unfit("its forward does not take tokens, routing weights and expert ids")
    clone = _on_meta(module)
    stacked = [p for p in clone.parameters(recurse=False) if p.dim() == 3 and p.shape[0] == n_experts]
    # Every projection maps from or to hidden states.
    common = [size for size in stacked[0].shape[:0:-1] if all(size in p.shape[1:] for p in stacked)]
    first = None if common else Miss("its stacked parameters have no size in common that hidden states could have")
    for hidden in dict.fromkeys(common):
        for weights, ids in (names[2:0:-1], names[1:3]):
            try:
                return _read(clone, names, names[0], weights, ids, hidden, stacked[0].dtype)
            except Miss as miss:
                first = first or miss
    assert first is not None
    raise first


def _on_meta(module: nn.Module) -> nn.Module:
    """A shallow copy whose own parameters are on the meta device: nothing is computed or held twice."""
    clone = copy.copy(module)
    vars(clone).update(vars(module))
    clone._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    return clone


def _read(
    module: nn.Module, names: tuple[str, ...], x: str, weights: str, ids: str, hidden: int, dtype: torch.dtype
) -> ModuleForm:
    shaped = {
        x: torch.empty(_TOKENS, hidden, device="meta", dtype=dtype),
        weights: torch.empty(_TOKENS, _TOP_K, device="meta", dtype=dtype),
        ids: torch.empty(_TOKENS, _TOP_K, device="meta", dtype=torch.int64),
    }
    inputs = {name: shaped[name] for name in names[:3]}
    reader = _Reader(module, inputs)
    # Nothing that the user set for models applies here.
    options = {
        "target": "cpu", "downstream": "eager", "passes": {}, "level": "tolerance", "strict": False, "dump_dir": None,
        "check": False, "extra_passes": (reader,),
    }  # fmt: skip
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", MoeFxWarning)
            call = _fresh_caller()
            torch.compile(call, backend="moe_ascend", fullgraph=True, dynamic=False, options=options)(module, inputs)
    except Exception as error:
        if reader.read is None and reader.failure is None:
            cause = (str(error).strip().splitlines() or [""])[0]
            raise Miss(f"it cannot be captured on tokens, routing weights and expert ids ({cause})") from error
    if reader.failure is not None:
        raise reader.failure
    if reader.read is None:
        raise Miss("no experts were recognised in it")
    casts, operands, attributes = reader.read
    return ModuleForm(names, x, weights, ids, casts.get(x), casts.get(weights), operands, attributes)


def _fresh_caller() -> Callable[..., Any]:
    """A function with code of its own, so that what dynamo keeps of this reading counts against no code of the user."""

    def caller(module: nn.Module, inputs: dict[str, Any]) -> Any:
        # By position: a decorated forward may call the parameters something else inside.
        return module(*inputs.values())

    code = caller.__code__.replace(co_name=f"moe_fx_read_{next(_SERIAL)}")
    return types.FunctionType(code, {"__builtins__": builtins, "__name__": __name__})


class _Reader(Pass):
    """Takes down, without changing anything, the one ``moe_fx.experts`` that the match passes left in the graph."""

    name = "read_experts"

    def __init__(self, module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        named = [*inputs.items(), *module.named_parameters(recurse=False)]
        self._names = {id(tensor): name for name, tensor in named}
        self._inputs = set(inputs)
        self.read: tuple[dict[str, torch.dtype], dict[str, str], dict[str, Any]] | None = None
        self.failure: Miss | None = None

    def run(self, ctx: MatchContext) -> None:
        """See :class:`Pass`."""
        try:
            self.read = self._take_down(ctx)
        except Miss as miss:
            self.failure = miss

    def _take_down(self, ctx: MatchContext) -> tuple[dict[str, torch.dtype], dict[str, str], dict[str, Any]]:
        found = [node for node in ctx.graph.nodes if canonical_name(node) == "experts"]
        missed = [site.reason for site in ctx.sites if site.kind == "experts" and not site.matched]
        require(len(found) == 1, missed[0] if missed else f"{len(found)} groups of experts were recognised in it")
        node = found[0]
        returned = ctx.graph.output_node().args[0]
        require(tuple(returned) == (node,), "it does more than its experts' weighted sum")
        casts: dict[str, torch.dtype] = {}
        for given in node.args[:3]:
            source = given
            while is_op(source, *CASTS):
                source = source.args[0]
            name = self._name(source)
            require(name in self._inputs, f"its experts take {name}, which is none of its inputs")
            if source is not given:
                casts[name] = dtype(given)
        operands = {key: self._name(arg) for key, arg in zip(OPERANDS, node.args[3:], strict=False) if arg is not None}
        own = not self._inputs & set(operands.values())
        require(own, "its expert weights are inputs, not parameters")
        return casts, operands, dict(node.kwargs)

    def _name(self, node: fx.Node) -> str:
        held = node.meta.get("grapharg") if node.op == "placeholder" else None
        name = None if held is None else self._names.get(id(held.example))
        if name is None:
            raise Miss("its experts take tensors that it computes, not its inputs and parameters", node)
        return name
