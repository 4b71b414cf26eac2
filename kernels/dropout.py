"""Dropout that stores no mask: Philox draws the bits in registers, wherever they are needed.

    x' = x where 16 random bits >= threshold, else 0            x += the same of y, which is the backward

Bytes a number in 16 bits: 4 (x is read, x' written), or 6 for the sum (x and y are read, x written). For 4096
tokens of width 4096 that is 67 and 101 MB: 0.28 and 0.42 ms at a T4's 240 GB/s, 0.025 and 0.037 ms at an
H100's 2.7 TB/s. A stored mask moves a byte a number twice more, and lives until backward.

A counter of Philox-4x32-10 gives 128 bits, 16 for each of 8 neighbours (`minilora.backend.dropout` says
which). They are drawn by the thread that holds these 8 numbers: `tl.join` and `tl.reshape` only name the
registers anew. With loading, choosing and storing, ten rounds compile to 17 instructions a number: an
H100 issues these in under half the time of the bytes.

`kept` is also what the products of dropped_products.py draw with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS, WARPS = 256, 4  # groups of 8 columns: two a thread
VARYING = ["seed", "stream", "threshold"]  # Triton must not compile anew for a seed that 16 divides


@triton.jit
def kept(row, group, seed, stream, threshold):
    """Return which elements stay. row: (rows,) and group: (groups,) int32 -> (rows, groups * 8) bool."""
    row, group = tl.broadcast(row[:, None], group[None, :])  # (rows, groups)
    zero = tl.zeros_like(row)
    w0, w1, w2, w3 = tl.philox(seed, group, row, zero + stream, zero)  # 10 rounds
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (rows, groups, 2, 2): [i, j] is word 2 i + j
    halves = tl.join(words & 0xFFFF, words >> 16)  # the lower half first
    return tl.reshape(halves, (row.shape[0], 8 * row.shape[1])) >= threshold


@triton.jit(do_not_specialize=VARYING)
def dropout_kernel(
    x_ptr,  # (rows, columns)
    out_ptr,  # (rows, columns)
    columns,
    seed,
    stream,
    threshold,
    GROUPS: tl.constexpr,
):
    """out = dropout(x), 8 * GROUPS columns of one row."""
    row = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    keep = kept(row + tl.arange(0, 1), group, seed, stream, threshold)  # (1, 8 * GROUPS)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, 8 * GROUPS)[None, :]
    element = row.to(tl.int64) * columns + column  # may pass 2^31
    x = tl.load(x_ptr + element, mask=column < columns, other=0.0)
    dropped = x.to(tl.float32) * keep.to(tl.float32)  # exact, and a NaN that is dropped is still seen
    tl.store(out_ptr + element, dropped.to(x.dtype), mask=column < columns)


@triton.jit(do_not_specialize=VARYING)
def add_dropped_kernel(
    x_ptr,  # (rows, columns)
    y_ptr,  # (rows, columns)
    columns,
    seed,
    stream,
    threshold,
    GROUPS: tl.constexpr,
):
    """x += dropout(y), 8 * GROUPS columns of one row."""
    row = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    keep = kept(row + tl.arange(0, 1), group, seed, stream, threshold)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, 8 * GROUPS)[None, :]
    element = row.to(tl.int64) * columns + column
    x = tl.load(x_ptr + element, mask=column < columns, other=0.0)
    y = tl.load(y_ptr + element, mask=column < columns, other=0.0)
    total = x.to(tl.float32) + y.to(tl.float32) * keep.to(tl.float32)
    tl.store(x_ptr + element, total.to(x.dtype), mask=column < columns)


def dropout(x: Tensor, seed: int, stream: int, threshold: int, out: Tensor | None = None) -> Tensor:
    """Return x where it is kept, else 0; in `out` if it is given. x, out: (rows, columns), contiguous."""
    out = torch.empty_like(x) if out is None else out
    rows, columns = x.shape
    with torch.cuda.device_of(x):
        grid = (rows, triton.cdiv(columns, 8 * GROUPS))
        dropout_kernel[grid](x, out, columns, seed, stream, threshold, GROUPS=GROUPS, num_warps=WARPS)
    return out


def add_dropped(x: Tensor, y: Tensor, seed: int, stream: int, threshold: int) -> None:
    """x += dropout(y). x, y: (rows, columns), contiguous."""
    rows, columns = x.shape
    with torch.cuda.device_of(x):
        grid = (rows, triton.cdiv(columns, 8 * GROUPS))
        add_dropped_kernel[grid](x, y, columns, seed, stream, threshold, GROUPS=GROUPS, num_warps=WARPS)
