"""The compile cases of every Triton kernel: one module per kernel, each with a list CASES. Free of torch and triton."""

from __future__ import annotations

import importlib
import pkgutil

from triton_cases.case import Case


def all_cases() -> list[Case]:
    """Return the cases of every module in this package, in the order of the modules' names.

    Raises ValueError when two cases share a name: goldens and allow-lists are kept under it.
    """
    cases: list[Case] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if module != "case":
            cases += importlib.import_module(f"{__name__}.{module}").CASES
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two compile cases share a name: {', '.join(twice)}; a name must be unique over all kernels")
    return cases
