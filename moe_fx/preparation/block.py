"""One block from first execution to installation: trace, recognise, stack, verify, install."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.passes.core import Miss, require
from moe_fx.preparation.install import ATTRIBUTE, Preparation, install
from moe_fx.preparation.program import Operands, PackedOperand, Program, experts_attributes, write_program
from moe_fx.preparation.recognise import ExpertForm, Roles, read_router, read_trace
from moe_fx.preparation.report import PREPARED, BlockReport
from moe_fx.preparation.trace import Trace, record
from moe_fx.preparation.verify import compare, tolerance_of
from moe_fx.preparation.weights import ExpertStore

# Leading sizes of the inputs that a block is executed on, per rank: primes, so that no product has two readings.
_TRACED = {3: ((2, 7), (3, 5), (5, 11)), 2: ((13,), (17,), (29,))}


class Unfit(Exception):
    """The module cannot be executed on hidden states alone."""


class NeedsNothing(Exception):
    """Dynamo captures the module as it is."""


@dataclass(frozen=True)
class _Reading:
    """What was read of executions on inputs of one rank."""

    traces: list[Trace]
    roles: list[Roles]
    program: Program


@dataclass
class ReadBlock:
    """A block whose computation was read and verified.

    Attributes:
        report: what is to be said of it once its preparation is installed.
        form: its experts.
        attributes: of ``moe_fx.experts`` that differ from its defaults.
        preparation: the stacked weights and traceable functions, until they are installed or given up.
        dtype: of its weights.
    """

    block: nn.Module
    report: BlockReport
    form: ExpertForm
    attributes: Mapping[str, Any]
    preparation: Preparation | None
    dtype: torch.dtype
    _readings: dict[int, _Reading]

    def packed_programs(self, operand: PackedOperand) -> dict[int, Program]:
        """The block's function by rank of the input, its experts running on packed weights."""
        name = type(self.block).__name__
        return {
            rank: write_program(reading.traces, reading.roles, self.form, operand, name)
            for rank, reading in self._readings.items()
        }

    def release(self) -> None:
        """Drop what the executions left behind: values, and views of the weights."""
        for reading in self._readings.values():
            for trace in reading.traces:
                trace.release()


def prepare_block(path: str, block: nn.Module, store_path: str) -> BlockReport:
    """Prepare one block; see :func:`read_block` for the arguments and what is raised."""
    read = read_block(path, block, store_path)
    read.release()
    assert read.preparation is not None
    install(block, read.preparation)
    return read.report


def read_block(path: str, block: nn.Module, store_path: str) -> ReadBlock:
    """Read one block and verify what was read; the block is not touched.

    Args:
        path: of the block in its model, for the report.
        block: the module whose forward maps hidden states to hidden states.
        store_path: of the module that holds the experts, relative to the block.

    Raises:
        Miss: the first predicate that failed.
        NeedsNothing: there is no loop over experts.
        Unfit: it takes more than hidden states; the module around it may be the block.
    """
    store = ExpertStore(block, store_path)
    _require_plain(block, store)
    readings: dict[int, _Reading] = {}
    form, failure = None, None
    for rank, traces in _executions(block, store):
        try:
            read = [read_trace(trace, store) for trace in traces]
            form = form or read[0][0]
            require(all(f == form for f, _ in read), "its experts compute something else for another number of tokens")
            roles = [r for _, r in read]
            program = write_program(traces, roles, form, Operands.of(form, ATTRIBUTE), type(block).__name__)
            readings[rank] = _Reading(traces, roles, program)
        except Miss as miss:
            failure = failure or miss
            if not store.modules and not any(trace.data_dependent for trace in traces):
                raise NeedsNothing("it has no loop over experts that depends on values") from miss
    if form is None or not readings:
        assert failure is not None
        raise failure
    programs = {rank: reading.program for rank, reading in readings.items()}
    preparation = Preparation(block, form, programs, lambda again: _renew(path, again, store_path))
    hit, error = _verify(block, store, form, preparation, readings)
    first = next(iter(readings.values())).roles[0]
    router, router_reason = read_router(first)
    attributes = experts_attributes(form, first)
    report = BlockReport(
        module=path,
        kind=type(block).__name__,
        status=PREPARED,
        form="stacked parameters" if form.gate.stacked else "module list",
        n_experts=store.n_experts,
        top_k=first.top_k,
        act=str(form.attributes["act"]),
        router=router,
        router_reason=router_reason,
        experts=attributes,
        bytes_stacked=preparation.nbytes,
        experts_checked=len(hit),
        error=error,
    )
    return ReadBlock(block, report, form, attributes, preparation, store.example.dtype, readings)


