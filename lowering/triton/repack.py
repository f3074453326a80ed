"""Moves int4 weights between layouts, nibble by nibble: every value is kept.

**The layouts** of a weight with N outputs and K inputs, each value an unsigned nibble (experts come first: [E, ...]):

- ``canonical``: uint8 [N, K/2]; byte c holds input 2c in its low nibble, 2c + 1 in the high one (``experts_int4``).
- ``planar``: uint8 [N, K/2]; within each group of g inputs, byte j < g/2 holds input j low and input j + g/2 high. So
  the low nibbles of a run of bytes are a run of inputs, and the high nibbles another: vector units read them with unit
  stride and without shuffles.
- ``awq``: int32 [K, N/8]; in word c, the nibble at bit 4i holds output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
- ``gptq``: int32 [K/8, N]; in word r, the nibble at bit 4i holds input 8r + i.
- ``compressed_tensors``: int32 [N, K/8], nibbles as in ``gptq``. On a little-endian machine, ``canonical`` by bytes.

Zero points, one per output and group: uint8 [N, K/g], one to a byte (``experts_int4``); in ``awq``, int32 [K/g, N/8] in
the order of its weights; in ``gptq_v2``, the same in sequential order; in ``gptq``, that less one; in
``compressed_tensors``, int32 [N/8, K/g] in sequential order. Scales are floats, never packed: [K/g, N] in ``awq`` and
``gptq``, and transposed in the others.

All shifts are by constants and all words 32 bits wide, which is what Ascend's vector unit can do. The grids are
one-dimensional and of any size: programs loop over blocks.
"""

import triton
import triton.language as tl


@triton.jit
def _spread(x):
    """Nibbles 0-3 of each word into the low halves of its four bytes."""
    return (x & 0xF) | ((x & 0xF0) << 4) | ((x & 0xF00) << 8) | ((x & 0xF000) << 12)


@triton.jit
def _gather(x):
    """The low halves of each word's four bytes into nibbles 0-3: the inverse of ``_spread``."""
    return (x & 0xF) | ((x >> 4) & 0xF0) | ((x >> 8) & 0xF00) | ((x >> 12) & 0xF000)


