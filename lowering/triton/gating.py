"""Gating: router logits to the ids and weights of each token's experts, one block of tokens at a time.

What ``lowering/ops/route.py`` means, fp32 inside. Selection is exact: equal choices go to the lowest id, NaN is above
everything, and a token's ids are always distinct and in range. A round finds the best key, then the lowest id that
holds it; keys are of one of two forms:

* integers (CUDA): a warp reduces 32-bit integers in one instruction. A float that the compiler computes once for the
  maximum and once more, rounded otherwise, for the search of its position would never be found again.
* floats (ASCEND): the vector unit compares integers one by one. NaN counts as inf.
"""

import triton
import triton.language as tl

from .activation import sigmoid
from .rounding import round_to

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_INT_MAX = tl.constexpr(0x7FFFFFFF)
_INT_MIN = tl.constexpr(-0x80000000)


@triton.jit
def softplus(x):
    """log(1 + e**x) as max(x, 0) + log1p(e**-|x|); log1p by its series in e / (2 + e), which is at most 1/3."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(x > 0.0, x, 0.0) + 2.0 * s * series


@triton.jit
def tanh(x):
    """tanh through ``tl.exp``, and near zero, where that would cancel, a polynomial (Cephes tanhf)."""
    q = x * x
    p = ((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1
    near_zero = x + x * q * (p * q - 3.33332819422e-1)
    return tl.where(q < 0.390625, near_zero, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def score_of(z, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """The score functions of a single logit, rounded where torch rounds when it computes in ``DTYPE``."""
    if SCORE == "sigmoid":
        s = sigmoid(z)
    elif SCORE == "softplus":
        s = softplus(z)
    elif SCORE == "sqrtsoftplus":
        # Rounded exactly: the approximation that CUDA's plain one is flushes subnormal numbers to zero.
        s = tl.sqrt_rn(round_to(softplus(z), DTYPE))
    elif SCORE == "tanh":
        s = tanh(z)
    else:
        tl.static_assert(SCORE == "identity", "unknown score")
        s = z
    return round_to(s, DTYPE)


@triton.jit
def sort_keys(x, ASCEND: tl.constexpr):
    """Keys in the order of ``x``, NaN above all; what ``drop`` puts in their place is below all."""
    if ASCEND:
        x = tl.where(x == x, x, float("inf"))
        keys = tl.where(x < _LOWEST, _LOWEST, x)
    else:
        x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0, yet has other bits
        bits = x.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & _INT_MAX)
        keys = tl.where(x == x, bits, _INT_MAX)
    return keys


@triton.jit
def best(keys, ids, AXIS: tl.constexpr, ASCEND: tl.constexpr):
    """Value and id of the best key along an axis, which stays with size 1: of equal ones, that of the lowest id."""
    top = tl.max(keys, axis=AXIS, keep_dims=True)
    id = tl.min(tl.where(keys == top, ids, _INT_MAX), axis=AXIS, keep_dims=True)
    if not ASCEND:
        top = (top ^ ((top >> 31) & _INT_MAX)).to(tl.float32, bitcast=True)
    return top, id


@triton.jit
def drop(keys, dropped, ASCEND: tl.constexpr):
    """Keys without those that are ``dropped``."""
    return tl.where(dropped, float("-inf") if ASCEND else _INT_MIN, keys)


@triton.jit
def narrow_keys(keys, ids):
    """Keys of bf16 values, whose upper halves tell them apart, with the ids in the lower ones, the lowest on top."""
    return (keys & -0x10000) | (0xFFFF - ids)


@triton.jit
def pick_narrow(keys, nth, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Values and ids of the TOP_K best ``narrow_keys`` at places ``nth`` of a row, in falling order.

    A round takes the best of what each column of four offers, which is its next one from then on: fewer instructions
    than to search all keys for those that are taken.
    """
    IN_COLUMNS: tl.constexpr = BLOCK_E >= 4 * 32  # a column to each lane of a warp
    first = keys
    if IN_COLUMNS:
        left, right = tl.split(tl.reshape(keys, [BLOCK_T, BLOCK_E // 4, 2, 2]))
        first, second = tl.split(left)
        third, fourth = tl.split(right)
        first, second = tl.maximum(first, second), tl.minimum(first, second)
        third, fourth = tl.maximum(third, fourth), tl.minimum(third, fourth)
        first, third = tl.maximum(first, third), tl.minimum(first, third)
        second, fourth = tl.maximum(second, fourth), tl.minimum(second, fourth)
        second, third = tl.maximum(second, third), tl.minimum(second, third)
    picked = tl.zeros([BLOCK_T, nth.shape[1]], tl.int32)
    for j in range(TOP_K):
        top = tl.max(first, axis=1, keep_dims=True)
        picked = tl.where(nth == j, top, picked)
        taken = first == top
        if IN_COLUMNS:
            first = tl.where(taken, second, first)
            second = tl.where(taken, third, second)
            third = tl.where(taken, fourth, third)
            fourth = drop(fourth, taken, False)
        else:
            first = drop(first, taken, False)
    values = ((picked ^ ((picked >> 31) & _INT_MAX)) & -0x10000).to(tl.float32, bitcast=True)
    return values, 0xFFFF - (picked & 0xFFFF)


@triton.jit
def limit_to_groups(
    choice,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHOICE_DTYPE: tl.constexpr,
    BY_TOP2: tl.constexpr,
    FILL: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """``choice`` [BLOCK_T, BLOCK_G * BLOCK_S] with ``FILL`` outside each token's best groups."""
    choice = tl.reshape(choice, [BLOCK_T, BLOCK_G, BLOCK_S])
    place = tl.arange(0, BLOCK_S)[None, None, :]
    group = tl.arange(0, BLOCK_G)[None, :, None]
    keys = sort_keys(choice, ASCEND)
    if BLOCK_S != GROUP_SIZE:
        keys = drop(keys, place.to(tl.float32) >= GROUP_SIZE, ASCEND)
    group_score, first = best(keys, place, 2, ASCEND)
    if BY_TOP2:
        second, _ = best(drop(keys, place == first, ASCEND), place, 2, ASCEND)
        group_score = round_to(group_score + second, CHOICE_DTYPE)
    group_keys = sort_keys(group_score, ASCEND)
    if BLOCK_G != N_GROUP:
        group_keys = drop(group_keys, group.to(tl.float32) >= N_GROUP, ASCEND)
    limited = tl.full([BLOCK_T, BLOCK_G, BLOCK_S], FILL, tl.float32)
    for _turn in range(TOPK_GROUP):
        _score, winner = best(group_keys, group, 1, ASCEND)
        group_keys = drop(group_keys, group == winner, ASCEND)
        limited = tl.where(group == winner, choice, limited)
    return tl.reshape(limited, [BLOCK_T, BLOCK_G * BLOCK_S])


@triton.jit(do_not_specialize=["n_tokens"])
def gating_kernel(
    logits,
    bias,
    num_valid,
    weights,
    ids,
    n_tokens,
    stride_t,
    stride_e,
    eps,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BY_TOP2: tl.constexpr,
    FILL: tl.constexpr,
    SCORE: tl.constexpr,
    SCORED: tl.constexpr,
    AFTER: tl.constexpr,
    SOURCE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    CHOICE_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """weights [n_tokens, TOP_K] and ids [n_tokens, TOP_K] int32 (both dense) of logits [n_tokens, E].

    Args:
        logits: bf16, fp16 or fp32, with strides ``stride_t`` and ``stride_e``.
        bias: [E], added to the choice only, or None. num_valid: int scalar on the device, or None; tokens from there
            on get weight 0 and id -1.
        SCORED: select on scores; else on logits, which every score function leaves in order.
        AFTER: score the selected logits. SOURCE: "value": weights are the values selected on; "base": those before
            bias and groups; "choice": those after, searched anew as "base" is.
        RENORMALIZE: "none", "sum", "eps" (sum + eps), "clamp" (max(sum, eps)).
        *_DTYPE: "fp32", "bf16" or "fp16": where the model's arithmetic rounds.
        BLOCK_G, BLOCK_S, BLOCK_K: powers of two that hold N_GROUP, a group's experts and TOP_K.
        NARROW: what is selected on is exact in bf16, which fits a key together with an id, and SOURCE is "value". Not
            for ASCEND.
    """
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    GROUP_SIZE: tl.constexpr = E // N_GROUP
    # The sum of all exponentials cancels where the chosen ones are divided by theirs, unless rounding comes between.
    CANCELS: tl.constexpr = (SCORE == "softmax" and WEIGHT_DTYPE == "fp32") and (
        RENORMALIZE == "sum" and not (AFTER or SCORED)
    )
    # Experts lie in groups padded to BLOCK_S places. What is no power of two is loaded in three dimensions on Ascend:
    # computed addresses and remainders are scalar work there, and so are comparisons of integers.
    PADDED_GROUPS: tl.constexpr = N_GROUP > 1 and BLOCK_E != E
    IN_THREE_DIMENSIONS: tl.constexpr = PADDED_GROUPS and ASCEND
    if IN_THREE_DIMENSIONS:
        group = tl.arange(0, BLOCK_G)[None, :, None]
        place = tl.arange(0, BLOCK_S)[None, None, :]
        address = group * GROUP_SIZE + place
        real = (group < N_GROUP) & (place < GROUP_SIZE)
        among_e = (group.to(tl.float32) < N_GROUP) & (place.to(tl.float32) < GROUP_SIZE)
        outside = tl.reshape(tl.where(among_e, 0.0, 1.0), [1, BLOCK_E]) > 0.0
        # The places beyond a group would name the next one's experts.
        expert = tl.where(outside, -1, tl.reshape(address, [1, BLOCK_E]))
    elif PADDED_GROUPS:
        group = tl.arange(0, BLOCK_E)[None, :] // BLOCK_S
        place = tl.arange(0, BLOCK_E)[None, :] % BLOCK_S
        address = group * GROUP_SIZE + place
        real = (group < N_GROUP) & (place < GROUP_SIZE)
        outside = (group >= N_GROUP) | (place >= GROUP_SIZE)
        expert = tl.where(outside, -1, address)
    else:
        expert = tl.arange(0, BLOCK_E)[None, :]
        address = expert
        real = expert < E
        outside = expert.to(tl.float32) >= E
    nth = tl.arange(0, BLOCK_K)[None, :]
    # In floats, as is `padding` below: Ascend compares integers one by one.
    among_k = nth.to(tl.float32) < TOP_K
    if bias is not None:
        correction = tl.load(bias + address, mask=real, other=0.0).to(tl.float32)
        correction = tl.reshape(correction, [1, BLOCK_E])
    for block in range(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_T), tl.num_programs(0)):
        # Token offsets in int64, as scalars, which Ascend has; within a block int32 does.
        first = block * BLOCK_T
        token = tl.arange(0, BLOCK_T)[:, None]
        live = token < n_tokens - first
        here = logits + tl.cast(first, tl.int64) * stride_t
        if IN_THREE_DIMENSIONS:
            here += token[:, :, None] * stride_t + address * stride_e
            z = tl.reshape(tl.load(here, mask=live[:, :, None] & real, other=float("-inf")), [BLOCK_T, BLOCK_E])
        else:
            here += token * stride_t + address * stride_e
            z = tl.load(here, mask=live & real, other=float("-inf"))
        z = z.to(tl.float32)
        z = round_to(z, SCORE_DTYPE)
        if SCORE == "softmax" and not (AFTER or CANCELS):
            top = tl.max(z, axis=1, keep_dims=True)
            exponential = tl.exp(z - top)
            total = tl.sum(exponential, axis=1, keep_dims=True)
        base = z
        if SCORED:
            base = round_to(exponential / total, SCORE_DTYPE) if SCORE == "softmax" else score_of(z, SCORE, SCORE_DTYPE)
        choice = base
        if bias is not None:
            choice = round_to(base + correction, CHOICE_DTYPE)
        if N_GROUP > 1:
            choice = limit_to_groups(
                choice, N_GROUP, TOPK_GROUP, GROUP_SIZE, BLOCK_T, BLOCK_G, BLOCK_S, CHOICE_DTYPE, BY_TOP2, FILL, ASCEND
            )
        keys = sort_keys(choice, ASCEND)
        if NARROW:
            keys = narrow_keys(keys, expert)
        if BLOCK_E != E:
            keys = drop(keys, outside, ASCEND)

        if NARROW:
            w, chosen = pick_narrow(keys, nth, TOP_K, BLOCK_T, BLOCK_E)
        else:
            chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
            w = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
            for j in range(TOP_K):
                value, id = best(keys, expert, 1, ASCEND)
                is_it = expert == id
                keys = drop(keys, is_it, ASCEND)
                if SOURCE == "base":
                    value = tl.sum(tl.where(is_it, base, 0.0), axis=1, keep_dims=True)
                elif SOURCE == "choice":
                    value = tl.sum(tl.where(is_it, choice, 0.0), axis=1, keep_dims=True)
                w = tl.where(nth == j, value, w)
                chosen = tl.where(nth == j, id, chosen)

        if SCORE == "softmax":
            if AFTER or CANCELS:
                if BLOCK_K != TOP_K:
                    w = tl.where(among_k, w, float("-inf"))
                w = tl.exp(w - tl.max(w, axis=1, keep_dims=True))
            if AFTER:
                w = round_to(w / tl.sum(w, axis=1, keep_dims=True), WEIGHT_DTYPE)
            elif CANCELS:
                w = w / tl.sum(w, axis=1, keep_dims=True)
            elif not SCORED:
                w = round_to(tl.exp(w - top) / total, WEIGHT_DTYPE)
        elif not SCORED:
            w = score_of(w, SCORE, WEIGHT_DTYPE)
        if RENORMALIZE != "none" and not CANCELS:
            if BLOCK_K != TOP_K:
                w = tl.where(among_k, w, 0.0)
            summed = round_to(tl.sum(w, axis=1, keep_dims=True), WEIGHT_DTYPE)
            if RENORMALIZE == "eps":
                summed = round_to(summed + eps, WEIGHT_DTYPE)
            elif RENORMALIZE == "clamp":
                summed = tl.where(summed < eps, eps, summed)
            w = round_to(w / summed, WEIGHT_DTYPE)
        w = w * scale
        if num_valid is not None:
            padding = token.to(tl.float32) >= (tl.load(num_valid).to(tl.int32) - first).to(tl.float32)
            w = tl.where(padding, 0.0, w)
            chosen = tl.where(padding, -1, chosen)
        at = tl.cast(first, tl.int64) * TOP_K + token * TOP_K + nth
        w = round_to(w, WEIGHT_DTYPE)
        tl.store(weights + at, w.to(weights.dtype.element_ty), mask=live & (nth < TOP_K))
        tl.store(ids + at, chosen, mask=live & (nth < TOP_K))