def _renew(path: str, block: nn.Module, store_path: str) -> str:
    """Prepare a block again whose weights moved; why that failed, or nothing."""
    try:
        prepare_block(path, block, store_path)
    except (Miss, NeedsNothing, Unfit) as failure:
        return str(failure)
    return ""


def _require_plain(block: nn.Module, store: ExpertStore) -> None:
    """What can be told without executing the block."""
    tensors = [*block.parameters(), *block.buffers()]
    on_meta = any(t.device.type == "meta" for t in tensors)
    require(not on_meta, "its weights are on the meta device; load them before moe_fx.prepare")
    for name, module in block.named_modules():
        # The block's own hooks run around the prepared forward, too.
        hooked = name and (module._forward_hooks or module._forward_pre_hooks)
        require(not hooked, f"{name} has forward hooks, which a fused block would not call")
        where = f"{name}'s" if name else "its"
        require("forward" not in vars(module), f"{where} forward was replaced on the instance (by offloading, say)")
    store.require_alike()


def _executions(block: nn.Module, store: ExpertStore) -> Iterator[tuple[int, list[Trace]]]:
    """``(rank, traces)`` for every rank of input that the block takes."""
    failure: Exception | None = None
    missed: Miss | None = None
    found = False
    for rank, sizes in _TRACED.items():
        for hidden in store.hidden_sizes():
            try:
                traces = [record(block, _random(store, (*leading, hidden))) for leading in sizes]
            except Miss as miss:
                missed = missed or miss
                continue
            except Exception as error:
                failure = failure or error
                continue
            found = True
            yield rank, traces
            break
    if found:
        return
    if missed is not None:
        raise missed
    cause = (str(failure).strip().splitlines() or [""])[0]
    raise Unfit(f"it cannot be executed on hidden states alone ({type(failure).__name__}: {cause})")


def _random(store: ExpertStore, size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(store.example.device, store.example.dtype)


def _verify(
    block: nn.Module, store: ExpertStore, form: ExpertForm, preparation: Preparation, readings: dict[int, _Reading]
) -> tuple[frozenset[int], float]:
    """Compare values; ``(experts that ran, largest relative L2 error)``."""
    tolerance_of(store.example.dtype)
    hit: frozenset[int] = frozenset()
    error = 0.0
    setattr(block, ATTRIBUTE, preparation)
    try:
        with torch.inference_mode():
            for rank, reading in readings.items():
                for roles in reading.roles:
                    error = max(error, _verify_experts(block, form, roles, preparation))
                    hit |= roles.experts_hit
                hidden = reading.traces[0].input.meta["val"].shape[-1]
                for seed, n_tokens in enumerate((1, 3, _enough_tokens(store, reading.roles[0].top_k))):
                    leading = (1, n_tokens) if rank == 3 else (n_tokens,)
                    x = _random(store, (*leading, hidden), seed + 1)
                    got = reading.program.run(block, x.clone())
                    error = max(error, compare(got, block.forward(x), f"on {n_tokens} tokens it does not verify"))
    finally:
        delattr(block, ATTRIBUTE)
    return hit, error


def _verify_experts(block: nn.Module, form: ExpertForm, roles: Roles, preparation: Preparation) -> float:
    """The experts alone, where no shared expert hides their error."""
    operands = Operands.of(form, ATTRIBUTE)
    names = (operands.w13, operands.w2, operands.b13, operands.b2, operands.w3, operands.b3)
    weights = [None if name is None else _attribute(block, name) for name in names]
    x, routing, ids, wanted = (n.meta["val"] for n in (roles.x, roles.weights, roles.ids, roles.result))
    routed = (
        CANONICAL_OPS["experts"]
        .reference(
            x.reshape(-1, x.shape[-1]),
            routing.reshape(-1, roles.top_k),
            ids.reshape(-1, roles.top_k),
            *weights,
            **experts_attributes(form, roles),
        )
        .reshape(wanted.shape)
    )
    got = routed if roles.base is None else roles.base.meta["val"] + routed
    return compare(got, wanted, "its experts do not verify")


def _attribute(block: nn.Module, path: str) -> torch.Tensor:
    found = block
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _enough_tokens(store: ExpertStore, top_k: int) -> int:
    """So many that random routing hits most experts."""
    return max(32, min(4 * store.n_experts // top_k, 512))
