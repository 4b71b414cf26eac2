"""Many adapters in one launch: the two passes of the segmented gather product (backend/segmented.py).

    shrink    n_i = s_a x_i F_a^T      x: (rows, width)    n: (rows, R)      F_a: (r_a, width)
    expand    y_i += n_i F_a^T         y: (rows, width)    n: (rows, R)      F_a: (width, r_a)

Bytes: each factor that a row needs is read, r * width numbers, and x once, or y twice. In decoding the
factors are nearly all of it. 16 rows with 16 adapters of rank 16 read 4.2 MB of A for width 4096, in float32
as they are stored: 1.6 us at an H100's 2.7 TB/s. A product for each adapter would be 16 launches. In a long
prompt x and y are nearly all: 2 and 4 bytes a number in 16 bits.

Why two kernels? A program that computed n and then y would need a whole row of x before the first number of
y. So a row would be one program's, on one of a hundred multiprocessors. Two launches spread each row over
many programs, shrink by ranks and expand by columns. No sum is split, so its order is fixed by the shapes.

A and B of all adapters stay where they are. A table has a row for each: its address, its two strides, its
rank and its scaling. A second table says which rows of n a program takes, and whose they are. Adapters may
have any ranks. Rows without an adapter are in no program.

Each pass has two shapes. With few rows a segment, a program takes one row and multiplies in float32. With 16
rows or more it takes a tile of 32, and tensor cores multiply in 16 bits. Before compute capability 8.0 Triton
uses no tensor cores, and in float32 they would not be exact: there cuBLAS takes one segment after the other.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

Factors = Sequence[Tensor | None]  # of each segment
ROWS = 32  # of one segment in a tile
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def read_tables(tiles_ptr, factors_ptr, FLOAT: tl.constexpr, ALONG: tl.constexpr, ALIGNED: tl.constexpr):
    """Return this program's first row and the end of its rows, and of its factor: the address, the strides
    along ranks and along the width, the rank and the scaling.
    """
    tile = tiles_ptr + tl.program_id(0) * 3
    row = factors_ptr + tl.load(tile) * 5
    factor_ptr = tl.load(row).to(tl.pointer_type(FLOAT))
    per_rank, per_column, r = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    scaling = tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
    if ALIGNED:  # then loads are of 16 bytes
        numbers: tl.constexpr = 128 // FLOAT.primitive_bitwidth
        factor_ptr = tl.multiple_of(factor_ptr, 16)
        per_rank, per_column = tl.multiple_of(per_rank, numbers), tl.multiple_of(per_column, numbers)
        if ALONG == "ranks":
            r = tl.multiple_of(r, numbers)
    return tl.load(tile + 1), tl.load(tile + 2), factor_ptr, per_rank, per_column, r, scaling


@triton.jit
def load_factor(factor_ptr, per_rank, per_column, rank, column, r, width, ALONG: tl.constexpr):
    """Return F at some ranks and columns, two blocks of which one lies across the other; 0 outside."""
    if ALONG == "ranks":
        at = rank + column * per_column
    elif ALONG == "columns":
        at = rank * per_rank + column
    else:
        at = rank * per_rank + column * per_column
    return tl.load(factor_ptr + at, mask=(rank < r) & (column < width), other=0.0)


@triton.jit
def row_of(order_ptr, place, end):
    """Return which row of x or y each place in the order of segments is."""
    if order_ptr is not None:
        return tl.load(order_ptr + place, mask=place < end, other=0)
    else:
        return place


@triton.jit(do_not_specialize=["R"])
def shrink_rows_kernel(
    x_ptr,  # (rows, width)
    order_ptr,  # (rows,) int64, or None
    tiles_ptr,  # (programs, 3) int64: a factor, the first row and the end
    factors_ptr,  # (factors, 5) int64: address, strides along ranks and columns, rank, scaling
    n_ptr,  # (rows, R)
    width,
    R,
    FLOAT: tl.constexpr,  # of the factors
    ALONG: tl.constexpr,  # what lies side by side in a factor: ranks, columns, or neither
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RANK numbers of one row of n: a walk along x."""
    place, end, factor_ptr, per_rank, per_column, r, scaling = read_tables(
        tiles_ptr, factors_ptr, FLOAT, ALONG, ALIGNED
    )
    if tl.program_id(1) * RANK >= r:
        return
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    x_ptr += row_of(order_ptr, place, end) * width
    total = tl.zeros((RANK, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        factor = load_factor(
            factor_ptr, per_rank, per_column, rank[:, None], column[None, :], r, width, ALONG
        )
        total += factor.to(tl.float32) * x[None, :]
    n = tl.sum(total, axis=1) * scaling
    tl.store(n_ptr + place * R + rank, n.to(n_ptr.dtype.element_ty), mask=rank < r)


@triton.jit(do_not_specialize=["R"])
def expand_rows_kernel(
    y_ptr,  # (rows, width)
    order_ptr,  # as in shrink_rows_kernel, and so on
    tiles_ptr,
    factors_ptr,
    n_ptr,  # (rows, R)
    width,
    R,
    FLOAT: tl.constexpr,
    ALONG: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one row of y: a walk along n, of one step for ranks up to RANK."""
    place, end, factor_ptr, per_rank, per_column, r, _ = read_tables(
        tiles_ptr, factors_ptr, FLOAT, ALONG, ALIGNED
    )
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, r, RANK):
        rank = first + tl.arange(0, RANK)
        n = tl.load(n_ptr + place * R + rank, mask=rank < r, other=0.0).to(tl.float32)
        factor = load_factor(
            factor_ptr, per_rank, per_column, rank[None, :], column[:, None], r, width, ALONG
        )
        total += tl.sum(factor.to(tl.float32) * n[None, :], axis=1)
    y_ptr += row_of(order_ptr, place, end) * width
    y = tl.load(y_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + column, (y + total).to(y_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["R"])
def shrink_tiles_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
    factors_ptr,
    n_ptr,
    width,
    R,
    FLOAT: tl.constexpr,
    ALONG: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """RANK numbers of ROWS rows of n."""
    start, end, factor_ptr, per_rank, per_column, r, scaling = read_tables(
        tiles_ptr, factors_ptr, FLOAT, ALONG, ALIGNED
    )
    if tl.program_id(1) * RANK >= r:
        return
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    place = start + tl.arange(0, ROWS)
    inside = (place < end)[:, None]
    x_ptr += (row_of(order_ptr, place, end) * width)[:, None]
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column[None, :], mask=inside & (column < width)[None, :], other=0.0)
        factor = load_factor(
            factor_ptr, per_rank, per_column, rank[None, :], column[:, None], r, width, ALONG
        )
        total = tl.dot(x, factor.to(x.dtype), total)
    n = (total * scaling).to(n_ptr.dtype.element_ty)
    tl.store(n_ptr + place[:, None] * R + rank[None, :], n, mask=inside & (rank < r)[None, :])


@triton.jit(do_not_specialize=["R"])
def expand_tiles_kernel(
    y_ptr,
    order_ptr,
    tiles_ptr,
    factors_ptr,
    n_ptr,
    width,
    R,
    FLOAT: tl.constexpr,
    ALONG: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """BLOCK numbers of ROWS rows of y."""
    start, end, factor_ptr, per_rank, per_column, r, _ = read_tables(
        tiles_ptr, factors_ptr, FLOAT, ALONG, ALIGNED
    )
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = start + tl.arange(0, ROWS)
    inside = (place < end)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, r, RANK):
        rank = first + tl.arange(0, RANK)
        n = tl.load(n_ptr + place[:, None] * R + rank[None, :], mask=inside & (rank < r)[None, :], other=0.0)
        factor = load_factor(
            factor_ptr, per_rank, per_column, rank[:, None], column[None, :], r, width, ALONG
        )
        total = tl.dot(n, factor.to(n.dtype), total)
    y_ptr += (row_of(order_ptr, place, end) * width)[:, None] + column[None, :]
    inside &= (column < width)[None, :]
    y = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)


# ---- launches. segments: those of minilora/backend/segments.py, which keep the tables ----------------------


def shrink(x: Tensor, factors: Factors, scalings: Sequence[float], segments) -> Tensor:
    """Return n, (rows, R), in x's dtype. x: (rows, width), in any order; a factor: (r, width), or None.

    Factors are of one dtype, with any strides. R is the largest rank. Undefined are columns from a factor's r
    on, and rows without one. Raises NoTable if a graph is being recorded and these factors are new.
    """
    x, n = x.contiguous(), x.new_empty(len(x), max(len(F) for F in factors if F is not None))
    tiled, R = takes_tiles(x, segments), n.shape[1]
    rank = min(64, max(16, triton.next_power_of_2(R))) if tiled else 4
    tables, constants = tables_of(factors, scalings, segments, tiled, x.device)
    constants |= dict(RANK=rank, BLOCK=(128 if rank < 64 else 64) if tiled else 1024)
    operands = x, segments.order, *tables, n, x.shape[1], R
    grid = len(tables[0]), triton.cdiv(R, rank)
    with torch.cuda.device_of(x):
        if not len(tables[0]):
            return n
        if tiled:
            shrink_tiles_kernel[grid](*operands, **constants, ROWS=ROWS, num_warps=4, num_stages=3)
        else:
            shrink_rows_kernel[grid](*operands, **constants, num_warps=4)
    return n


def expand(y: Tensor, n: Tensor, factors: Factors, segments) -> None:
    """y_i += n_i F^T, in place. y: (rows, width) contiguous, in any order; a factor: (width, r), or None."""
    assert y.is_contiguous() and n.is_contiguous()
    tiled, (width, R) = takes_tiles(n, segments), (y.shape[1], n.shape[1])
    across = [None if F is None else F.T for F in factors]
    tables, constants = tables_of(across, [0.0] * len(factors), segments, tiled, y.device)
    rank = min(64, max(16, triton.next_power_of_2(R))) if tiled else 16
    constants |= dict(RANK=rank, BLOCK=64 if tiled else 128)
    operands = y, segments.order, *tables, n, width, R
    grid = len(tables[0]), triton.cdiv(width, constants["BLOCK"])
    with torch.cuda.device_of(y):
        if not len(tables[0]):
            return
        if tiled:
            expand_tiles_kernel[grid](*operands, **constants, ROWS=ROWS, num_warps=4, num_stages=2)
        else:
            expand_rows_kernel[grid](*operands, **constants, num_warps=4)


def takes_tiles(x: Tensor, segments) -> bool:
    """Whether programs take tiles of rows: in 16 bits, where segments are long and tensor cores are there."""
    if x.element_size() != 2 or not segments.are_long:
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def tables_of(
    factors: Factors, scalings: Sequence[float], segments, tiled: bool, device: torch.device
) -> tuple[tuple[Tensor, Tensor], dict]:
    """Return the tables of tiles and of factors, (r, width) each, and what a kernel is compiled for."""
    rows, there = [], [F for F in factors if F is not None]
    for F, scaling in zip(factors, scalings, strict=True):
        if F is not None:
            per_rank, per_column = F.stride()
            bits = struct.unpack("i", struct.pack("f", scaling))[0]
            rows.append((F.data_ptr(), 0 if len(F) == 1 else per_rank, per_column, len(F), bits))
    numbers = 16 // there[0].element_size()  # of a load
    if all(row[2] == 1 for row in rows):
        along, sizes = "columns", [row[1] for row in rows]
    elif all(row[1] in (0, 1) for row in rows):
        along, sizes = "ranks", [size for row in rows for size in row[2:4]]
    else:
        along, sizes = "", [1]
    aligned = all(row[0] % 16 == 0 for row in rows) and all(size % numbers == 0 for size in sizes)
    given = tuple(F is not None for F in factors)
    tiles = segments.table(tiles_of, (segments.bounds, given, ROWS if tiled else 1), device)
    constants = dict(FLOAT=FLOATS[there[0].dtype], ALONG=along, ALIGNED=aligned)
    return (tiles, segments.table(list, (tuple(rows),), device)), constants


def tiles_of(bounds: tuple[int, ...], given: tuple[bool, ...], size: int) -> list[tuple[int, int, int]]:
    """Return for each program a factor, its first row and the end of its rows, at most `size` of them."""
    tiles, factor = [], 0
    for start, end, is_given in zip(bounds, bounds[1:], given, strict=False):
        if is_given:
            tiles += [(factor, row, min(row + size, end)) for row in range(start, end, size)]
            factor += 1
    return tiles
