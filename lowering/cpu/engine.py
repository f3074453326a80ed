"""The C++ expert engine as PyTorch ops: ``torch.ops.moe_fx_cpu``, registered when this module is imported.

* ``experts``: ``moe_fx::experts`` on row-major bf16 or fp16 weights, read where the model has them. The first call on a
  weight asks the system to back its memory with huge pages (decoding is bound by memory, and they are worth a factor of
  1.3 to 1.7): neither contents nor addresses change. ``MOE_FX_HUGE_PAGES=0`` leaves the pages as they are.
* ``experts_packed``: the same on weights that ``packing`` packed.
* ``experts_int8``, ``experts_int4``: the canonical quantised ops on plain tensors, packed once on their first call.

Threads are PyTorch's own: its OpenMP runtime runs the engine's work, ``torch.set_num_threads`` says how wide.
"""

from __future__ import annotations

import functools
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from moe_fx import _C
from moe_fx._C import run_dense, run_packed  # An extension without the engine is as good as none.
from moe_fx.lowering.cpu.packing import PackedSpec, Packer, segments
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.ops.experts import like_x

NAMESPACE = "moe_fx_cpu"
ACTIVATION_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
DENSE_DTYPES = (torch.bfloat16, torch.float16)
# Attribute of a packed tensor that remembers its H.
_HIDDEN = "_moe_fx_hidden"
_ID_DTYPES = (torch.int32, torch.int64)
# A weight smaller than a huge page has none to gain.
_HUGE_PAGE = 2 << 20

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``moe_fx::experts`` (see there) on bf16 or fp16 weights [E, out, in] with contiguous inputs."""
    if w13.dtype not in DENSE_DTYPES:
        raise ValueError(f"moe_fx_cpu::experts takes bf16 and fp16 weights, not {w13.dtype}; use moe_fx::experts")
    inter = w2.shape[-1]
    rows = inter if layout in ("split", "none") else 2 * inter
    up_shape, down_shape = (len(w13), rows, x.shape[-1]), (len(w13), x.shape[-1], inter)
    if not (
        _is(w13, up_shape, x)
        and _is(w2, down_shape, x)
        and (w3 is None or _is(w3, up_shape, x))
        and (b13 is None or _is(b13, up_shape[:2], x))
        and (b2 is None or _is(b2, down_shape[:2], x))
        and (b3 is None or _is(b3, up_shape[:2], x))
    ):
        _like_experts(x, weights, ids, w13, w2, b13, b2, w3, b3, layout=layout)  # Says what does not fit.
    if not w13.stride(2) == w2.stride(2) == (1 if w3 is None else w3.stride(2)) == 1:
        raise ValueError("moe_fx_cpu::experts reads rows of contiguous inputs; give it weight.contiguous()")
    gate, up = _gate_and_up(w13, w3, layout)
    gate_bias, up_bias = (None, None) if b13 is None else _gate_and_up(b13, b3, layout)
    _connect_openmp()
    for weight in (w13, w2) if w3 is None else (w13, w2, w3):
        _use_huge_pages(weight)
    operands, held = _operands(x, weights, ids, out_dtype)
    if x.numel():
        run_dense(
            ACTIVATION_DTYPES[w13.dtype], w13.shape[0], w13.shape[2], inter, gate, up, _place(w2),
            gate_bias, up_bias, None if b2 is None else _place(b2),
            act, alpha, None if layout == "none" else limit, weight_on == "input", *operands,
        )  # fmt: skip
    return held[-1]


def experts_packed(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    packed: torch.Tensor,
    *,
    packed_as: str = "",
    act: str = "silu",
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float | None = None,
    dynamic_activations: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``moe_fx::experts`` on packed weights.

    Args:
        x, weights, ids, act, weight_on, alpha, limit, out_dtype: see ``moe_fx::experts``.
        packed: uint8 [bytes], written by ``packing.Packer``; its header has the sizes.
        packed_as: the packed weights' format in words, for reports alone.
        dynamic_activations: False keeps activations exact; True rounds each row (int8 weights) or group (int4) of them
            to int8 with a scale of its own, as ``experts_int8`` and ``experts_int4`` do.

    Returns:
        y [T, H].
    """
    return _run_packed(x, weights, ids, packed, act, alpha, limit, weight_on == "input", dynamic_activations, out_dtype)


