"""Packing a model's experts: rounding its own weights to int8 or int4, block by block, each one measured.

Peak memory is the model and one block: a block's weights are released before the next block is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_fx.lowering.ops.activation import activate
from moe_fx.lowering.ops.experts import run_experts
from moe_fx.passes.core import Miss, require
from moe_fx.preparation.matrices import Matrices, projections
from moe_fx.preparation.memory import Ledger
from moe_fx.preparation.packable import Packable, attribute, find_packable, require_engine
from moe_fx.preparation.packed import packed_attributes
from moe_fx.preparation.report import LEFT, PREPARED, BlockReport, PrepareReport
from moe_fx.preparation.verify import tolerance_of

if TYPE_CHECKING:
    from moe_fx.lowering.cpu.packing import PackedSpec

# Relative L2 error of rounded experts against the model's own on random inputs: int8 comes to 0.01 to 0.03, int4 to 0.1
# to 0.21 (the most with group 128 and bell-shaped weights). Beyond these bounds something is wrong with the weights for
# that format.
BOUNDS = {"int8": 0.06, "int4": 0.3}
# So many experts of a block are measured, evenly spaced.
_MEASURED = 16

Pack = Callable[[Packable], "tuple[torch.Tensor, PackedSpec, Matrices, float]"]


def quantize_model(
    model: nn.Module, quantize: str, group_size: int, activations: str, zero_points: bool
) -> PrepareReport:
    """See ``moe_fx.prepare``; the arguments are valid."""
    require_engine()
    from moe_fx.lowering.cpu.packing import Packer

    def pack(block: Packable) -> tuple[torch.Tensor, PackedSpec, Matrices, float]:
        where = next(iter(block.matrices.parameters.values())).device.type
        loads = "load them before moe_fx.prepare, or fill the model with moe_fx.load_quantized or moe_fx.load_packed"
        require(where != "meta", f"its weights are on the meta device; {loads}")
        known = (torch.bfloat16, torch.float16, torch.float32)
        require(block.matrices.dtype in known, f"its weights are {block.matrices.dtype}, not bf16, fp16 or fp32")
        spec = spec_for(block, quantize, group_size if quantize == "int4" else 0, zero_points)
        packer = Packer(spec)
        for e in range(spec.experts):
            for projection in projections(spec.gated):
                packer.quantize(e, projection, block.matrices.weight(e, projection))
                bias = block.matrices.bias(e, projection)
                if bias is not None:
                    packer.bias(e, projection, bias)
        return packer.packed, spec, block.matrices, BOUNDS[quantize]

    return pack_model(model, pack, activations)


def pack_model(
    model: nn.Module, pack: Pack, activations: str, check: Callable[[Packable], None] | None = None
) -> PrepareReport:
    """Pack the experts of every block that there are packed ones for, and report.

    Args:
        pack: gives a block's packed weights, their spec, the weights that they stand for and the largest relative L2
            error against these; :class:`Miss` leaves the block as it was.
        activations: ``exact`` or ``int8``.
        check: given every block before any is packed; what it raises leaves the model as it was.
    """
    ledger = Ledger(model)
    if check is not None:
        for found in find_packable(model):
            if isinstance(found, Packable):
                check(found)
    reports = []
    for found in find_packable(model):
        reports.append(found if isinstance(found, BlockReport) else _pack_block(found, pack, activations, ledger))
    return PrepareReport(tuple(reports), ledger.before, ledger.now(), ledger.peak)


def _pack_block(block: Packable, pack: Pack, activations: str, ledger: Ledger) -> BlockReport:
    kind, size = type(block.module).__name__, block.matrices.nbytes
    checked, act = min(_MEASURED, block.matrices.n_experts), attribute(block.experts, "act")
    try:
        packed, spec, wanted, bound = pack(block)
        ledger.saw(max(packed.nbytes, block.read.report.bytes_stacked if block.read else 0))
        dynamic = activations == "int8"
        error = relative_error(wanted, block, packed, spec, dynamic)
        if not error <= bound:
            raise Miss(
                f"its {spec.label} experts differ from what they stand for by a relative L2 error of {error:.2g}"
                f" (at most {bound:g})"
            )
        block.install(packed, spec.label, dynamic)
    except Miss as miss:
        return BlockReport(block.path, kind, LEFT, miss.reason)
    return BlockReport(
        module=block.path,
        kind=kind,
        status=PREPARED,
        form=block.form,
        n_experts=spec.experts,
        top_k=block.top_k,
        act=act,
        router=block.read.report.router if block.read else {},
        experts=block.experts,
        experts_checked=checked,
        error=error,
        packed_as=spec.label,
        activations=activations,
        bytes_experts=size,
        bytes_packed=packed.nbytes,
    )


def spec_for(block: Packable, fmt: str, group: int, zero_points: bool) -> PackedSpec:
    """How a block's experts are packed; :class:`Miss` where the engine does not store them."""
    from moe_fx.lowering.cpu.packing import PackedSpec, segments

    m = block.matrices
    sizes = (m.n_experts, m.hidden, m.intermediate, m.gated)
    spec = PackedSpec(fmt, *sizes, group, zero_points, m.biases, segments())
    try:
        spec.nbytes  # noqa: B018 - raises for sizes that cannot be packed
    except ValueError as error:
        raise Miss(f"the engine does not store it: {error}") from error
    return spec


