"""What a pass is, what it may see, and what it must report: the contract between the pipeline and every pass."""

from __future__ import annotations

import abc
import enum
import hashlib
import inspect
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.pattern_matcher import stable_topological_sort

from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.passes.graph import describe, module_path, same_shape, source_line, value


class Level(str, enum.Enum):
    """How close a rewrite is to what it replaces, on the references of the canonical ops."""

    BITWISE = "bitwise"
    TOLERANCE = "tolerance"


class Stage(str, enum.Enum):
    """Where in the pipeline a pass runs."""

    NORMALIZE = "normalize"
    MATCH = "match"
    PLAN = "plan"


class Miss(Exception):
    """A predicate failed: ``reason`` says which, ``node`` is where."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


def require(condition: bool, reason: str, node: fx.Node | None = None) -> None:
    """Raise :class:`Miss` unless ``condition`` holds."""
    if not condition:
        raise Miss(reason, node)


@dataclass
class Site:
    """One candidate site and how it ended; see rule 2 of the design.

    Attributes:
        kind: what was looked for: ``router``, ``experts``, ``norm``, ``qk_norm_rope``, ``swiglu`` or a pass's own kind.
        matched: whether it was rewritten.
        pass_name: the pass that matched it, or the one whose predicate failed.
        module: dotted path of the module that wrote it, as in ``model.named_modules()``.
        source: ``file:line`` and code of the model's source.
        form: which spelling matched (``grouped_mm``, ``batched_mm``, ``softmax``, ...).
        level: of the rewrite.
        reason: the first predicate that failed, for a miss.
        op: name of the canonical node, for a match.
        attributes: the canonical op's attributes that differ from their defaults.
        kernel: what the target runs it with; filled in by the lowering.
        replaced: per result of the canonical op, the name of the captured node whose value it stands for, or "".
    """

    kind: str
    matched: bool
    pass_name: str
    module: str
    source: str
    form: str = ""
    level: Level | None = None
    reason: str = ""
    op: str = ""
    node: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    kernel: str = ""
    replaced: tuple[str, ...] = ()


class Pass(abc.ABC):
    """One rewrite. A pass is one file: both forms in its docstring, a matcher, a rewrite.

    Subclass it, give ``name`` and override :meth:`run`. Use it with ``options={"extra_passes": [MyPass()]}``; there is
    no global registry.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.MATCH
    level: ClassVar[Level] = Level.BITWISE
    enabled_by_default: ClassVar[bool] = True
    # Names of passes whose results this one builds on.
    requires: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def run(self, ctx: MatchContext) -> None:
        """Rewrite ``ctx.graph`` in place, reporting every candidate site to ``ctx``."""

    @property
    def summary(self) -> str:
        """First line of the pass's docstring."""
        return (inspect.getdoc(type(self)) or self.name).splitlines()[0]

    def identity(self) -> str:
        """Hash of the source that defines this pass, for cache keys."""
        module = sys.modules[type(self).__module__]
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):
            source = repr(type(self))
        return hashlib.sha256(f"{self.name}\n{source}".encode()).hexdigest()