def experts_int8(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    dynamic_activations: bool = False,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``moe_fx::experts_int8`` (see there); weights are packed on their first call and kept beside the originals."""
    packed = _packed_once((w13, w13_scale, w2, w2_scale, None, None, b13, b2), layout)
    limit = None if layout == "none" else limit
    return _run_packed(x, weights, ids, packed, act, alpha, limit, False, dynamic_activations, out_dtype)


def experts_int4(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    dynamic_activations: bool = False,
    act: str = "silu",
    layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``moe_fx::experts_int4`` (see there); weights are packed on their first call and kept beside the originals."""
    packed = _packed_once((w13, w13_scale, w2, w2_scale, w13_zero, w2_zero, b13, b2), layout)
    limit = None if layout == "none" else limit
    return _run_packed(x, weights, ids, packed, act, alpha, limit, False, dynamic_activations, out_dtype)


def description(weights: str) -> str:
    """What runs such weights, in words: ``engine (bf16, avx512_bf16, 2 threads)``."""
    info = _C.engine_info()
    threads = sum(map(len, info["nodes"])) if info["own_threads"] else torch.get_num_threads()
    return f"engine ({weights}, {info['isa']}, {threads} threads)"


def quantized_spec(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    zero: torch.Tensor | None,
    layout: str,
    biases: bool,
) -> PackedSpec:
    """How the operands of ``experts_int8`` (int8 weights) or ``experts_int4`` (uint8 nibbles) are packed.

    Raises:
        ValueError: the engine does not store such weights.
    """
    is_int4 = w13.dtype == torch.uint8
    hidden, inter = (size * (2 if is_int4 else 1) for size in (w13.shape[2], w2.shape[2]))
    groups = {hidden // w13_scale.shape[2], inter // w2_scale.shape[2]} if is_int4 else {0}
    if len(groups) > 1:
        raise ValueError(f"gate/up and down have different group sizes, {sorted(groups)}")
    sizes = (w13.shape[0], hidden, inter, layout != "none", groups.pop())
    spec = PackedSpec("int4" if is_int4 else "int8", *sizes, zero is not None, biases, segments())
    spec.nbytes  # noqa: B018 - raises for sizes that cannot be packed
    return spec


# --- Operands ---------------------------------------------------------------------------------------------------------


def _operands(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out_dtype: torch.dtype | None
) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
    """The arguments that describe a call, and the tensors that they point into, the result last.

    Addresses are what the engine gets: nothing behind this function would notice operands that do not fit.
    """
    if not (x.dim() == ids.dim() == 2 and ids.shape == weights.shape and len(ids) == len(x)):
        like_x(x, weights, ids)  # Says what does not fit.
    if x.dtype not in ACTIVATION_DTYPES or (out_dtype or x.dtype) not in ACTIVATION_DTYPES:
        raise ValueError(f"the engine takes and gives bf16, fp16 and fp32, not {x.dtype} and {out_dtype or x.dtype}")
    x, weights, ids = x.contiguous(), weights.contiguous(), ids.contiguous()
    if weights.dtype not in ACTIVATION_DTYPES:
        weights = weights.to(torch.float32)
    if ids.dtype not in _ID_DTYPES:
        ids = ids.to(torch.int64)
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype)
    tokens, top_k = ids.shape
    call = (
        x.data_ptr(), ACTIVATION_DTYPES[x.dtype], tokens, top_k,
        weights.data_ptr(), ACTIVATION_DTYPES[weights.dtype], ids.data_ptr(), ids.dtype == torch.int64,
        0, 0, y.data_ptr(), ACTIVATION_DTYPES[y.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return call, (x, weights, ids, y)


def _gate_and_up(
    first: torch.Tensor, second: torch.Tensor | None, layout: str
) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    """Where the gate's and the up projection's rows are: (address, bytes between experts, bytes between rows)."""
    whole = _place(first)
    if layout == "none":
        return whole, None
    if layout == "split":
        return whole, None if second is None else _place(second)
    address, of_expert, of_row = whole
    if layout == "interleaved":
        return (address, of_expert, 2 * of_row), (address + of_row, of_expert, 2 * of_row)
    other = (address + first.shape[1] // 2 * of_row, of_expert, of_row)
    return (whole, other) if layout == "gate_up" else (other, whole)


def _is(tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> bool:
    return tensor.shape == shape and tensor.dtype == like.dtype


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    size = tensor.element_size()
    return tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size


def _run_packed(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    packed: torch.Tensor,
    act: str,
    alpha: float,
    limit: float | None,
    weight_on_input: bool,
    dynamic_activations: bool,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    _connect_openmp()
    place = (packed.data_ptr(), packed.numel())
    hidden = getattr(packed, _HIDDEN, None)
    if hidden is None:  # Asked once: a call should cost microseconds.
        hidden = _C.packed_spec(*place)["hidden"]
        setattr(packed, _HIDDEN, hidden)
    if x.shape[-1] != hidden:
        raise ValueError(f"x must be [T, {hidden}] for these packed experts, not {list(x.shape)}")
    operands, held = _operands(x, weights, ids, out_dtype)
    if x.numel():
        run_packed(*place, act, alpha, limit, weight_on_input, dynamic_activations, *operands)
    return held[-1]


# --- Once per process or weight ---------------------------------------------------------------------------------------


@functools.cache
def _connect_openmp() -> bool:
    """Tell the engine where PyTorch's OpenMP runtime is, so that both share its threads; False where there is none."""
    path = openmp_library()
    return path is not None and _C.use_openmp(path)


def openmp_library() -> str | None:
    """The OpenMP runtime that torch has loaded: torch's own among those in memory, else any, else what it ships."""
    pattern = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.(so|dylib)")
    folder = str(Path(torch.__file__).parent) + os.sep
    loaded: list[str] = []
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line)
        loaded = sorted({path for path in paths if pattern.search(path)})
    shipped = (str(path) for path in sorted(Path(folder, "lib").glob("lib*omp*")) if pattern.search(str(path)))
    return next((path for path in loaded if path.startswith(folder)), None) or next(iter((*loaded, *shipped)), None)


# Storages whose pages were dealt with. A weak reference keeps the storage's identity from being given to another one.
_SEEN: dict[int, StorageWeakRef] = {}


def _use_huge_pages(weight: torch.Tensor) -> None:
    """Back a weight's memory with huge pages, on its first call; contents and addresses stay as they are."""
    storage = weight.untyped_storage()
    if storage._cdata in _SEEN:
        return
    for key in [key for key, reference in list(_SEEN.items()) if reference.expired()]:
        _SEEN.pop(key, None)
    _SEEN[storage._cdata] = StorageWeakRef(storage)
    if storage.nbytes() >= _HUGE_PAGE and os.environ.get("MOE_FX_HUGE_PAGES", "1") != "0":
        _C.make_huge(storage.data_ptr(), storage.nbytes())


class _Kept:
    """Packed weights, and the tensors that they were packed from, as they then were."""

    def __init__(self, sources: Sequence[torch.Tensor | None], layout: str, packed: torch.Tensor) -> None:
        self._references = [None if source is None else weakref.ref(source) for source in sources]
        self._states = _states(sources)
        self._layout = layout
        self.packed = packed

    def are_of(self, sources: Sequence[torch.Tensor | None], layout: str) -> bool:
        """Whether nothing was replaced or written to since."""
        alike = all(
            (ref is None) == (source is None) and (ref is None or ref() is source)
            for ref, source in zip(self._references, sources, strict=True)
        )
        return alike and layout == self._layout and self._states == _states(sources)


_KEPT = WeakTensorKeyDictionary()


def _packed_once(sources: tuple[torch.Tensor | None, ...], layout: str) -> torch.Tensor:
    """The packed form of (w13, its scale, w2, its scale, their zeros, b13, b2), kept as long as w13 lives."""
    w13 = sources[0]
    assert w13 is not None
    kept = _KEPT.get(w13)
    if kept is None or not kept.are_of(sources, layout):
        _KEPT[w13] = kept = _Kept(sources, layout, _pack(sources, layout))
    return kept.packed


def _states(tensors: Sequence[torch.Tensor | None]) -> list[tuple[Any, ...] | None]:
    """What changes when a tensor is written to or re-pointed (inference tensors count no writes)."""
    return [
        None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.dtype) for t in tensors
    ]


def _pack(sources: tuple[Any, ...], layout: str) -> torch.Tensor:
    w13, w13_scale, w2, w2_scale, w13_zero, w2_zero, b13, b2 = sources
    packer = Packer(quantized_spec(w13, w13_scale, w2, w2_scale, w13_zero, layout, b13 is not None or b2 is not None))
    is_int4 = packer.spec.format == "int4"
    for e in range(packer.spec.experts):
        of_expert = [None if t is None else t[e] for t in (w13, w13_scale, w13_zero, b13)]
        halves = [_halves(t, layout) for t in of_expert]
        for index, projection in enumerate(("gate", "up")[: 1 if layout == "none" else 2]):
            weight, scale, zero, bias = (half[index] for half in halves)
            _pack_one(packer, is_int4, e, projection, weight, scale, zero, bias)
        down = (w2[e], w2_scale[e], None if w2_zero is None else w2_zero[e], None if b2 is None else b2[e])
        _pack_one(packer, is_int4, e, "down", *down)
    return packer.packed


def _pack_one(
    packer: Packer, is_int4: bool, e: int, projection: str, weight: Any, scale: Any, zero: Any, bias: Any
) -> None:
    if is_int4:
        packer.int4(e, projection, weight, scale, zero)
    else:
        packer.int8(e, projection, weight, scale)
    if bias is not None:
        packer.bias(e, projection, bias)


def _halves(merged: torch.Tensor | None, layout: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gate, up) of one expert's merged rows [2I, ...], as views."""
    if merged is None or layout == "none":
        return merged, None
    if layout == "interleaved":
        return merged[::2], merged[1::2]
    first, second = merged.chunk(2)
    return (first, second) if layout == "gate_up" else (second, first)


# --- Registration -----------------------------------------------------------------------------------------------------


def _like_experts(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Shape and dtype of ``experts``, after checking every operand."""
    fake = CANONICAL_OPS["experts"].fake
    assert fake is not None
    return fake(*args, **kwargs)


def _without(schema: str, attribute: str) -> str:
    assert attribute in schema
    return schema.replace(attribute, "")


_PACKED_SCHEMA = (
    "(Tensor x, Tensor weights, Tensor ids, Tensor packed, *, str packed_as='', str act='silu',"
    " str weight_on='output', float alpha=1.702, float? limit=None, bool dynamic_activations=False,"
    " ScalarType? out_dtype=None) -> Tensor"
)

for _name, _kernel, _schema, _fake in (
    ("experts", experts, _without(CANONICAL_OPS["experts"].schema, "bool transposed=False, "), _like_experts),
    ("experts_packed", experts_packed, _PACKED_SCHEMA, like_x),
    ("experts_int8", experts_int8, CANONICAL_OPS["experts_int8"].schema, like_x),
    ("experts_int4", experts_int4, CANONICAL_OPS["experts_int4"].schema, like_x),
):
    _LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
