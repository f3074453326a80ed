"""Launch parameters measured per GPU family: files of ``moe-fx tune``, looked up by kernel, variant and token count.

A file is JSON, one for each family (``sm_90.json``)::

    {"gpu": "NVIDIA H200", "kernels": {"experts_pairs": {"bf16": {"1": {"BLOCK_N": 16, "num_warps": 4}}}}}

The variant is the launcher's word for what else the choice depends on, such as the weights' format; the innermost keys
are token counts. Entries are taken, first found first, from the file that ``MOE_FX_TUNED`` names, from the user's
configuration directory, and from the package. Where none has one, launchers use defaults of their own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
import torch

from moe_fx.errors import MoeFxWarning, OptionError
from moe_fx.lowering.cuda import device

ENVIRONMENT = "MOE_FX_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
# An entry measured at so many times fewer or more tokens says nothing about a call.
BEYOND = 4.0

Parameters = dict[str, int]
# Kernel -> variant -> token count -> parameters.
Table = dict[str, dict[str, dict[int, Parameters]]]
# Kernel -> the variant that was looked up, and what was found.
Record = dict[str, tuple[str, Parameters]]


def lookup(kernel: str, variant: str, tokens: int, defaults: Mapping[str, int], on: torch.device) -> Parameters:
    """The launch parameters of a call: ``defaults``, with those replaced that were measured for its like.

    Args:
        kernel, variant: as the launcher names them.
        tokens: the call's token count; the entry nearest to it in ratio serves.
        defaults: every parameter that the kernel has.
        on: the tensors' device.

    A file that holds no such parameters is left out, and so is an entry for another version of the kernel, each with a
    warning: the call needs neither.
    """
    if kernel in (forced_ones := _FORCED.get()):
        found = {**defaults, **forced_ones[kernel]}
    else:
        found = dict(_choose(kernel, variant, max(tokens, 1), tuple(defaults.items()), device.family(on)))
    for record in _RECORDS.get():
        record[kernel] = (variant, found)
    return found


@contextlib.contextmanager
def forced(parameters: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Within the block, kernels named here run with these parameters, whatever was measured: for tuner and tests."""
    token = _FORCED.set({**_FORCED.get(), **parameters})
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Within the block, look-ups leave the variant asked for and the parameters given, by kernel."""
    record: Record = {}
    token = _RECORDS.set((*_RECORDS.get(), record))
    try:
        yield record
    finally:
        _RECORDS.reset(token)


_RECORDS: ContextVar[tuple[Record, ...]] = ContextVar("recorded", default=())
_FORCED: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("forced", default=MappingProxyType({}))


@functools.lru_cache(maxsize=4096)
def _choose(
    kernel: str, variant: str, tokens: int, defaults: tuple[tuple[str, int], ...], family: str
) -> Mapping[str, int]:
    for source, table in _tables(family):
        entries = table.get(kernel, {}).get(variant, {})
        if not entries:
            continue
        nearest = min(entries, key=lambda measured: abs(math.log(measured / tokens)))
        if max(nearest / tokens, tokens / nearest) > BEYOND:
            continue
        unknown = entries[nearest].keys() - dict(defaults).keys()
        if unknown:
            _warn(
                f"{source}: {kernel}/{variant} sets {', '.join(sorted(unknown))}, which this version's kernel does not "
                "have; make the file anew with `moe-fx tune`"
            )
            continue
        return {**dict(defaults), **entries[nearest]}
    return dict(defaults)


@functools.cache
def _tables(family: str) -> list[tuple[Path, Table]]:
    tables = []
    for path in files(family):
        if path.exists():
            try:
                tables.append((path, read(path)))
            except OptionError as error:
                _warn(str(error))
    return tables


def _warn(message: str) -> None:
    warnings.warn(f"moe_ascend: {message}; default launch parameters serve instead", MoeFxWarning, stacklevel=2)


def files(family: str) -> list[Path]:
    """Where parameters of a family are looked for, in order."""
    given = os.environ.get(ENVIRONMENT)
    return [*([Path(given)] if given else []), user_file(family), SHIPPED / f"{family}.json"]


def user_file(family: str) -> Path:
    """The file that ``moe-fx tune`` writes for a family."""
    return Path(platformdirs.user_config_dir("moe-fx")) / "tuned" / f"{family}.json"


def read(path: Path) -> Table:
    """Read a file of measured parameters.

    Raises:
        OptionError: it is not one; the message says where it departs from the form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OptionError(f"{path} holds no tuned parameters ({error}); make it anew with `moe-fx tune`") from error
    try:
        return {
            kernel: {
                variant: {_positive(tokens): _parameters(entry) for tokens, entry in entries.items()}
                for variant, entries in variants.items()
            }
            for kernel, variants in content["kernels"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"{path} is not of the form kernel -> variant -> tokens -> parameters ({error!r}); "
            "make it anew with `moe-fx tune`"
        ) from error


def write(path: Path, gpu: str, table: Table) -> None:
    """Write a file that :func:`read` takes, replacing it as a whole, and forget what was read before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "kernels": table}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    written.replace(path)
    forget()


def forget() -> None:
    """Read the files again at the next look-up."""
    _tables.cache_clear()
    _choose.cache_clear()


def _positive(tokens: str) -> int:
    count = int(tokens)
    if count < 1:
        raise ValueError(f"a token count is {count}")
    return count


def _parameters(entry: Mapping[str, Any]) -> Parameters:
    for name, value in entry.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, not a whole number")
    return dict(entry)
