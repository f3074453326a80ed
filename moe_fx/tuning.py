"""``moe-fx tune``: launch parameters measured on the GPU at hand, kept where launchers look them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_fx.errors import MissingToolchainError, OptionError

__all__ = ["tune"]


def tune(
    shape: Sequence[int],
    group: int,
    formats: Sequence[str],
    tokens: Sequence[int] | None,
    output: Path | None,
    progress: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Measure on the current CUDA device, and extend ``output`` (default: the user's file for this GPU's family).

    Args:
        shape: H, I, E and k of the layer.
        group: inputs a scale of int4 weights.
        formats: ``bf16``, ``int4``.
        tokens: token counts; None is one to 1,024 in steps.
        progress: told of every count that is done; the file is written then.

    Returns:
        The file, and all that it holds now.

    Raises:
        MissingToolchainError: there is no CUDA device, or no Triton.
        OptionError: the file is there and holds something else, or the sizes do not fit int4 groups.
    """
    from moe_fx.lowering.cuda import configs, device

    if unavailable := device.unavailable(torch.device("cuda")):
        raise MissingToolchainError(f"moe-fx tune measures on a CUDA device: {unavailable}")
    try:
        from moe_fx.lowering.cuda import tune as search
    except ImportError as error:
        raise MissingToolchainError(f"moe-fx tune runs Triton kernels ({error}); pip install triton") from error
    hidden, inter, n_experts, top_k = shape
    sizes = search.Shape(hidden, inter, n_experts, top_k, group)
    if "int4" in formats and (hidden % group or inter % group or group % 32):
        raise OptionError(f"int4 groups of {group} inputs must be multiples of 32 that divide H={hidden} and I={inter}")
    path = output or configs.user_file(device.family(torch.device("cuda")))
    table = configs.read(path) if path.exists() else {}

    def save() -> None:
        configs.write(path, torch.cuda.get_device_name(), table)

    search.tune(sizes, formats, tokens or search.TOKENS, table, progress, save)
    return path, table