@triton.jit
def inputs_kernel(
    sequential,
    planar,
    experts,
    outputs,
    inputs,
    sequential_output,
    sequential_word,
    TO_PLANAR: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Between eight consecutive inputs to a word, and planar groups.

    Of a group's words, the first half (A) holds inputs whose planar place is a low nibble, the second half (B) those of
    the high nibbles; two planar words hold one of A and one of B.

    Args:
        sequential: int32 [experts, outputs, inputs / 8], strides ``sequential_output`` and ``sequential_word`` in
            either order; an expert is dense.
        planar: int32 [experts, outputs, inputs / 8], dense: four planar bytes to a word.
        TO_PLANAR: the direction; the other tensor is written.
        GROUP: a multiple of 16. BLOCK_N: outputs at a time. BLOCK_W: a power of two, pairs of words at a time.
    """
    HALF: tl.constexpr = GROUP // 16  # words of A, and of B
    STEPS: tl.constexpr = (HALF + BLOCK_W - 1) // BLOCK_W
    groups = inputs // GROUP
    rows = tl.cdiv(outputs, BLOCK_N)
    words = inputs // 8
    for item in range(tl.program_id(0), experts * rows * groups * STEPS, tl.num_programs(0)):
        step = item % STEPS
        group = item // STEPS % groups
        row = item // (STEPS * groups) % rows
        expert = tl.cast(item // (STEPS * groups * rows), tl.int64)
        n = row * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        w = step * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        first = sequential + expert * outputs * words + tl.cast(group, tl.int64) * (2 * HALF) * sequential_word
        second = first + HALF * sequential_word
        offsets = n * sequential_output + w * sequential_word
        even = planar + expert * outputs * words + group * (2 * HALF) + n * words + w * 2
        mask = (n < outputs) & (w < HALF)
        if TO_PLANAR:
            a = tl.load(first + offsets, mask=mask, other=0)
            b = tl.load(second + offsets, mask=mask, other=0)
            tl.store(even, _spread(a) | (_spread(b) << 4), mask=mask)
            tl.store(even + 1, _spread(a >> 16) | (_spread(b >> 16) << 4), mask=mask)
        else:
            x = tl.load(even, mask=mask, other=0)
            y = tl.load(even + 1, mask=mask, other=0)
            tl.store(first + offsets, _gather(x) | (_gather(y) << 16), mask=mask)
            tl.store(second + offsets, _gather(x >> 4) | (_gather(y >> 4) << 16), mask=mask)


@triton.jit
def outputs_kernel(
    words,
    rows,
    experts,
    outputs,
    inputs,
    group,
    word_input,
    word_octet,
    TO_ROWS: tl.constexpr,
    PAIRED: tl.constexpr,
    PLANAR: tl.constexpr,
    AWQ_ORDER: tl.constexpr,
    LESS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Between eight outputs to a word, and rows of bytes that belong to one output.

    Args:
        words: int32 [experts, inputs, outputs / 8] with strides ``word_input`` and ``word_octet`` (in either order); an
            expert is dense.
        rows: uint8 [experts, outputs, bytes], dense. With PAIRED a byte holds two inputs, else one (zero points).
        group: inputs within which PLANAR pairs them; all of them otherwise.
        TO_ROWS: the direction; the other tensor is written.
        AWQ_ORDER: order of nibbles in a word, else sequential.
        LESS: by how much a nibble in a word is smaller than in the rows.
        BLOCK_C, BLOCK_J: powers of two, words and bytes at a time.
    """
    half = group // 2 if PAIRED else group  # bytes of a group
    steps = tl.cdiv(half, BLOCK_J)
    groups = inputs // group
    octets = outputs // 8
    blocks = tl.cdiv(octets, BLOCK_C)
    row = half * groups  # bytes of an output
    for item in range(tl.program_id(0), experts * groups * blocks * steps, tl.num_programs(0)):
        step = item % steps
        block = item // steps % blocks
        within = item // (steps * blocks) % groups
        expert = tl.cast(item // (steps * blocks * groups), tl.int64)
        of_words = words + expert * inputs * octets + tl.cast(within, tl.int64) * group * word_input
        of_rows = rows + expert * outputs * row + within * half
        j = step * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        j_row = step * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        c_row = block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        mask = (j < half) & (c < octets)
        mask_row = (c_row < octets) & (j_row < half)
        if PAIRED and not PLANAR:
            low = of_words + j * (2 * word_input) + c * word_octet
            high = low + word_input
        else:
            low = of_words + j * word_input + c * word_octet
            high = low + half * word_input
        if TO_ROWS:
            low_words = tl.load(low, mask=mask, other=0)
            high_words = low_words
            if PAIRED:
                high_words = tl.load(high, mask=mask, other=0)
        else:
            low_words = tl.zeros([BLOCK_J, BLOCK_C], dtype=tl.int32)
            high_words = low_words
        for i in tl.static_range(8):
            output = i % 4 * 2 + i // 4 if AWQ_ORDER else i
            to = of_rows + (c_row * 8 + output) * row + j_row
            if TO_ROWS:
                x = ((low_words >> (4 * i)) & 0xF) + LESS
                if PAIRED:
                    x |= ((high_words >> (4 * i)) & 0xF) << 4
                tl.store(to, tl.trans(x).to(tl.uint8), mask=mask_row)
            else:
                x = tl.trans(tl.load(to, mask=mask_row, other=0).to(tl.int32))
                low_words |= ((x - LESS) & 0xF) << (4 * i)
                if PAIRED:
                    high_words |= ((x >> 4) & 0xF) << (4 * i)
        if not TO_ROWS:
            tl.store(low, low_words, mask=mask)
            if PAIRED:
                tl.store(high, high_words, mask=mask)
