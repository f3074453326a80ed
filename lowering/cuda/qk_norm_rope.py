"""Launchers of ``triton/qk_norm_rope.py``: the canonical op, and the split of a merged qkv as engines hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moe_fx.lowering.cuda import configs
from moe_fx.lowering.cuda.device import on_its_device
from moe_fx.lowering.cuda.operands import DTYPE_NAMES
from moe_fx.lowering.ops.rope import LAYOUTS, NORMS, ROPES
from moe_fx.lowering.triton.qk_norm_rope import qk_norm_rope_kernel

# A head is one row of registers.
_WIDEST_HEAD = 1024
# Rope form -> whether pairs lie side by side on the way in and out, and whether tables hold a value per element.
_FORMS = {
    "half": (False, False, True),
    "half_split": (False, False, False),
    "interleaved": (True, True, False),
    "interleaved_to_half": (True, False, False),
    "interleaved_full": (True, True, True),
}
# Elements of q at a time, and of those a warp's: small parts start fast, large ones spare loads of tables and weights
# where tokens are many. A full-width norm holds all heads.
_MANY_TOKENS = 512
_ELEMENTS = {"head": (1024, 4096), "full": (8192, 8192)}
_ELEMENTS_PER_WARP = {"head": (256, 1024), "full": (1024, 1024)}
_COPIED_ELEMENTS = 1024


@on_its_device
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm: str = "head",
    cast: str = "before",
    offset: float = 0.0,
    rope: str = "half",
    rope_dtype: torch.dtype | None = None,
    layout: str = "bnsd",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``moe_fx::qk_norm_rope`` in one launch; both results are contiguous.

    Raises:
        ValueError: :func:`qk_norm_rope_refusal` has something against the operands.
    """
    refusal = qk_norm_rope_refusal(
        q, k, q_weight, k_weight, cos, sin, eps, q_bias=q_bias, k_bias=k_bias, norm=norm, cast=cast, offset=offset,
        rope=rope, rope_dtype=rope_dtype, layout=layout
    )  # fmt: skip
    if refusal:
        raise ValueError(f"qk_norm_rope: {refusal}")
    batch, length = q.shape[:2]
    tables = [_rows(table).expand(batch, length, table.shape[-1]) for table in (cos, sin)]
    operands = _Operands(q, k, q_weight, k_weight, q_bias, k_bias, tables[0], tables[1])
    q_out, k_out, _ = _launch(operands, eps, norm, cast, offset, rope, rope_dtype, layout)
    return q_out, k_out


def qk_norm_rope_refusal(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm: str = "head",
    cast: str = "before",
    offset: float = 0.0,
    rope: str = "half",
    rope_dtype: torch.dtype | None = None,
    layout: str = "bnsd",
) -> str | None:
    """Why the kernel does not take these operands, real or fake, in words; None when it does."""
    for name, value, known in (
        ("norm", norm, NORMS),
        ("cast", cast, ("before", "after")),
        ("rope", rope, ROPES),
        ("layout", layout, LAYOUTS),
    ):
        if value not in known:
            return f"{name}={value!r} is none of {', '.join(map(repr, known))}"
    tensors = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    given = {name: tensor for name, tensor in {**tensors, "cos": cos, "sin": sin}.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPE_NAMES:
            return f"{name} is {_word(tensor.dtype)}, the kernel takes {', '.join(map(_word, DTYPE_NAMES))}"
    if rope_dtype is not None and rope_dtype not in DTYPE_NAMES:
        return f"the rotation is in {_word(rope_dtype)}, the kernel's in {', '.join(map(_word, DTYPE_NAMES))}"
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or sin.dim() != 3:
        return "q and k are not [B, S, N, D], or cos and sin not [B, S, R]"
    sizes = {"q's heads": q.shape[2], "k's heads": k.shape[2], "q's head size": q.shape[3], "k's": k.shape[3]}
    for name, size in {**sizes, "cos' width": cos.shape[2], "sin's": sin.shape[2]}.items():
        if not isinstance(size, int):
            return f"{name} is not known when the kernel is compiled"
    for name, of_q, of_k in (("batch", q.shape[0], k.shape[0]), ("length", q.shape[1], k.shape[1])):
        if isinstance(of_q, int) and isinstance(of_k, int) and of_q != of_k:
            return f"q and k differ in {name} ({of_q} and {of_k})"
    head_dim = q.shape[3]
    if k.shape[3] != head_dim:
        return f"heads of q and k differ in size ({head_dim} and {k.shape[3]})"
    if head_dim > _WIDEST_HEAD:
        return f"heads of {head_dim} are wider than {_WIDEST_HEAD}"
    rotary = cos.shape[2] if _FORMS[rope][2] else 2 * cos.shape[2]
    if rotary > head_dim or rotary < 2 or rotary % 2 or sin.shape[2] != cos.shape[2]:
        return f"cos and sin rotate {rotary} elements of {head_dim} (an even number, at most all), or differ in width"
    for side, heads, *affine in (("q", q.shape[2], q_weight, q_bias), ("k", k.shape[2], k_weight, k_bias)):
        width = head_dim if norm == "head" else heads * head_dim
        for kind, operand in zip(("weight", "bias"), affine, strict=True):
            if operand is not None and tuple(operand.shape) != (width,):
                return f"{side}_{kind} is {list(operand.shape)}, not [{width}]"
    if cos.dtype != sin.dtype:
        return f"cos is {_word(cos.dtype)}, sin {_word(sin.dtype)}"
    chains = [
        _Dtypes.of(x, weight, bias, cos, cast, rope_dtype)
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias))
    ]
    if chains[0] != chains[1]:
        return "q and k, or their weights or biases, differ in dtype"
    return None