class MatchContext:
    """The graph under rewrite and the record of what was found in it.

    Passes create nodes with :meth:`emit`, put them in place with :meth:`replace`, and report through :meth:`matched`
    and :meth:`missed`.
    """

    def __init__(self, gm: fx.GraphModule, level: Level = Level.TOLERANCE) -> None:
        self.gm = gm
        self.graph: fx.Graph = gm.graph
        self.level = level
        self.sites: list[Site] = []
        self.current: Pass | None = None

    def allows(self, level: Level) -> bool:
        """Whether the user's level admits a rewrite of this level."""
        return self.level is Level.TOLERANCE or level is Level.BITWISE

    def emit(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        after: Sequence[fx.Node] = (),
        before: fx.Node | None = None,
        like: fx.Node,
    ) -> fx.Node:
        """Create ``target(*args, **kwargs)`` after the latest of ``after`` (default: of its arguments), or ``before``.

        The node takes its source line and module stack from ``like``, and its FakeTensor value from running the op.
        """
        kwargs = dict(kwargs or {})
        if before is not None:
            point = self.graph.inserting_before(before)
        else:
            inputs = list(after) or [n for n in _nodes_in((args, kwargs))]
            placeholders = self.graph.find_nodes(op="placeholder")
            latest = max([*inputs, placeholders[-1]]) if placeholders else max(inputs)
            point = self.graph.inserting_after(latest)
        with point:
            node = self.graph.call_function(target, tuple(args), kwargs)
        inherit_meta(node, like)
        try:
            node.meta["val"] = _run_fake(node)
        except Exception:
            self.graph.erase_node(node)
            raise
        return node

    def emit_op(self, op: str, args: Sequence[Any], attributes: Mapping[str, Any], *, like: fx.Node) -> fx.Node:
        """Create a canonical op node; attributes that equal the schema's defaults are left out."""
        overload = CANONICAL_OPS[op].overload
        try:
            return self.emit(overload, args, drop_defaults(overload, attributes), like=like)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            # The op's own shape inference refuses the arguments: the form was read wrongly, and stays as it was.
            raise Miss(f"moe_fx.{op} does not take these arguments: {error}", like) from error

    def output_of(self, node: fx.Node, index: int) -> fx.Node:
        """``node[index]`` of a node with several results."""
        with self.graph.inserting_after(node):
            item = self.graph.call_function(operator.getitem, (node, index))
        inherit_meta(item, node)
        item.meta["val"] = node.meta["val"][index]
        return item

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` stand for ``old``: shapes and dtypes must agree (else :class:`Miss`), strides are made to."""
        was, now = value(old), value(new)
        if was.dtype != now.dtype or not same_shape(was.shape, now.shape):
            raise Miss(
                f"the fused op gives {now.dtype} {tuple(now.shape)}, the model {was.dtype} {tuple(was.shape)}", old
            )
        if was.is_contiguous() and not now.is_contiguous():
            new = self.emit(torch.ops.aten.clone.default, (new,), {"memory_format": torch.contiguous_format}, like=old)
        old.replace_all_uses_with(new)

    def matched(
        self, kind: str, anchor: fx.Node, op_node: fx.Node, *, form: str, replaced: Sequence[fx.Node | str | None]
    ) -> None:
        """Record a rewritten site; ``replaced``: per result of the op, the captured node it stands for, if any."""
        assert self.current is not None
        self.sites.append(
            Site(
                kind=kind,
                matched=True,
                pass_name=self.current.name,
                module=module_path(anchor),
                source=source_line(anchor),
                form=form,
                level=self.current.level,
                op=str(op_node.target).removesuffix(".default"),
                node=op_node.name,
                attributes=dict(op_node.kwargs),
                replaced=tuple(n.name if isinstance(n, fx.Node) else n or "" for n in replaced),
            )
        )

    def missed(self, kind: str, anchor: fx.Node, miss: Miss) -> None:
        """Record a site that was left as it was."""
        assert self.current is not None
        where = miss.node or anchor
        reason = miss.reason if miss.node is None else f"{miss.reason} (at {describe(miss.node)})"
        self.sites.append(
            Site(
                kind=kind,
                matched=False,
                pass_name=self.current.name,
                module=module_path(anchor) or module_path(where),
                source=source_line(where) or source_line(anchor),
                reason=reason,
                node=anchor.name,
            )
        )

    def finish_pass(self) -> None:
        """Put the graph in order and drop what nothing uses any more."""
        stable_topological_sort(self.graph)
        self.graph.eliminate_dead_code()


def drop_defaults(overload: torch._ops.OpOverload, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that differ from the schema's defaults."""
    defaults = {a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()}
    missing = object()
    return {name: given for name, given in attributes.items() if not _same_default(defaults.get(name, missing), given)}


def inherit_meta(node: fx.Node, like: fx.Node) -> None:
    """Give ``node`` the source line and module stack of ``like``."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "original_aten"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _same_default(default: Any, given: Any) -> bool:
    if isinstance(given, torch.dtype):
        # Schemas keep ScalarType defaults as the C++ enum's number.
        return isinstance(default, int) and _SCALAR_TYPES.get(default) is given
    return type(default) is type(given) and bool(default == given)


# c10::ScalarType numbers of the dtypes that appear as schema defaults.
_SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def _nodes_in(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tree, lambda n: found.append(n))
    return found


def _run_fake(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = torch._guards.detect_fake_mode((args, kwargs))
    if mode is None:
        return node.target(*args, **kwargs)
    # As dynamo works out shapes: implementations in Python that keep sizes symbolic come before a device's own.
    with mode, enable_python_dispatcher(), torch.no_grad():
        return node.target(*args, **kwargs)
