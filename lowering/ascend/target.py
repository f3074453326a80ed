"""The Ascend target: canonical ops to torch_npu's, one choice per node, in graphs on NPU devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import operator

import torch
from torch import fx

from moe_fx.lowering.ascend import attention, experts, experts_int4, experts_int8, norms, prefetch, rope, route, streams
from moe_fx.lowering.ascend.arguments import bound, value
from moe_fx.lowering.ascend.choice import Choice, Refused
from moe_fx.lowering.ascend.settings import Chosen, Settings
from moe_fx.lowering.targets import ReferenceTarget, canonical_name

aten = torch.ops.aten
# Ops that keep every expert id as it is.
_PASS_THROUGH = (
    aten.view, aten.reshape, aten._unsafe_view, aten.alias, aten.detach, aten.clone, aten._to_copy, aten.to,
)  # fmt: skip
_CHOOSERS = {
    "rms_norm": norms.choose_rms_norm,
    "add_rms_norm": norms.choose_add_rms_norm,
    "qk_norm_rope": rope.choose,
    "swiglu": norms.choose_swiglu,
}
_EXPERTS = {
    "experts": experts.choose,
    "experts_int8": experts_int8.choose,
    "experts_int4": experts_int4.choose,
}


class AscendTarget(ReferenceTarget):
    """See :class:`moe_fx.lowering.targets.Target`."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__("ascend")
        self.settings = settings or Settings()

    def configured(self, options: Chosen, mode: str | None = None) -> AscendTarget:
        """This target with the user's ``ascend_*`` options."""
        return AscendTarget(Settings.of(options, mode))

    def kernel_for(self, node: fx.Node, downstream: str) -> str:
        """See :class:`Target`."""
        try:
            return self._choose(node, downstream, canonical_name(node) in _EXPERTS and ids_in_range(node)).kernel
        except Refused as reason:
            return f"{super().kernel_for(node, downstream)}: {reason}"

    def lower(self, gm: fx.GraphModule, downstream: str) -> None:
        """See :class:`Target`."""
        # What torch_npu makes of PyTorch's attention is not for every graph that torchair finishes.
        others = (attention.SDPA,) if downstream == "torchair" else ()
        nodes = [node for node in gm.graph.nodes if canonical_name(node) is not None or node.target in others]
        # Looked up first: a router that is lowered already is not recognised any more.
        safe = {node for node in nodes if canonical_name(node) in _EXPERTS and ids_in_range(node)}
        lowered = False
        for node in nodes:
            try:
                choice = self._choose(node, downstream, node in safe)
            except Refused:
                continue
            choice.rewrite(gm, node)
            lowered = True
        if lowered and downstream == "torchair" and self.settings.prefetch_mib:
            prefetch.insert(gm, self.settings.prefetch_mib, captured=not self.settings.ge)
        if lowered and downstream == "torchair" and self.settings.shared_stream:
            streams.insert(gm, captured=not self.settings.ge)
        gm.graph.lint()
        gm.recompile()

    def _choose(self, node: fx.Node, downstream: str, ids_in_range: bool) -> Choice:
        name = canonical_name(node)
        if importlib.util.find_spec("torch_npu") is None:
            raise Refused("torch_npu is not installed")
        if name in _CHOOSERS:
            return _CHOOSERS[name](node)
        settings = dataclasses.replace(self.settings, ge=self.settings.ge and downstream == "torchair")
        if name == "attention" or node.target is attention.SDPA:
            return attention.choose(node, settings, downstream)
        if name == "route":
            return route.choose(node, settings)
        if name in _EXPERTS:
            return _EXPERTS[name](node, settings, ids_in_range)
        raise Refused(f"no operator for {name}")


def ids_in_range(node: fx.Node) -> bool:
    """Whether an experts node's ids come from a router over exactly its experts."""
    a = bound(node)
    ids = a["ids"]
    while isinstance(ids, fx.Node) and getattr(ids.target, "overloadpacket", None) in _PASS_THROUGH:
        ids = ids.args[0]
    if ids.target is not operator.getitem or canonical_name(ids.args[0]) != "route" or ids.args[1] != 1:
        return False
    return value(bound(ids.args[0])["logits"]).shape[-1] == value(a["w13"]).shape[0]
