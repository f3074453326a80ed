"""The backend's options: one validated dataclass, from ``torch.compile(options=...)`` and ``MOE_FX_*`` variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fx.errors import OptionError

if TYPE_CHECKING:
    from moe_fx.passes.core import Pass
    from moe_fx.pipeline import GraphReport

TARGETS = ("auto", "cpu", "cuda", "ascend")
DOWNSTREAMS = ("auto", "inductor", "torchair", "eager", "aot_eager")
LEVELS = ("bitwise", "tolerance")
ASCEND_COMBINES = ("finalize_routing", "token_unpermute", "grouped_matmul_finalize_routing")
ASCEND_WEIGHTS = ("prepared", "as_is")
ENV_PREFIX = "MOE_FX_"


def _option(default: Any, doc: str, *, choices: Sequence[str] = (), env: bool = True, factory: bool = False) -> Any:
    metadata = {"doc": doc, "choices": tuple(choices), "env": env}
    if factory:
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Everything a user can set; ``moe-fx options`` prints this table.

    Precedence: ``torch.compile(..., options={...})``, then ``MOE_FX_<NAME>`` environment variables, then defaults.
    """

    target: str = _option(
        "auto", "Whose kernels the fused ops use; auto takes the device of the graph's inputs.", choices=TARGETS
    )
    downstream: str = _option(
        "auto", "Who compiles the rest of the graph; auto is torchair on Ascend, else Inductor.", choices=DOWNSTREAMS
    )
    passes: Mapping[str, bool] = _option(
        dict,
        "Switch passes by name: {'swiglu': False}; in the environment 'swiglu=off,router=on' or '-swiglu'.",
        factory=True,
    )
    level: str = _option(
        "tolerance",
        "bitwise admits only rewrites whose reference equals the original bit for bit; tolerance admits all.",
        choices=LEVELS,
    )
    strict: bool = _option(False, "Raise on a capture failure or a missed site instead of running it unfused.")
    dump_dir: str | None = _option(None, "Directory for readable graphs before and after each pass, with diffs.")
    check: bool = _option(
        False, "Run fused and unfused on your own inputs, compare op by op, and dump the first failing case."
    )
    check_dir: str = _option("moe_fx_check", "Where check dumps a failing case as a re-runnable file.")
    extra_passes: tuple[Pass, ...] = _option((), "Your own passes, run after the match passes.", env=False)
    report: Callable[[GraphReport], None] | None = _option(
        None, "Called with the report of every compiled graph.", env=False
    )
    downstream_options: Mapping[str, Any] = _option(
        dict,
        "Passed on to the downstream compiler: Inductor config patches, or torchair's mode, gears and CompilerConfig.",
        env=False,
        factory=True,
    )
    ascend_combine: str = _option(
        "finalize_routing",
        "On Ascend, who weighs and sums the experts' rows: npu_moe_finalize_routing, npu_moe_token_unpermute, or for "
        "int8 experts of a fixed number of tokens the second product itself, npu_grouped_matmul_finalize_routing.",
        choices=ASCEND_COMBINES,
    )
    ascend_weights: str = _option(
        "prepared",
        "Expert weights on Ascend, unquantised ones: a copy in the operators' layout, or as_is, transposed per call.",
        choices=ASCEND_WEIGHTS,
    )
    ascend_nz: bool = _option(False, "Cast prepared expert weights (not int4) to the fractal format NZ on Ascend.")
    ascend_prefetch: bool = _option(
        False, "Read expert weights into the L2 cache while attention and routing run, on Ascend."
    )
    ascend_prefetch_mib: int = _option(32, "How many MiB of each layer's expert weights ascend_prefetch reads.")
    ascend_shared_stream: bool = _option(
        False, "Compute shared experts on a stream of their own beside the routed ones, on Ascend."
    )
    cache: bool = _option(True, "Keep lowered graphs on disk, so that the next process need not match them again.")
    cache_dir: str | None = _option(None, "Where they are kept; by default moe_fx in the user's cache directory.")
    cache_max_mib: int = _option(
        1024, "Size in MiB that they are kept under: beyond it, the least recently used are dropped."
    )

    @classmethod
    def from_user(cls, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Options:
        """Merge the user's options with the environment and validate them.

        Raises:
            OptionError: an unknown name, or a value of the wrong kind; the message lists what is valid.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            raw = environ.get(ENV_PREFIX + f.name.upper()) if f.metadata["env"] else None
            if raw is not None:
                values[f.name] = _validate(f, _parse(f, raw), ENV_PREFIX + f.name.upper())
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in (given or {}).items():
            if name not in known:
                raise OptionError(
                    f"unknown option {name!r} for backend='moe_ascend'; valid options: {', '.join(known)}"
                )
            values[name] = _validate(known[name], value, f"option {name!r}")
        return cls(**values)


def table() -> list[dict[str, str]]:
    """The options for documentation and ``moe-fx options``: name, type, default, values, environment variable, doc."""
    rows = []
    for f in dataclasses.fields(Options):
        default = f.default_factory() if callable(f.default_factory) else f.default
        rows.append(
            {
                "name": f.name,
                "type": str(f.type),
                "default": repr(default),
                "choices": ", ".join(f.metadata["choices"]),
                "environment": ENV_PREFIX + f.name.upper() if f.metadata["env"] else "",
                "summary": f.metadata["doc"],
            }
        )
    return rows


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _parse(f: dataclasses.Field[Any], raw: str) -> Any:
    """An environment string as the field's kind of value; what does not parse is left for ``_validate`` to refuse."""
    if f.name == "passes":
        return _parse_switches(raw)
    if isinstance(f.default, bool):
        lowered = raw.strip().lower()
        return True if lowered in _TRUE else False if lowered in _FALSE else raw
    if isinstance(f.default, int):
        return int(raw) if raw.strip().isdecimal() else raw
    return raw


def _parse_switches(raw: str) -> dict[str, Any]:
    switches: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in raw.split(","))):
        name, has_value, text = item.partition("=")
        if not has_value:
            switches[name.lstrip("+-")] = not name.startswith("-")
        else:
            lowered = text.strip().lower()
            switches[name.strip()] = True if lowered in _TRUE else False if lowered in _FALSE else text
    return switches


