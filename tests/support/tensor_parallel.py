"""Models sharded over two ranks, in one process without a second rank, or in two that talk over gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RANKS = 2


@contextlib.contextmanager
def rank_zero() -> Iterator[DeviceMesh]:
    """The mesh of two ranks as rank 0 sees it; collectives compile as anywhere and do nothing when they run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def on_two_ranks(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work(mesh, *args)`` returns in each of two processes that talk over gloo."""
    mp.spawn(_rank, args=(work, str(folder), args), nprocs=RANKS)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(RANKS)]


def _rank(rank: int, work: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        torch.save(work(mesh, *args), Path(folder) / f"result{rank}.pt")
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a transformers model in place by its own plan, as ``from_pretrained(..., tp_plan="auto")`` does."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    rules = {f"model.{name}": style for name, style in model.config.base_model_tp_plan.items()}
    plan = {}
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        generic = replace_layer_number_by_wildcard(name)
        # A rule names a parameter itself, or a linear layer whose parameters it holds for.
        layer = generic.removesuffix(".weight").removesuffix(".bias")
        style = rules.get(generic, rules.get(layer))
        if style is not None:
            plan[name] = style
    return apply_tensor_parallelism(model, mesh, plan)
