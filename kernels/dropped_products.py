"""LoRA's thin products with dropout inside them: the dropped activation is never in memory.

    forward     narrow = dropout(x) A^T          (rows, r)       2 bytes a number of x: it is read once
    backward    dx += dropout(g A)               (rows, in)      4 bytes a number of dx: read and written once
                dA = g^T dropout(x)              (r, in)         2 bytes a number of x

A and g have r columns or rows and are small beside x. For 4096 tokens of width 4096 the three move 34, 67 and
34 MB: 0.013, 0.025 and 0.013 ms at an H100's 2.7 TB/s. With `dropout` and cuBLAS they are 6, 8 and 6 bytes a
number. At r = 16 a number takes part in 32 flop: tensor cores do them in a fraction of the time of the bytes,
other units do not. Before compute capability 8.0 Triton uses no tensor cores, so there these kernels must not
be used; nor in float32, whose products would not be exact.

The draws are the second limit: dropout.py's kernel takes 17 instructions a number, most of them for the bits.
In the time of 2 bytes a number an H100 can issue 21 (docs/kernels.md).

Each walk is cut into tiles that fit into registers, and `kept` draws a tile's mask where the tile is. Sums
are float32, and their order is fixed by the shapes alone. So a second run gives the same bits: dA, whose sum
goes over all rows, is first summed over parts of PART rows, and then the parts are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import VARYING, kept

PART = 1024  # rows that one program sums for dA


@triton.jit
def load_tile(x_ptr, row, column, rows, columns):
    """Return x[row, column], 0 outside. row: (R,), column: (C,) -> (R, C)."""
    element = row.to(tl.int64)[:, None] * columns + column[None, :]  # rows * columns may pass 2^31
    return tl.load(x_ptr + element, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def load_dropped(x_ptr, row, first_group, rows, columns, seed, stream, threshold, GROUPS: tl.constexpr):
    """Return dropout(x) of some rows and 8 * GROUPS columns. A NaN that is dropped is 0 here: the product of
    the frozen layer shows it.
    """
    x = load_tile(x_ptr, row, first_group * 8 + tl.arange(0, 8 * GROUPS), rows, columns)
    keep = kept(row, first_group + tl.arange(0, GROUPS), seed, stream, threshold)
    return tl.where(keep, x, 0.0)


@triton.jit(do_not_specialize=["rows", *VARYING])
def dropped_product_kernel(
    x_ptr,  # (rows, columns)
    a_ptr,  # (r, columns)
    out_ptr,  # (rows, r)
    rows,
    columns,
    r,
    seed,
    stream,
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,  # of 8 columns, read at a time
    RANK: tl.constexpr,  # rows of A that one program takes
):
    """out = dropout(x) A^T of ROWS rows: a walk along the columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for first in range(0, tl.cdiv(columns, 8), GROUPS):
        x = load_dropped(x_ptr, row, first, rows, columns, seed, stream, threshold, GROUPS)
        a = load_tile(a_ptr, rank, first * 8 + tl.arange(0, 8 * GROUPS), r, columns)
        total = tl.dot(x, tl.trans(a), total)
    element = row.to(tl.int64)[:, None] * r + rank[None, :]
    inside = (row < rows)[:, None] & (rank < r)[None, :]
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", *VARYING])
def add_dropped_product_kernel(
    dx_ptr,  # (rows, columns)
    g_ptr,  # (rows, r)
    a_ptr,  # (r, columns)
    rows,
    columns,
    r,
    seed,
    stream,
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
):
    """dx += dropout(g A), one tile of dx: a walk along r, of one step but for the largest ranks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, 8 * GROUPS)
    product = tl.zeros((ROWS, 8 * GROUPS), dtype=tl.float32)
    for first in range(0, r, RANK):
        rank = first + tl.arange(0, RANK)
        product = tl.dot(
            load_tile(g_ptr, row, rank, rows, r), load_tile(a_ptr, rank, column, r, columns), product
        )
    keep = kept(row, group, seed, stream, threshold)
    dx = load_tile(dx_ptr, row, column, rows, columns)
    total = dx.to(tl.float32) + product * keep.to(tl.float32)
    element = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dx_ptr + element, total.to(dx.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", *VARYING])
def product_with_dropped_kernel(
    g_ptr,  # (rows, r)
    x_ptr,  # (rows, columns)
    parts_ptr,  # (parts, r, columns) float32
    rows,
    columns,
    r,
    seed,
    stream,
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
):
    """One part of g^T dropout(x): a walk down PART rows."""
    part = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, 8 * GROUPS), dtype=tl.float32)
    for first in range(part * PART, min((part + 1) * PART, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        g = load_tile(g_ptr, row, rank, rows, r)
        x = load_dropped(x_ptr, row, first_group, rows, columns, seed, stream, threshold, GROUPS)
        total = tl.dot(tl.trans(g), x, total)
    column = first_group * 8 + tl.arange(0, 8 * GROUPS)
    element = (part.to(tl.int64) * r + rank[:, None]) * columns + column[None, :]
    tl.store(parts_ptr + element, total, mask=(rank < r)[:, None] & (column < columns)[None, :])


def dropped_product(x: Tensor, A: Tensor, seed: int, stream: int, threshold: int) -> Tensor:
    """Return dropout(x) A^T, (rows, r). x: (rows, in), A: (r, in), contiguous and of one 16-bit dtype."""
    (rows, columns), r = x.shape, len(A)
    check(x, A)
    out, rank = x.new_empty(rows, r), rank_block(r)
    constants = dict(ROWS=32, GROUPS=16 if rank < 64 else 8, RANK=rank, num_warps=4, num_stages=3)
    with torch.cuda.device_of(x):
        dropped_product_kernel[triton.cdiv(rows, 32), triton.cdiv(r, rank)](
            x, A, out, rows, columns, r, seed, stream, threshold, **constants
        )
    return out


def add_dropped_product(dx: Tensor, g: Tensor, A: Tensor, seed: int, stream: int, threshold: int) -> None:
    """dx += dropout(g A). dx: (rows, in), g: (rows, r), A: (r, in), contiguous and of one 16-bit dtype."""
    (rows, columns), r = dx.shape, len(A)
    check(dx, g, A)
    constants = dict(ROWS=64, GROUPS=8, RANK=min(64, rank_block(r)), num_warps=4, num_stages=2)
    with torch.cuda.device_of(dx):
        add_dropped_product_kernel[triton.cdiv(rows, 64), triton.cdiv(columns, 64)](
            dx, g, A, rows, columns, r, seed, stream, threshold, **constants
        )


def product_with_dropped(g: Tensor, x: Tensor, seed: int, stream: int, threshold: int) -> Tensor:
    """Return g^T dropout(x), (r, in) float32. g: (rows, r), x: (rows, in), as in the others."""
    (rows, columns), r = x.shape, g.shape[1]
    check(g, x)
    rank = rank_block(r)
    parts = torch.empty(triton.cdiv(rows, PART), r, columns, dtype=torch.float32, device=x.device)
    constants = dict(ROWS=64, GROUPS=8, RANK=rank, PART=PART, num_warps=4, num_stages=3)
    with torch.cuda.device_of(x):
        product_with_dropped_kernel[len(parts), triton.cdiv(columns, 64), triton.cdiv(r, rank)](
            g, x, parts, rows, columns, r, seed, stream, threshold, **constants
        )
    return parts[0] if len(parts) == 1 else parts.sum(0)


def rank_block(r: int) -> int:
    """Return how many of the r a program takes: tensor cores want 16, registers hold 128."""
    return min(128, max(16, triton.next_power_of_2(r)))


def check(*matrices: Tensor) -> None:
    """Assert what the products take for granted."""
    assert all(matrix.is_contiguous() and matrix.element_size() == 2 for matrix in matrices)
