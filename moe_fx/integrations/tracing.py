"""Asking, from inside model code, whether dynamo is tracing it for this backend."""

from __future__ import annotations

from typing import Any

import torch


@torch.compiler.assume_constant_result
def tracing_for_moe_ascend() -> bool:
    """True while dynamo traces for ``moe_ascend``; False in eager code and while it traces for any other backend.

    Dynamo calls this while tracing and takes the answer as a constant; compiled code is kept per backend, so the
    constant never reaches another one.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # No translator is active on this thread.
        return False
    return translator is not None and _is_ours(translator.output.compiler_fn)


def _is_ours(compiler_fn: Any) -> bool:
    """Unwrap what ``torch.compile`` puts around a backend, down to the function itself."""
    for _ in range(8):
        if getattr(compiler_fn, "__module__", "") == "moe_fx.backend":
            return True
        inner = [
            getattr(compiler_fn, name, None)
            for name in ("compiler_fn", "_torchdynamo_orig_backend", "_compiler_fn", "__wrapped__", "func")
        ]
        compiler_fn = next((f for f in inner if f is not None), None)
        if compiler_fn is None:
            return False
    return False
