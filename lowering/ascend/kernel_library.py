"""The library of the project's own NPU kernels (``csrc/ascendc``): where it is, and how its operators are defined.

Schemas, fake kernels and what runs without the library are defined in Python, once; the library only adds kernels for
NPU devices. So a graph with these operators can be compiled, stored and run on machines without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_fx.ascend_library import VARIABLE, default_path, misfit, named_path
from moe_fx.errors import MissingToolchainError

NAMESPACE = "moe_fx_ascend"
_DEFINITIONS = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``moe_fx_ascend::<the function's name>``; the decorated function is what runs without the library.

    Args:
        schema: arguments and results, ``(Tensor x) -> Tensor``.
        fake: results for tensors without data.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _DEFINITIONS.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _DEFINITIONS.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_DEFINITIONS)
        return function

    return decorate


@functools.cache
def loaded() -> Path | None:
    """The library, loaded; None where there is none.

    Raises:
        MissingToolchainError: the variable names a file that is not there, the library cannot be loaded, or it was
            built from other sources than this moe-fx has.
    """
    named = named_path()
    library = named or default_path()
    if not library.is_file():
        if named is not None:
            raise MissingToolchainError(f"{VARIABLE} names {named}, which does not exist; unset it to run without")
        return None
    if reason := misfit(library):
        raise MissingToolchainError(f"the Ascend C kernel library {library} {reason}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise MissingToolchainError(
            f"the Ascend C kernel library {library} cannot be loaded ({error.__cause__ or error}); build it for this "
            f"CANN and torch_npu with `moe-fx build-ascend`, or remove it"
        ) from error
    return library
