"""Sorts (token, expert) pairs by expert and cuts them into tiles of one expert each, on the device alone.

The result has a size that follows from shapes, whatever the ids are: ``order`` lists pairs by expert, those of one in
their own order (always the same for the same ids); ``tiles`` says of each tile which rows of ``order`` it is.
Pairs whose id is no expert are in no tile. One program per expert counts and places; beyond some thousands of pairs
``count_pairs_kernel`` counts first, with a program per block of pairs.
"""

import triton
import triton.language as tl


@triton.jit
def below(place, bound, ASCEND: tl.constexpr):
    """place < bound; on Ascend as fp32, which is exact for numbers of experts: its vector unit orders no integers."""
    if ASCEND:
        place = place.to(tl.float32)
    return place < bound


@triton.jit
def _count(ids, first, n_pairs, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, ASCEND: tl.constexpr):
    """[BLOCK_E] int32: how many of the BLOCK_P pairs from ``first`` on go to each expert."""
    pairs = first + tl.arange(0, BLOCK_P)
    expert = tl.load(ids + pairs, mask=pairs < n_pairs, other=-1)
    if ASCEND:
        # There is no histogram; int32 compares for equality at full speed.
        count = tl.sum((expert[None, :] == tl.arange(0, BLOCK_E)[:, None]).to(tl.int32), axis=1)
    else:
        # Ids that are no expert are counted in a place of their own, past the experts.
        valid = (expert >= 0) & (expert < E)
        count = tl.histogram(tl.where(valid, expert, BLOCK_E).to(tl.int32), 2 * BLOCK_E)
    return count


@triton.jit(do_not_specialize=["n_pairs"])
def count_pairs_kernel(
    ids, counts, n_pairs, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, ASCEND: tl.constexpr
):
    """counts[block, e]: how many pairs of the block go to expert e.

    Args:
        ids: [n_pairs] int32 or int64. counts: [cdiv(n_pairs, BLOCK_P), BLOCK_E] int32, BLOCK_E a power of two >= E.
    """
    place = tl.arange(0, BLOCK_E if ASCEND else 2 * BLOCK_E)
    for block in range(tl.program_id(0), tl.cdiv(n_pairs, BLOCK_P), tl.num_programs(0)):
        count = _count(ids, block * BLOCK_P, n_pairs, E, BLOCK_E, BLOCK_P, ASCEND)
        tl.store(counts + block * BLOCK_E + place, count, mask=place < BLOCK_E)


@triton.jit(do_not_specialize=["n_pairs", "max_tiles"])
def place_pairs_kernel(
    ids,
    counts,
    order,
    tiles,
    n_pairs,
    max_tiles,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ASCEND: tl.constexpr,
):
    """Write ``order`` and ``tiles``; a program places the pairs of one expert after another.

    Args:
        ids: [n_pairs] int32 or int64. counts: of ``count_pairs_kernel``, or None to count here.
        order: [n_pairs] int32.
        tiles: int32: the number of tiles, then for each of max_tiles places its expert, then its first row in
            ``order``, then the row after its last. max_tiles must be at least n + (n_pairs - n) // BLOCK_M, with
            n = min(n_pairs, E).
    """
    place = tl.arange(0, BLOCK_E if ASCEND else 2 * BLOCK_E)
    is_expert = below(place, E, ASCEND)
    n_blocks = tl.cdiv(n_pairs, BLOCK_P)
    count = tl.zeros([BLOCK_E if ASCEND else 2 * BLOCK_E], dtype=tl.int32)
    for block in range(0, n_blocks):
        if counts is None:
            count += _count(ids, block * BLOCK_P, n_pairs, E, BLOCK_E, BLOCK_P, ASCEND)
        else:
            count += tl.load(counts + block * BLOCK_E + place, mask=is_expert, other=0)
    count = tl.where(is_expert, count, 0)
    n_tiles = (count + (BLOCK_M - 1)) // BLOCK_M
    for e in range(tl.program_id(0), E, tl.num_programs(0)):
        before = below(place, e, ASCEND)
        own = place == e
        row = tl.sum(tl.where(before, count, 0))
        end = row + tl.sum(tl.where(own, count, 0))
        tile = tl.sum(tl.where(before, n_tiles, 0))
        tile_end = tile + tl.sum(tl.where(own, n_tiles, 0))
        if e == 0:
            tl.store(tiles, tl.sum(n_tiles))
        for first in range(tile, tile_end, BLOCK_E):
            at = first + tl.arange(0, BLOCK_E)
            mask = at < tile_end
            rows = row + (at - tile) * BLOCK_M
            tl.store(tiles + 1 + at, tl.zeros([BLOCK_E], dtype=tl.int32) + e, mask=mask)
            tl.store(tiles + 1 + max_tiles + at, rows, mask=mask)
            tl.store(tiles + 1 + 2 * max_tiles + at, tl.minimum(rows + BLOCK_M, end), mask=mask)
        if end > row:
            placed = row
            for block in range(0, n_blocks):
                pairs = block * BLOCK_P + tl.arange(0, BLOCK_P)
                hit = (tl.load(ids + pairs, mask=pairs < n_pairs, other=-1) == e).to(tl.int32)
                tl.store(order + placed + tl.cumsum(hit, axis=0) - 1, pairs, mask=hit == 1)
                placed += tl.sum(hit)