def relative_error(wanted: Matrices, block: Packable, packed: torch.Tensor, spec: PackedSpec, dynamic: bool) -> float:
    """Relative L2 error of packed experts against ``wanted`` in fp32, on random tokens that reach up to 16 experts."""
    measured = min(_MEASURED, spec.experts)
    experts = torch.arange(measured) * spec.experts // measured
    rng = torch.Generator().manual_seed(0)
    top_k = min(2, measured)
    # Every measured expert gets a token, and tokens have two different experts.
    ids = torch.stack([experts.roll(-slot) for slot in range(top_k)], dim=1)
    dtype = block.matrices.dtype
    x = torch.randn(measured, spec.hidden, generator=rng).to(dtype)
    weights = (torch.rand(measured, top_k, generator=rng) + 0.5).to(dtype)
    attributes = packed_attributes(block.experts, spec.label, dynamic) | {"out_dtype": torch.float32}
    with torch.inference_mode():
        got = torch.ops.moe_fx_cpu.experts_packed.default(x, weights, ids, packed, **attributes)
        want = _experts_in_fp32(wanted, block.experts, x.float(), weights.float(), ids, spec.experts)
        if block.call is not None and wanted is block.matrices:
            _verify_reading(block, want, x, weights, ids)
    return _distance(got, want)


def _verify_reading(
    block: Packable, want: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    """Compare what was read of a module of experts with the module itself; :class:`Miss` where they differ."""
    assert block.call is not None
    given = {block.call.x: x, block.call.weights: weights, block.call.ids: ids}
    own = block.module.forward(*(given[name] for name in block.call.names[:3]))
    error, bound = _distance(own.float(), want), tolerance_of(x.dtype).rel_l2
    require(error <= bound, f"its experts do not verify: relative L2 error {error:.1e} (at most {bound:.0e})")


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    norm = want.norm()
    return float((got - want).norm() / norm) if norm > 0 else float((got - want).norm())


def _experts_in_fp32(
    matrices: Matrices,
    experts: Mapping[str, Any],
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    n_experts: int,
) -> torch.Tensor:
    act, limit = attribute(experts, "act"), attribute(experts, "limit")

    def linear(e: int, projection: str, rows: torch.Tensor) -> torch.Tensor:
        bias = matrices.bias(e, projection)
        return F.linear(rows, matrices.weight(e, projection).float(), None if bias is None else bias.float())

    def project(e: int, rows: torch.Tensor) -> torch.Tensor:
        gate = linear(e, "gate", rows)
        up = linear(e, "up", rows) if matrices.gated else None
        return linear(e, "down", activate(gate, up, act, attribute(experts, "alpha"), limit))

    return run_experts(x, weights, ids, n_experts, project, attribute(experts, "weight_on"))
