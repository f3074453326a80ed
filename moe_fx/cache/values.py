"""Settings and Python functions as JSON data for keys: equal in another process, different for all that counts.

What is not certain to be told apart from its changes is refused (:class:`Uncacheable`), not guessed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch

from moe_fx.cache.errors import Uncacheable

__all__ = ["code", "held", "plain"]

_Function = types.FunctionType | types.BuiltinFunctionType | functools.partial | type


def plain(value: Any, where: str) -> Any:
    """A setting: plain values, and mappings and sequences of them.

    Args:
        where: its name, for the message of a refusal.

    Raises:
        Uncacheable: it is something else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(plain(item, where)) for item in value)
    if isinstance(value, (torch.dtype, torch.device, torch._ops.OpOverload)):
        return str(value)
    raise Uncacheable(f"{where} is a {type(value).__name__}, whose changes the key would not show")


def held(value: Any, where: str, around: tuple[Any, ...] = ()) -> Any:
    """What a function encloses or a class has: ``code`` of functions, ``plain`` of anything else; both raise."""
    return code(value, where, around) if isinstance(value, _Function) else plain(value, where)


def code(function: Any, where: str, around: tuple[Any, ...] = ()) -> Any:
    """A function: its bytecode, and what it holds besides: defaults, enclosed values, plain values of its module.

    Bytecode is what runs, whatever became of the source, and is the same for a release of Python, which is in the key.
    Functions and classes of torch, which is in the key too, are told by name. What a function calls is not looked into,
    unless it encloses it, as a decorator's wrapper does.

    Args:
        around: functions that enclose this one.

    Raises:
        Uncacheable: it encloses what is neither plain nor such a function, or is none.
    """
    if isinstance(function, functools.partial):
        return [code(function.func, where, around), plain(function.args, where), plain(function.keywords, where)]
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    if _is_torchs(function) or any(function is other for other in around):
        return name
    if not isinstance(function, types.FunctionType):
        raise Uncacheable(f"{where} is a {type(function).__name__}, whose changes the key would not show")
    try:
        variables = inspect.getclosurevars(function)
    except ValueError as error:
        raise Uncacheable(f"{where} is a function that encloses what is not there") from error
    enclosed = {
        variable: held(value, variable, (*around, function))
        for variable, value in variables.nonlocals.items()
        if variable != "__class__"
    }
    beside = {}
    for variable, value in variables.globals.items():
        with contextlib.suppress(Uncacheable):
            beside[variable] = plain(value, variable)
    defaults = plain([function.__defaults__, function.__kwdefaults__], where)
    return [name, _bytecode(function.__code__), defaults, enclosed, beside]


def _is_torchs(function: Any) -> bool:
    if isinstance(function, type):
        return function.__module__.split(".")[0] == "torch"
    if isinstance(function, types.BuiltinFunctionType):  # Those of torch's table of functions may have no module.
        module = function.__module__ or ("torch" if function.__self__ is None else "")
        return module.split(".")[0] == "torch"
    # A wrapper takes over the module of what it wraps, and has the globals of where it was written.
    modules = (getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__"))
    return all(str(module).split(".")[0] == "torch" for module in modules)


def _bytecode(compiled: types.CodeType) -> list[Any]:
    arguments = [compiled.co_argcount, compiled.co_posonlyargcount, compiled.co_kwonlyargcount, compiled.co_flags]
    names = [compiled.co_names, compiled.co_varnames, compiled.co_freevars, compiled.co_cellvars]
    handlers = getattr(compiled, "co_exceptiontable", b"")  # Python 3.10 has them in the code.
    constants = [_constant(value) for value in compiled.co_consts]
    return [compiled.co_code.hex(), handlers.hex(), arguments, names, constants]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _bytecode(value)
    if isinstance(value, (tuple, frozenset)):
        items = [_constant(item) for item in value]
        # The order of a set differs from process to process.
        return [type(value).__name__, sorted(map(repr, items)) if isinstance(value, frozenset) else items]
    return repr(value)
