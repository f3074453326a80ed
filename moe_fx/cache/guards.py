"""Conditions on sizes that capture, passes and lowering put on a graph, so that skipping them keeps the conditions.

Whatever asks about a symbolic size (a shape rule that distinguishes 1, say) leaves a guard in dynamo's ShapeEnv, under
which the result holds; dynamo checks it at every call. On a hit nothing asks, so the guards are kept in the entry as an
expression over the graph's symbolic inputs. On a hit it is first evaluated on the sizes at hand, then on the symbols
themselves, which puts the guards back. Inductor's and AOTAutograd's caches do the same with the same two ShapeEnv
methods, which are what this file isolates.
"""

from __future__ import annotations

import ast
import hashlib
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_fx.cache.errors import Uncacheable
from moe_fx.errors import CacheError

__all__ = ["SizeGuards"]


class SizeGuards:
    """The guards of one compilation.

    Args:
        gm: dynamo's graph, or a later form of it, before anything is asked about its sizes that is to be kept.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        nodes = gm.graph.find_nodes(op="placeholder")
        values = [node.meta.get("example_value", node.meta.get("val")) for node in nodes]
        mode = torch._guards.detect_fake_mode(values)
        self._env: ShapeEnv | None = mode.shape_env if mode is not None else None
        self._sizes: list[Any] = [v for v in values if isinstance(v, torch.SymInt) and _is_input_symbol(v)]
        # As they are now: a later guard may make one of them a number.
        self._symbols = {size.node.expr for size in self._sizes}
        self._known = len(self._env.guards) if self._env is not None else 0

    def describe(self) -> str:
        """What is known of sizes before anything is asked: ranges of symbols and the guards so far, for the key."""
        if self._env is None:
            return ""
        ranges = sorted(f"{symbol} in {bounds}" for symbol, bounds in self._env.var_to_range.items())
        asserts = sorted(str(item.expr) for items in self._env.deferred_runtime_asserts.values() for item in items)
        # In the form that :meth:`added` writes, guards that an entry put back read like those that were there before.
        ours = sorted(self._expression([g for g in self._env.guards if self._is_ours(g)]).split(" and "))
        # What follows from sizes that became numbers says nothing more; where an entry gives them, nobody asks for it.
        others = {str(self._env.replace(g.expr)) for g in self._env.guards if not self._is_ours(g)} - {"True"}
        replaced = sorted(f"{symbol} is {value}" for symbol, value in self._env.replacements.items())
        return "\n".join([*ranges, *replaced, *ours, *sorted(others), *asserts])

    def added(self) -> str:
        """The guards since this object was made, as an expression; "" for none.

        Raises:
            Uncacheable: one is about a size that is no input of the graph.
        """
        if self._env is None:
            return ""
        new = list(self._env.guards[self._known :])
        for guard in new:
            if not self._is_ours(guard):
                raise Uncacheable(f"the graph holds under {guard.expr}, which is about sizes that are no inputs of it")
        if not new:
            return ""
        expression = self._expression(new)
        try:
            _check_arithmetic(expression or "True")
        except CacheError as error:
            raise Uncacheable(f"the graph holds under {expression}, which could not be read back") from error
        return expression

    @staticmethod
    def variant(expression: str) -> str:
        """What tells entries apart that hold for different sizes and lie side by side."""
        return hashlib.sha256(expression.encode()).hexdigest()[:12] if expression else ""

    def hold(self, expression: str) -> bool:
        """Whether kept guards hold for the sizes at hand; if so, dynamo guards on them from here on.

        Raises:
            CacheError: the expression is not what :meth:`added` writes.
        """
        if not expression:
            return True
        _check_arithmetic(expression)
        if self._env is None:
            return False
        if not self._env.evaluate_guards_expression(expression, [size.node.hint for size in self._sizes]):
            return False
        return bool(self._env.evaluate_guards_expression(expression, self._sizes))

    def _is_ours(self, guard: Any) -> bool:
        return bool(guard.expr.free_symbols <= self._symbols)

    def _expression(self, guards: list[Any]) -> str:
        if self._env is None or not guards:
            return ""
        # A symbol that became a number would be left out as static: its guard is what must come back.
        return self._env.produce_guards_expression(self._sizes, guards=guards, ignore_static=False) or ""


def _is_input_symbol(size: torch.SymInt) -> bool:
    return bool(size.node.expr.is_symbol and size.node.has_hint())


_ARITHMETIC = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop,
    ast.Constant, ast.Load,
)  # fmt: skip
# What sympy's printer for guards writes, by full name: torch.sym_not and the like, and no other function of a module.
_FUNCTIONS = frozenset(
    (
        "max", "min", "abs", "int", "float", "bool", "round", "IsNonOverlappingAndDenseIndicator",
        "math.ceil", "math.floor", "math.trunc", "math.sqrt", "math.pow", "math.log2",
        "torch.sym_float", "torch.sym_int", "torch.sym_ite", "torch.sym_max", "torch.sym_min", "torch.sym_not",
        "torch.sym_sum", "torch._sym_sqrt", "torch._sym_log2",
    )
)  # fmt: skip


def _check_arithmetic(expression: str) -> None:
    """Admit numbers, ``L['t0']``, operators, comparisons and calls of a few functions; nothing else is evaluated."""
    try:
        pending: list[ast.AST] = [ast.parse(expression, mode="eval")]
    except SyntaxError as error:
        raise CacheError("a cache entry's guards are no expression") from error
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Call) and not node.keywords and ast.unparse(node.func) in _FUNCTIONS:
            pending += node.args
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "L":
            pending.append(node.slice)
        elif isinstance(node, _ARITHMETIC):
            pending += ast.iter_child_nodes(node)
        else:
            raise CacheError(f"a cache entry's guards hold {ast.unparse(node)!r}, which is no arithmetic on sizes")