def _validate(f: dataclasses.Field[Any], value: Any, where: str) -> Any:
    choices = f.metadata["choices"]
    if choices:
        if value not in choices:
            raise OptionError(f"{where} is {value!r}; valid values: {', '.join(choices)}")
        return value
    return _VALIDATORS[f.name](value, where)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{where} is {value!r}; give True or False (1/0, on/off in the environment)")
    return value


def _size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{where} is {value!r}; give a whole number of MiB above zero")
    return value


def _path(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, Path)) or not str(value):
        raise OptionError(f"{where} is {value!r}; give a directory path")
    return str(value)


def _switches(value: Any, where: str) -> dict[str, bool]:
    from moe_fx.passes import PIPELINE

    if isinstance(value, str):
        value = _parse_switches(value)
    if not isinstance(value, Mapping):
        raise OptionError(f"{where} is {value!r}; give a mapping from pass name to True or False")
    names = [p.name for p in PIPELINE]
    for name, on in value.items():
        if name not in names:
            raise OptionError(f"{where} names an unknown pass {name!r}; valid passes: {', '.join(names)}")
        if not isinstance(on, bool):
            raise OptionError(f"{where} sets pass {name!r} to {on!r}; give True or False")
    return dict(value)


def _passes(value: Any, where: str) -> tuple[Any, ...]:
    from moe_fx.passes import PIPELINE, Pass

    if isinstance(value, Pass):
        value = (value,)
    if not isinstance(value, Sequence):
        raise OptionError(f"{where} is {value!r}; give a list of moe_fx.Pass instances")
    taken = {p.name for p in PIPELINE}
    for item in value:
        if not isinstance(item, Pass):
            hint = "; instantiate the class" if isinstance(item, type) and issubclass(item, Pass) else ""
            raise OptionError(f"{where} holds {item!r}, which is no moe_fx.Pass instance{hint}")
        if item.name in taken:
            raise OptionError(f"{where} holds a pass named {item.name!r}, a name that is taken; give it its own")
        taken.add(item.name)
    return tuple(value)


def _callable(value: Any, where: str) -> Any:
    if value is not None and not callable(value):
        raise OptionError(f"{where} is {value!r}; give a function of one GraphReport")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{where} is {value!r}; give a mapping of the downstream compiler's options")
    return dict(value)


_VALIDATORS: dict[str, Callable[[Any, str], Any]] = {
    "passes": _switches,
    "strict": _boolean,
    "dump_dir": _path,
    "check": _boolean,
    "check_dir": _path,
    "extra_passes": _passes,
    "report": _callable,
    "downstream_options": _mapping,
    "ascend_nz": _boolean,
    "ascend_prefetch": _boolean,
    "ascend_prefetch_mib": _size,
    "ascend_shared_stream": _boolean,
    "cache": _boolean,
    "cache_dir": _path,
    "cache_max_mib": _size,
}