@on_its_device
def split_qkv_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    eps: float = 1e-6,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm: str = "head",
    cast: str = "before",
    offset: float = 0.0,
    interleaved: bool = False,
    rope_dtype: torch.dtype | None = None,
    copy_v: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a merged projection, normalise and rotate its queries and keys, in one launch (vLLM's and sgl's form).

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], rows of any stride.
        cos_sin: [P, R], a row per position: R/2 cosines, then R/2 sines. R < head_dim leaves the rest unrotated.
        positions: [T] int32 or int64 below P, which is not checked: that would wait for the device. None: the tables
            have a row per token (P == T).
        interleaved: pairs are (2i, 2i+1) (GPT-J), else (i, i + R/2) (GPT-NeoX).
        copy_v: whether v is copied to memory of its own, in the same launch; else it is a view into ``qkv``.
        q_weight, k_weight, eps, q_bias, k_bias, norm, cast, offset, rope_dtype: see ``moe_fx::qk_norm_rope``.

    Returns:
        q [T, num_heads * head_dim], k and v [T, num_kv_heads * head_dim].

    Raises:
        ValueError: the operands do not fit each other or the kernel; the message says which.
    """
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    if qkv.dim() != 2 or qkv.shape[1] != sum(widths):
        raise ValueError(
            f"qkv is {list(qkv.shape)}; {num_heads} query heads and twice {num_kv_heads} key/value heads of {head_dim} "
            f"take [T, {sum(widths)}]"
        )
    tokens = qkv.shape[0]
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 2:
        raise ValueError(f"cos_sin is {list(cos_sin.shape)}; it must be [P, R], R/2 cosines and R/2 sines in each row")
    if positions is None and cos_sin.shape[0] != tokens:
        raise ValueError(f"without positions cos_sin needs a row for each of {tokens} tokens, not {cos_sin.shape[0]}")
    if positions is not None and (tuple(positions.shape) != (tokens,) or positions.dtype not in _POSITIONS):
        raise ValueError(
            f"positions are {_word(positions.dtype)} {list(positions.shape)}; they must be int32 or int64 [{tokens}]"
        )
    qkv, cos_sin = _rows(qkv), _rows(cos_sin)
    parts = qkv.split(widths, dim=1)
    q, k = (part.unflatten(1, (-1, head_dim)).unsqueeze(0) for part in parts[:2])
    cos, sin = cos_sin.unsqueeze(0).chunk(2, dim=-1)
    rope = "interleaved" if interleaved else "half_split"
    refusal = qk_norm_rope_refusal(
        q, k, q_weight, k_weight, cos, sin, eps, q_bias=q_bias, k_bias=k_bias, norm=norm, cast=cast, offset=offset,
        rope=rope, rope_dtype=rope_dtype, layout="bsnd"
    )  # fmt: skip
    if refusal:
        raise ValueError(f"split_qkv_norm_rope: {refusal}")
    positions = None if positions is None else positions.contiguous()
    operands = _Operands(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, parts[2] if copy_v else None)
    q_out, k_out, v_out = _launch(operands, eps, norm, cast, offset, rope, rope_dtype, "bsnd")
    return q_out.view(tokens, widths[0]), k_out.view(tokens, widths[1]), parts[2] if v_out is None else v_out


_POSITIONS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class _Operands:
    """What the kernel reads: q and k [B, S, N, D], tables [B, S, R] (with positions [1, P, R]), v [T, K * D]."""

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None = None
    v: torch.Tensor | None = None


@dataclass(frozen=True)
class _Dtypes:
    """What the reference holds each intermediate value in, by PyTorch's rules of promotion."""

    x: torch.dtype
    weighted: torch.dtype
    normed: torch.dtype
    rope: torch.dtype
    rotated: torch.dtype
    out: torch.dtype

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        cos: torch.Tensor,
        cast: str,
        rope_dtype: torch.dtype | None,
    ) -> _Dtypes:
        """The dtypes of one of q and k."""
        promotes = weight is not None and cast == "before"
        weighted = torch.promote_types(x.dtype, weight.dtype) if promotes and weight is not None else x.dtype
        normed = weighted if bias is None else torch.promote_types(weighted, bias.dtype)
        rope = rope_dtype or normed
        rotated = torch.promote_types(rope, cos.dtype)
        return cls(x.dtype, weighted, normed, rope, rotated, rotated if rope_dtype is None else normed)


