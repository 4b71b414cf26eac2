"""A token of decoding: one vector through frozen layers and their adapters, without a gradient.

    y_i = W_i x + b_i + B_i n_i        n_i = s A_i x        x: (in,), W: (out, in), A: (r, in), B: (out, r)

A token reads every weight once and does little else. So its floor is the bytes of the weights at the rate of
memory, and all that is spared is beside them. Where a 4-bit weight has a matrix-vector product (gemv.c,
kernels/nf4.py), W stays packed, and b and B n are added while y is written. A and B are read as they are, in
float32: to cast them for each token would read and write all of both. Only x is cast, once for all layers
that share it.

Elsewhere W is multiplied as in products.py, and B n is added behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.backend import native
from minilora.backend.choice import form_for
from minilora.backend.fused_lora import Adapter, Part
from minilora.backend.products import multiply


def decode(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the outputs of layers that drop nothing, (..., out) each. x: (..., in), one row."""
    vector = x.reshape(-1).contiguous()  # (in,)
    wide = vector.float() if any(part.adapter for part in parts) else None
    outputs = []
    for weight, bias, adapter in parts:
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        multiply_vector(vector, weight, y.view(-1), bias, adapter and update_of(wide, adapter))
        outputs.append(y)
    return outputs


def update_of(x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return n = s A x, (r,), and B, (out, r), in float32. x: (in,) float32."""
    n = x.new_empty(len(adapter.A))
    torch.addmv(n, adapter.A.float(), x, beta=0, alpha=adapter.scaling, out=n)
    return n, adapter.B.float()


def multiply_vector(
    x: Tensor,  # (in,) contiguous
    weight,  # (out, in): a tensor or a quantized one
    out: Tensor,  # (out,)
    bias: Tensor | None = None,
    update: tuple[Tensor, Tensor] | None = None,  # n (r,) and B (out, r), float32
) -> None:
    """Fill `out` with W x + bias + B n."""
    match vector_form(weight, x):
        case "triton":
            from minilora.kernels import nf4

            nf4.gemv(weight, x, out, bias, update)
        case "c":
            native.gemv(weight, x, out, None if bias is None else bias.float(), update)
        case _:
            multiply(x.unsqueeze(0), weight, out.unsqueeze(0), bias)
            if update is not None:
                out += torch.mv(update[1], update[0])


def vector_form(weight, x: Tensor) -> str:
    """Return the form in which a weight meets one vector: 'triton' and 'c' read it as it is packed."""
    form = form_for(x, "gemv") if hasattr(weight, "packed") else "torch"
    return "torch" if form == "c" and not native.takes_vector(weight.shape) else form
