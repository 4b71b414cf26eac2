"""RMSNorm with the sum before it: forward, and the gradient of its input, each in one pass.

    forward     h = x + y        inverse = 1 / sqrt(mean(h^2) + eps)        n = weight * (h * inverse)
    backward    g = weight * dn,   m = h * inverse                  dx = dh + inverse * (g - m * mean(m * g))

Bytes a number in 16 bits. Forward: 8 (x and y are read, h and n are written), or 4 without y, because then h
is x. Backward: 8 (h, dn and dh are read, dx is written), or 6 without dh. For 4096 tokens of width 4096, 8
bytes a number are 134 MB: 0.56 ms at a T4's 240 GB/s, 0.05 ms at an H100's 2.7 TB/s. The definition is eight
operations forward and eleven backward, and each moves its numbers, many in float32.

A row lives in the registers of one program from its first load to its last store, so the mean costs no second
read. Rows as short as the heads that Qwen3 normalizes share a program.

Statistics are float32. The normed value is rounded to the activations' dtype before the weight is applied, as
in the definition (`minilora.ops`). What the weight's own gradient needs is not computed here: under LoRA it
is frozen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # numbers of a program whose rows are shorter


@triton.jit
def place(rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's rows, (ROWS,), where their elements are, and which exist: (ROWS, BLOCK)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows * D may pass 2^31
    column = tl.arange(0, BLOCK)[None, :]
    return row, row[:, None] * D + column, (row < rows)[:, None] & (column < D)


@triton.jit
def load_weight(weight_ptr, D, BLOCK: tl.constexpr):
    """Return the weight in float32, (1, BLOCK)."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    x_ptr,  # (rows, D)
    y_ptr,  # (rows, D), or None
    weight_ptr,  # (D,)
    h_ptr,  # (rows, D), or None where y is
    n_ptr,  # (rows, D)
    inverse_ptr,  # (rows,) float32
    rows,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two >= D
):
    """h = x + y and n = weight * h / rms(h), of ROWS rows."""
    row, element, inside = place(rows, D, ROWS, BLOCK)
    h = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        h += tl.load(y_ptr + element, mask=inside, other=0.0).to(tl.float32)
        h = h.to(x_ptr.dtype.element_ty)
        tl.store(h_ptr + element, h, mask=inside)
        h = h.to(tl.float32)  # the statistics are those of the rounded sum
    inverse = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / D + eps)  # (ROWS,)
    normed = (h * inverse[:, None]).to(n_ptr.dtype.element_ty)  # rounded, as in the definition
    n = load_weight(weight_ptr, D, BLOCK) * normed.to(tl.float32)
    tl.store(n_ptr + element, n.to(n_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def add_norm_backward_kernel(
    h_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    inverse_ptr,  # (rows,) float32
    dn_ptr,  # (rows, D)
    dh_ptr,  # (rows, D), or None
    dx_ptr,  # (rows, D)
    rows,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of ROWS rows."""
    row, element, inside = place(rows, D, ROWS, BLOCK)
    weight = load_weight(weight_ptr, D, BLOCK)
    h = tl.load(h_ptr + element, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
    g = tl.load(dn_ptr + element, mask=inside, other=0.0).to(tl.float32) * weight
    mean = tl.sum(h * g, axis=1)[:, None] / D  # of m g, but for the factor inverse
    dx = inverse * (g - h * inverse * (mean * inverse))
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + element, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return h = x + y, its norm, and 1 / rms(h): (rows, D) twice, and (rows,) float32. Without y, h is x."""
    rows, D = x.shape
    h, n = x if y is None else torch.empty_like(x), torch.empty_like(x)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    grid, options = launch_of(x)
    with torch.cuda.device_of(x):
        written = None if y is None else h
        add_norm_kernel[grid](x, y, weight, written, n, inverse, rows, D, eps, **options)
    return h, n, inverse


def add_norm_backward(h: Tensor, weight: Tensor, inverse: Tensor, dn: Tensor, dh: Tensor | None) -> Tensor:
    """Return the gradient of x, which is y's too: (rows, D). `dh` is the gradient of h from elsewhere."""
    rows, D = h.shape
    dx = torch.empty_like(h)
    grid, options = launch_of(h)
    with torch.cuda.device_of(h):
        add_norm_backward_kernel[grid](h, weight, inverse, dn, dh, dx, rows, D, **options)
    return dx


def launch_of(x: Tensor) -> tuple[tuple[int], dict]:
    """Return the grid, and enough warps that a thread holds 32 bytes of a row: nothing spills."""
    rows, D = x.shape
    block = triton.next_power_of_2(D)
    together = max(1, TILE // block)
    warps = together * block * x.element_size() // (32 * 32)
    return (triton.cdiv(rows, together),), dict(ROWS=together, BLOCK=block, num_warps=max(1, min(32, warps)))
