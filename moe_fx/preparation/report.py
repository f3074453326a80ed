"""What ``prepare`` found and did, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREPARED, NEEDS_NOTHING, LEFT = "prepared", "needs nothing", "left as it was"


@dataclass(frozen=True)
class BlockReport:
    """One MoE block.

    Attributes:
        module: dotted path in the model.
        kind: class name.
        status: ``prepared``, ``needs nothing`` or ``left as it was``.
        reason: why it needs nothing, or the first predicate that failed.
        form: how its expert weights were kept: ``module list`` or ``stacked parameters``.
        n_experts, top_k: E and k.
        act: activation of the experts.
        router: attributes of ``moe_fx.route`` as read of the block; empty, with ``router_reason``, where the router
            stays as the model wrote it.
        experts: attributes of ``moe_fx.experts`` that differ from its defaults.
        bytes_stacked: size of the stacked weights that were made.
        experts_checked: how many experts the verification ran.
        error: largest relative L2 error of the prepared path against the block in the verification; of packed experts,
            against the unquantised ones on random inputs.
        packed_as: the format that its experts were packed in (``int8``, ``int4 g128``), if they were.
        activations: ``exact`` or ``int8``, with packed experts.
        bytes_experts, bytes_packed: size of its experts before, and packed.
    """

    module: str
    kind: str
    status: str
    reason: str = ""
    form: str = ""
    n_experts: int = 0
    top_k: int = 0
    act: str = ""
    router: Mapping[str, Any] = field(default_factory=dict)
    router_reason: str = ""
    experts: Mapping[str, Any] = field(default_factory=dict)
    bytes_stacked: int = 0
    experts_checked: int = 0
    error: float = 0.0
    packed_as: str = ""
    activations: str = ""
    bytes_experts: int = 0
    bytes_packed: int = 0

    def headline(self) -> str:
        """One line: what it is and how it ended."""
        name = f"{self.module or '(the model)'} ({self.kind})"
        if self.status != PREPARED:
            return f"{name}: {self.status}: {self.reason}"
        if self.packed_as:
            return f"{name}: E={self.n_experts} {self.act}, {self.packing()}"
        router = ", ".join(f"{key}={_plain(given)}" for key, given in self.router.items()) or "plain"
        if self.router_reason:
            router = f"kept as written ({self.router_reason})"
        return (
            f"{name}: E={self.n_experts} k={self.top_k} {self.act}, {self.form}, {_mib(self.bytes_stacked)} stacked,"
            f" error {self.error:.1e} on {self.experts_checked} experts; router: {router}"
        )

    def note(self) -> str:
        """What a table says of it beside the numbers."""
        if self.status != PREPARED:
            return self.reason
        if self.packed_as:
            return self.packing()
        return f"router kept as written: {self.router_reason}" if self.router_reason else ""

    def packing(self) -> str:
        """What packing its experts came to, in words."""
        sizes = f"{_mib(self.bytes_experts)} to {_mib(self.bytes_packed)}"
        measured = (
            f", relative error {self.error:.1e} on {self.experts_checked} experts" if self.experts_checked else ""
        )
        return f"{self.packed_as}, {self.activations} activations, {sizes}{measured}"


@dataclass(frozen=True)
class PrepareReport:
    """What became of every MoE block of a model.

    Attributes:
        blocks: in the order of ``model.named_modules()``.
        bytes_before, bytes_after: size of all distinct storages that the model held before and after.
        bytes_peak: the largest it was in between (stacking or packing one block needs room for that block's experts).
    """

    blocks: tuple[BlockReport, ...]
    bytes_before: int
    bytes_after: int
    bytes_peak: int

    @property
    def prepared(self) -> tuple[BlockReport, ...]:
        """Blocks that ``torch.compile(model, backend="moe_ascend")`` now captures, or that run packed experts."""
        return tuple(b for b in self.blocks if b.status == PREPARED)

    @property
    def needs_nothing(self) -> tuple[BlockReport, ...]:
        """Blocks that are captured as they are."""
        return tuple(b for b in self.blocks if b.status == NEEDS_NOTHING)

    @property
    def left(self) -> tuple[BlockReport, ...]:
        """Blocks that were not recognised or did not verify, with the reason."""
        return tuple(b for b in self.blocks if b.status == LEFT)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dictionaries."""
        plain = dataclasses.asdict(self)
        for block in plain["blocks"]:
            for attributes in (block["router"], block["experts"]):
                attributes.update({key: _plain(given) for key, given in attributes.items()})
        plain["blocks"] = list(plain["blocks"])
        return plain

    def _summary(self) -> str:
        counts = f"{len(self.prepared)} prepared, {len(self.needs_nothing)} need nothing, {len(self.left)} left"
        memory = f"{_mib(self.bytes_before)} before, {_mib(self.bytes_after)} after, {_mib(self.bytes_peak)} at most"
        return f"MoE blocks: {counts}; memory: {memory}"

    def __str__(self) -> str:
        if not self.blocks:
            return "MoE blocks: none found"
        return "\n".join([self._summary(), *(f"  {block.headline()}" for block in self.blocks)])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self._summary() if self.blocks else "MoE blocks: none found", title_justify="left")
        for column in ("block", "class", "status", "E", "k", "act", "stacked", "note"):
            table.add_column(column, overflow="fold")
        for b in self.blocks:
            done = b.status == PREPARED
            cells = (str(b.n_experts), str(b.top_k or ""), b.act, _mib(b.bytes_stacked)) if done else ("", "", "", "")
            style = {PREPARED: "green", LEFT: "yellow"}.get(b.status, "")
            table.add_row(b.module, b.kind, f"[{style}]{b.status}[/]" if style else b.status, *cells, b.note())
        return table


def _plain(given: Any) -> Any:
    return given if isinstance(given, (bool, int, float, str)) else str(given).removeprefix("torch.")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
