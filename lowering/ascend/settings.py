"""What a user can choose about the Ascend target; the options ``ascend_*`` say what each means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Chosen(Protocol):
    """The part of the backend's options that this target reads."""

    @property
    def ascend_combine(self) -> str: ...
    @property
    def ascend_weights(self) -> str: ...
    @property
    def ascend_nz(self) -> bool: ...


@dataclass(frozen=True)
class Settings:
    """Choices for one graph.

    Attributes:
        combine: operator that weighs and sums the experts' rows: ``finalize_routing`` or ``token_unpermute``.
        prepare: bring weights into the grouped matmul's layout once; otherwise the graph transposes views of them.
        nz: also cast prepared weights to the fractal format NZ.
    """

    combine: str = "finalize_routing"
    prepare: bool = True
    nz: bool = False

    @classmethod
    def of(cls, options: Chosen) -> Settings:
        """The settings that options ask for."""
        return cls(options.ascend_combine, options.ascend_weights == "prepared", options.ascend_nz)
