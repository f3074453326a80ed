"""What besides the graph and the options decides a result: versions, hardware, ranks, torch's modes, decompositions.

Each function returns plain data, fit for JSON, that is equal in another process of the same surroundings.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import operator
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moe_fx import __version__
from moe_fx.cache.values import code

__all__ = ["decompositions", "hardware", "modes", "variables", "versions", "world"]

_DISTRIBUTIONS = ("torch-npu", "triton", "triton-ascend")


def versions(target: str) -> dict[str, str | None]:
    """Releases of everything that takes part, CANN's for the Ascend target."""
    found: dict[str, str | None] = {name: _release(name) for name in _DISTRIBUTIONS}
    found |= {
        "moe-fx": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if target == "ascend":
        found["cann"] = _ask_torch_npu("utils.get_cann_version")
    return found


def hardware(target: str, device_types: Sequence[str]) -> dict[str, Any]:
    """The processor as kernels see it, the GPUs' or NPUs' models, and the machine's architecture."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": sys.platform, "devices": list(device_types)}
    if target == "cpu" or "cpu" in device_types:
        found["cpu"] = torch.backends.cpu.get_cpu_capability()
        found["threads"] = torch.get_num_threads()
        found["engine"] = _engine()
    if "cuda" in device_types:
        found["cuda"] = _gpus()
    if "npu" in device_types:
        found["npu"] = _ask_torch_npu("get_device_name")
    return found


def world() -> list[Any]:
    """The layout of ranks that the process is part of: its backend, size and own rank."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    return [torch.distributed.get_backend(), torch.distributed.get_world_size(), torch.distributed.get_rank()]


def modes() -> dict[str, Any]:
    """Settings of torch under which the same graph is traced to another result."""
    kinds = [kind for kind in torch._C._autocast_supported_devices() if torch.is_autocast_enabled(kind)]
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": {kind: str(torch.get_autocast_dtype(kind)) for kind in kinds},
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "functorch": _functorch_config(),
    }


def variables(known: Sequence[str]) -> dict[str, str]:
    """Environment variables that steer kernels: ``MOE_FX_*`` but those in ``known``, and Triton's interpreter."""
    names = [name for name in os.environ if name.startswith("MOE_FX_") and name not in known]
    return {name: os.environ[name] for name in sorted([*names, *({"TRITON_INTERPRET"} & set(os.environ))])}


def decompositions(table: Mapping[Any, Callable[..., Any]]) -> str:
    """A digest of a decomposition table: which ops it takes apart, and by what code.

    Raises:
        Uncacheable: a function that is not torch's is not certain to be told apart from its changes.
    """
    lines = [json.dumps([str(op), code(function, f"the decomposition of {op}")]) for op, function in table.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _release(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_torch_npu(function: str) -> str:
    """What a function of ``torch_npu.npu`` says; the Ascend target has imported it by now."""
    torch_npu = sys.modules.get("torch_npu")
    return "" if torch_npu is None else str(operator.attrgetter(function)(torch_npu.npu)())


def _gpus() -> list[list[Any]]:
    """Model, capability and size of every GPU."""
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [[d.name, d.major, d.minor, d.multi_processor_count, d.total_memory] for d in devices]


def _engine() -> dict[str, Any] | None:
    """The CPU engine's choice of kernels and memory nodes, which the lowering goes by."""
    try:
        from moe_fx._C import engine_info

        info = engine_info()
    except (ImportError, ValueError):
        return None
    return {"isa": info["isa"], "nodes": [len(node) for node in info["nodes"]], "own_threads": info["own_threads"]}


def _functorch_config() -> str:
    """The export's own settings that have plain values, as text."""
    settings = torch._functorch.config.save_config_portable()
    return repr(sorted((k, v) for k, v in settings.items() if v is None or isinstance(v, (bool, int, float, str))))