def _launch(
    of: _Operands,
    eps: float,
    norm: str,
    cast: str,
    offset: float,
    rope: str,
    rope_dtype: torch.dtype | None,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    q, k = _rows(of.q), _rows(of.k)
    batch, length, q_heads, head_dim = q.shape
    k_heads, tokens = k.shape[2], batch * length
    dtypes = _Dtypes.of(q, of.q_weight, of.q_bias, of.cos, cast, rope_dtype)
    heads_first = layout == "bnsd"

    def out(heads: int) -> torch.Tensor:
        shape = (batch, heads, length, head_dim) if heads_first else (batch, length, heads, head_dim)
        return torch.empty(shape, dtype=dtypes.out, device=q.device)

    q_out, k_out = out(q_heads), out(k_heads)
    v_out = None if of.v is None else torch.empty(of.v.shape, dtype=of.v.dtype, device=q.device)
    if tokens == 0:
        return q_out, k_out, v_out
    interleaved_in, interleaved_out, full_tables = _FORMS[rope]
    rotary = of.cos.shape[-1] if full_tables else 2 * of.cos.shape[-1]
    widest = triton.next_power_of_2(q_heads)
    many = tokens >= _MANY_TOKENS
    defaults = {"BLOCK_H": max(1, min(widest, _ELEMENTS[norm][many] // triton.next_power_of_2(head_dim)))}
    defaults["num_warps"] = _warps(defaults["BLOCK_H"] * head_dim // _ELEMENTS_PER_WARP[norm][many])
    chosen = configs.lookup("qk_norm_rope", f"{norm}-{head_dim}", tokens, defaults, q.device)
    block_q, block_k = (min(chosen["BLOCK_H"], triton.next_power_of_2(heads)) for heads in (q_heads, k_heads))
    parts = 2 if norm == "full" else triton.cdiv(q_heads, block_q) + triton.cdiv(k_heads, block_k)
    # Every program has one part: on a GPU nothing is gained by loops over items.
    grid = (tokens * (parts + (of.v is not None)),)
    qk_norm_rope_kernel[grid](
        q, k, of.v, q_out, k_out, v_out,
        _dense(of.q_weight), _dense(of.k_weight), _dense(of.q_bias), _dense(of.k_bias),
        of.cos, of.sin, of.positions, eps, tokens, length,
        *q.stride()[:3], *k.stride()[:3], 0 if of.v is None else of.v.stride(0),
        *of.cos.stride()[:2], *of.sin.stride()[:2],
        Q_HEADS=q_heads, K_HEADS=k_heads, D=head_dim, ROTARY=rotary,
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_V=min(_COPIED_ELEMENTS, triton.next_power_of_2(k_heads * head_dim)),
        BLOCK_HALF=triton.next_power_of_2(rotary // 2), BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary)),
        NORM=norm, CAST=cast, OFFSET=offset if cast == "after" else 0.0,
        INTERLEAVED_IN=interleaved_in, INTERLEAVED_OUT=interleaved_out, FULL_TABLES=full_tables,
        HEADS_FIRST=heads_first,
        X_DTYPE=DTYPE_NAMES[dtypes.x],
        WEIGHTED_DTYPE=DTYPE_NAMES[dtypes.weighted], NORMED_DTYPE=DTYPE_NAMES[dtypes.normed],
        ROPE_DTYPE=DTYPE_NAMES[dtypes.rope], ROTATED_DTYPE=DTYPE_NAMES[dtypes.rotated],
        SPLIT=True, ASCEND=False,
        num_warps=chosen["num_warps"],
        # The reference rounds products before it adds them; a fused multiply-add would not.
        enable_fp_fusion=False,
    )  # fmt: skip
    return q_out, k_out, v_out


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Last dimension dense, the others of any stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _warps(wanted: int) -> int:
    """A power of two from 1 to 16."""
    return min(16, triton.next_power_of_2(max(1, wanted)))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
