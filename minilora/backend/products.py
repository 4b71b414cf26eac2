"""The two products with a frozen weight, whole or in 4 or 8 bits, and a low-rank update in the same pass.

    forward     y  = x W^T + b + n B^T          n: (rows, r), B: (out, r)
    backward    dx = dx + dy W + g A            g: (rows, r), A: (r, in)

A quantized weight is dequantized into one scratch buffer, which all layers share. The update goes into the
product's own output: `addmm_` adds while it writes, where a separate sum would read and write the output once
more. On a CPU with AMX W is never whole, and the update is r more columns of it (see amx.c).

The products are taken in `product_dtype`, not in the dtype that was quantized.
"""

import torch
from torch import Tensor

from minilora.backend import native
from minilora.backend.choice import form_for, product_dtype
from minilora.backend.scratch import scratch


def dequantized(weight, like: Tensor) -> Tensor:
    """Return W in the dtype of `like`, (out, in); a quantized weight is written to the scratch buffer."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    return weight.dequantize(out=scratch(tuple(weight.shape), like.dtype, like.device))


def widened(x: Tensor, weight) -> Tensor:
    """Return x in its product's dtype. A plain weight keeps its own, to agree with nn.Linear's bits."""
    return x if isinstance(weight, Tensor) else x.to(product_dtype(x))


def multiply(
    x: Tensor,  # (rows, in)
    weight,  # (out, in)
    out: Tensor,  # (rows, out)
    bias: Tensor | None = None,
    update: tuple[Tensor, Tensor] | None = None,  # n (rows, r) and B (out, r)
) -> None:
    """Fill `out` with x W^T + bias + n B^T."""
    rows = widened(x, weight)
    y = out if out.dtype == rows.dtype else out.new_empty(out.shape, dtype=rows.dtype)
    if multiplies_packed(weight, rows):
        native.matmul(weight, rows.contiguous(), y, None if bias is None else bias.float(), update)
    else:
        W = dequantized(weight, rows).T
        torch.mm(rows, W, out=y) if bias is None else torch.addmm(bias.to(rows.dtype), rows, W, out=y)
        if update is not None:
            y.addmm_(update[0], update[1].T)
    if y is not out:
        out.copy_(y)


def multiply_back(
    dy: Tensor, weight, dx: Tensor | None = None, update: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return dy W + g A in the product's dtype, added to dx in place if there is one.

    dy: (rows, out), weight: (out, in), update: g and A -> (rows, in).
    """
    rows = widened(dy, weight)
    if multiplies_packed(weight, rows):
        add = dx is not None
        dx = dx if add else torch.empty(len(rows), weight.shape[1], dtype=rows.dtype, device=rows.device)
        native.matmul(weight, rows.contiguous(), dx, update=update, backward=True, add=add)
        return dx
    W = dequantized(weight, rows)
    dx = torch.mm(rows, W) if dx is None else dx.addmm_(rows, W)
    return dx if update is None else dx.addmm_(*update)


def multiplies_packed(weight, rows: Tensor) -> bool:
    """Whether a C kernel takes the weight as it is stored: it dequantizes it in the cache, chunk by chunk."""
    is_four_bit = hasattr(weight, "packed")
    return is_four_bit and form_for(rows, "matmul") == "c" and native.multiplies(weight.shape)
