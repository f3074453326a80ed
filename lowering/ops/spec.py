"""What a canonical op is: schema, reference, fake kernel, tolerance and input generator, registered with PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "moe_fx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Tolerance:
    """Bounds on a lowered op against its reference: ``atol + rtol * |ref|`` per element, relative L2 of the whole."""

    atol: float
    rtol: float
    rel_l2: float


@dataclass(frozen=True)
class Sample:
    """One set of arguments for an op, named for test ids and benchmark rows."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


# A generator of samples for a dtype: tests and benchmarks draw fresh values from the given generator.
SampleGenerator = Callable[[torch.dtype, torch.Generator], Iterator[Sample]]


@dataclass(frozen=True)
class CanonicalOp:
    """A canonical op and all that tests, lowerings and benchmarks need to know of it.

    Attributes:
        name: name under ``torch.ops.moe_fx``.
        schema: arguments and returns in PyTorch's schema language, without the name.
        reference: plain PyTorch implementation; it defines the op's meaning.
        tolerance: per dtype, how far a lowered kernel may be from the reference.
        samples: generator of inputs.
        fake: shape and dtype inference for ops that Inductor must not look into. ``None`` makes the op a composite:
            its reference is traced wherever no target takes the op, so that Inductor fuses it like hand-written code,
            and shape inference runs the reference itself.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    tolerance: Mapping[torch.dtype, Tolerance]
    samples: SampleGenerator
    fake: Callable[..., Any] | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered ``torch.ops.moe_fx.<name>.default``."""
        return getattr(torch.ops.moe_fx, self.name).default

    @property
    def doc(self) -> str:
        """The reference's docstring: shapes, dtypes and sources."""
        return inspect.getdoc(self.reference) or ""

    def register(self) -> CanonicalOp:
        """Define the op in PyTorch's dispatcher and return ``self``."""
        _LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        if self.fake is None:
            _LIBRARY.impl(self.name, self.reference, "CompositeImplicitAutograd")
        else:
            _LIBRARY.impl(self.name, self.reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=_LIBRARY)
        return self


def uniform_tolerance(fp32: Tolerance, half: Tolerance, bf16: Tolerance) -> dict[torch.dtype, Tolerance]:
    """Tolerances for the three dtypes that models run in."""
    return {torch.float32: fp32, torch.float16: half, torch.bfloat16: bf16}
