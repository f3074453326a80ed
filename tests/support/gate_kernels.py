"""Kernels that the compile gates must tell apart: sound ones, and one for every way to fail."""

import triton
import triton.language as tl


@triton.jit
def add_one(x, out, n, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        mask = cols < n
        tl.store(out + cols, tl.load(x + cols, mask=mask, other=0.0).to(tl.float32) + 1.0, mask=mask)


@triton.jit
def less(x, y, out, BLOCK: tl.constexpr):
    """Compares int32, which Ascend's vector unit cannot."""
    cols = tl.arange(0, BLOCK)
    tl.store(out + cols, tl.where(tl.load(x + cols) < tl.load(y + cols), 1.0, 2.0))


@triton.jit
def gather(x, ids, out, BLOCK: tl.constexpr):
    """Loads single elements from anywhere."""
    cols = tl.arange(0, BLOCK)
    tl.store(out + cols, tl.load(x + tl.load(ids + cols)))


@triton.jit
def scatter(x, ids, out, BLOCK: tl.constexpr):
    """Stores single elements to anywhere."""
    cols = tl.arange(0, BLOCK)
    tl.store(out + tl.load(ids + cols), tl.load(x + cols))


@triton.jit
def gather_rows(x, ids, out, BLOCK: tl.constexpr):
    """Loads rows from anywhere: a loop, but of transfers of a whole row."""
    rows = tl.arange(0, 16)
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(out + rows[:, None] * BLOCK + cols, tl.load(x + tl.load(ids + rows)[:, None] * BLOCK + cols))


@triton.jit
def product(a, b, out, BLOCK: tl.constexpr):
    """Uses the cube unit and two blocks of shared memory."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    tl.store(out + rows * BLOCK + cols, tl.dot(tl.load(a + rows * BLOCK + cols), tl.load(b + rows * BLOCK + cols)))


@triton.jit
def misspelt(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)  # noqa: F821
