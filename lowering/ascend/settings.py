"""What a user can choose about the Ascend target; the options ``ascend_*`` say what each means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Chosen(Protocol):
    """The part of the backend's options that this target reads."""

    @property
    def ascend_combine(self) -> str: ...
    @property
    def ascend_weights(self) -> str: ...
    @property
    def ascend_nz(self) -> bool: ...
    @property
    def ascend_prefetch(self) -> bool: ...
    @property
    def ascend_prefetch_mib(self) -> int: ...
    @property
    def ascend_shared_stream(self) -> bool: ...
    @property
    def downstream_options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Settings:
    """Choices for one graph.

    Attributes:
        combine: operator that weighs and sums the experts' rows: ``finalize_routing`` or ``token_unpermute``.
        combine_in_product: where ``npu_grouped_matmul_finalize_routing`` applies, it does both instead.
        prepare: bring weights into the grouped matmul's layout once; otherwise the graph transposes views of them.
        nz: also cast prepared weights to the fractal format NZ.
        prefetch_mib: how much of a layer's expert weights to prefetch; 0 for none.
        shared_stream: compute shared experts on a second stream.
        ge: the graph is converted to GE, where torchair finishes it; otherwise it captures single operators.
    """

    combine: str = "finalize_routing"
    combine_in_product: bool = False
    prepare: bool = True
    nz: bool = False
    prefetch_mib: int = 0
    shared_stream: bool = False
    ge: bool = True

    @classmethod
    def of(cls, options: Chosen, mode: str | None = None) -> Settings:
        """The settings that options and ``torch.compile``'s mode ask for."""
        ge = (mode or options.downstream_options.get("mode", "ge")) == "ge"
        in_product = options.ascend_combine == "grouped_matmul_finalize_routing"
        return cls(
            combine="finalize_routing" if in_product else options.ascend_combine,
            combine_in_product=in_product,
            prepare=options.ascend_weights == "prepared",
            nz=options.ascend_nz,
            prefetch_mib=options.ascend_prefetch_mib if options.ascend_prefetch else 0,
            shared_stream=options.ascend_shared_stream,
            ge=ge,
        )
