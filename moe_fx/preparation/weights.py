"""Where a block keeps its experts' weights: one module per expert, or parameters with a leading expert dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moe_fx.passes.core import Miss, require
from moe_fx.passes.graph import ALIASES, CASTS, UNIT_DIMS, aten, dtype, is_op, rank
from moe_fx.preparation.trace import selected

_TRANSPOSES = (aten.t, aten.transpose, aten.permute, aten.mT, aten.numpy_T)


@dataclass(frozen=True)
class Slot:
    """One weight of every expert.

    Attributes:
        name: as in messages: ``experts.*.w1.weight``.
        paths: dotted path per expert; a single one when the experts are already stacked in one parameter.
        n_experts: how many experts there are.
    """

    name: str
    paths: tuple[str, ...]
    n_experts: int

    @property
    def stacked(self) -> bool:
        """Whether the weights already are one tensor."""
        return len(self.paths) == 1


class ExpertStore:
    """The expert weights under one block, found by structure.

    Attributes:
        path: of the ModuleList (or of the module with stacked parameters), relative to the block.
        n_experts: number of experts.
        modules: the expert modules; empty when parameters are stacked.
        example: one of the weights, for dtype and device.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self.path = path
        holder = block.get_submodule(path)
        self.modules = expert_modules(holder)
        self.example = next(p for p in holder.parameters() if p.dim() >= 2)
        self._slots: dict[str, tuple[Slot, int]] = {}
        prefix = f"{path}." if path else ""
        if self.modules:
            self.n_experts = len(self.modules)
            children = [name for name, _ in holder.named_children()]
            for suffix, _ in self.modules[0].named_parameters():
                paths = tuple(f"{prefix}{child}.{suffix}" for child in children)
                slot = Slot(f"{prefix}*.{suffix}", paths, self.n_experts)
                self._slots |= {p: (slot, e) for e, p in enumerate(paths)}
        else:
            self.n_experts = stacked_experts(holder)
            for name, parameter in holder.named_parameters(recurse=False):
                if parameter.dim() in (2, 3) and parameter.shape[0] == self.n_experts:
                    slot = Slot(prefix + name, (prefix + name,), self.n_experts)
                    self._slots[prefix + name] = (slot, -1)

    def weight_of(self, operand: Any) -> tuple[Slot, int, bool] | None:
        """``(slot, expert, swapped)`` when ``operand`` is one expert's weight, maybe with its two dims swapped."""
        return self._find(operand, stacked_rank=3)

    def bias_of(self, operand: Any) -> tuple[Slot, int] | None:
        """``(slot, expert)`` when ``operand`` is one expert's bias."""
        found = self._find(operand, stacked_rank=2)
        return None if found is None else found[:2]

    def _find(self, node: Any, stacked_rank: int) -> tuple[Slot, int, bool] | None:
        swapped, expert = False, None
        while isinstance(node, fx.Node) and node.op == "call_function":
            picked = selected(node)
            if picked is not None and expert is None and rank(picked[0]) == stacked_rank:
                node, expert = picked
            elif is_op(node, *_TRANSPOSES) and _swaps_matrix(node):
                node, swapped = node.args[0], not swapped
            elif is_op(node, *ALIASES, *UNIT_DIMS) or (is_op(node, *CASTS) and dtype(node) == dtype(node.args[0])):
                node = node.args[0]
            else:
                return None
        if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) not in self._slots:
            return None
        slot, own = self._slots[str(node.target)]
        if slot.stacked == (expert is None) or (slot.stacked and rank(node) != stacked_rank):
            return None
        return slot, own if expert is None else expert % slot.n_experts, swapped

    def hidden_sizes(self) -> list[int]:
        """Sizes that hidden states may have, the likeliest first."""
        if self.modules:
            linears = [m for m in self.modules[0].modules() if isinstance(m, nn.Linear)]
            return list(dict.fromkeys(linear.in_features for linear in linears))
        return list(dict.fromkeys((self.example.shape[-1], self.example.shape[-2])))

    def require_alike(self) -> None:
        """Raise :class:`Miss` unless all expert modules differ in nothing but the values of their parameters."""
        if not self.modules:
            return
        seen: set[int] = set()
        first = dict(signature(self.modules[0]))
        absent = (None, "absent")
        for e, expert in enumerate(self.modules):
            name = f"{self.path}.{e}".lstrip(".")
            for parameter in expert.parameters():
                require(id(parameter) not in seen, f"{name} shares a parameter with another expert")
                seen.add(id(parameter))
            own = dict(signature(expert))
            for key in first | own:
                (was, was_shown), (now, shown) = first.get(key, absent), own.get(key, absent)
                if was != now:
                    raise Miss(f"{name} differs from {self.path}.0 in {key}: {shown} instead of {was_shown}")


def find_experts(model: nn.Module, done: Callable[[nn.Module], bool]) -> Iterator[tuple[str, str]]:
    """``(path of a module, path of its experts in it)`` of whatever has the structure of experts.

    A module that is ``done`` counts as one, and nothing inside it does.
    """
    finished: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in finished):
            continue
        if done(module):
            finished.append(path)
            yield path, ""
            continue
        for name, child in module.named_children():
            if expert_modules(child):
                yield path, name
        if stacked_experts(module):
            yield path, ""


def expert_modules(holder: nn.Module) -> list[nn.Module]:
    """The children of a ModuleList or ModuleDict whose parameters are two or three linear projections each."""
    if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
        return []
    children = [child for _, child in holder.named_children()]
    return children if len(children) >= 2 and all(_is_small_mlp(child) for child in children) else []


def _is_small_mlp(module: nn.Module) -> bool:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    owned = {id(p) for linear in linears for p in linear.parameters()}
    return len(linears) in (2, 3) and all(id(p) in owned for p in module.parameters())


def stacked_experts(holder: nn.Module) -> int:
    """How many experts two or more 3-D parameters of the module are stacked for; 0 if it holds none."""
    sizes = [p.shape[0] for p in holder.parameters(recurse=False) if p.dim() == 3]
    return sizes[0] if len(sizes) >= 2 and len(set(sizes)) == 1 and sizes[0] >= 2 else 0


def signature(module: nn.Module) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Everything that decides what a module computes, except its parameters' values: ``(name, (key, shown))``."""
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        yield path or "class", (type(child), type(child).__name__)
        for name, p in child.named_parameters(recurse=False):
            what = (tuple(p.shape), p.dtype, p.device, p.requires_grad)
            yield prefix + name, (what, f"{p.dtype} {list(p.shape)}")
        for name, buffer in child.named_buffers(recurse=False):
            yield prefix + name, (buffer.tolist() if buffer.numel() < 64 else id(buffer), "another value")
        for name, attribute in vars(child).items():
            if not name.startswith("_") and not isinstance(attribute, (nn.Module, torch.Tensor)):
                plain = isinstance(attribute, (bool, int, float, str, type(None), torch.dtype))
                yield prefix + name, (attribute if plain else id(attribute), repr(attribute)[:60])


def _swaps_matrix(node: fx.Node) -> bool:
    """Whether a transposition swaps exactly the last two dims."""
    n = rank(node)
    if is_op(node, aten.transpose):
        return {node.args[1] % n, node.args[2] % n} == {n - 1, n - 2}
    if is_op(node, aten.permute):
        order = [d % n for d in node.args[1]]
        return order == [*range(n - 2), n - 1, n - 2]
    return n == 2 or is_op(node, aten.mT)
