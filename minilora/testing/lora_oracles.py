"""What LoRA and DoRA should give: the equations in float64, with nothing shared with the code under test.

    y = x W^T + b + s dropout(x) A^T B^T         x: (..., in)   W: (out, in)   A: (r, in)   B: (out, r)

(LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1. DoRA: Liu et al. 2024, arXiv:2402.09353, section 4.)
"""

from typing import NamedTuple

import torch
from torch import Tensor


def lora_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """x (W + scaling * B A)^T + b in float64, with the update written out. x: (..., in), A: (r, in),
    B: (out, r) -> (..., out).
    """
    updated = merged_reference(weight, A, B, scaling)  # (out, in)
    y = x.double() @ updated.T
    return y if bias is None else y + bias.double()


def merged_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return W + scaling * B A: (out, in) float64."""
    return weight.double() + scaling * (B.double() @ A.double())


class LoraGradients(NamedTuple):
    """dx: (..., in), dA: (r, in), dB: (out, r); float64."""

    x: Tensor
    A: Tensor
    B: Tensor


def lora_gradients(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, dy: Tensor, factor: Tensor | None = None
) -> LoraGradients:
    """Return the gradients of sum(dy * y), written out. dy: (..., out).

    factor: (..., in), with which dropout multiplied the adapter's input: 0, or 1 / (1 - p). With g = s dy B,

        dx = dy W + (g A) * factor        dA = g^T (x * factor)        dB = s dy^T ((x * factor) A^T)
    """
    x, weight, A, B, dy = (t.double() for t in (x, weight, A, B, dy))
    factor = torch.ones_like(x) if factor is None else factor.double()
    rows, dropped = dy.reshape(-1, dy.shape[-1]), (x * factor).reshape(-1, x.shape[-1])
    g = scaling * (rows @ B)  # (tokens, r)
    dx = dy @ weight + (g @ A).view_as(x) * factor
    return LoraGradients(dx, g.T @ dropped, scaling * rows.T @ (dropped @ A.T))


def dropped_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, keep: Tensor, p: float
) -> Tensor:
    """Return x W^T + scaling (x * keep / (1 - p)) A^T B^T, (..., out) float64. keep: (..., in) bool."""
    dropped = x.double() * keep.double() / (1 - p)
    return x.double() @ weight.double().T + scaling * (dropped @ A.double().T @ B.double().T)


def dora_reference(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    A: Tensor,  # (r, in)
    B: Tensor,  # (out, r)
    magnitude: Tensor,  # (out,)
    scaling: float,
    bias: Tensor | None = None,  # (out,)
) -> Tensor:
    """Return x (m V / ||V||)^T + b with V = W + scaling * B A: (..., out) float64.

    ||V|| is the length of each row, and a constant to the gradient (section 4.3). A row of zeros stays zeros.
    """
    V = merged_reference(weight, A, B, scaling)
    norms = V.detach().square().sum(dim=1).sqrt()  # (out,)
    factor = magnitude.double() / norms.masked_fill(norms == 0, 1)
    y = (x.double() @ V.T) * factor
    return y if bias is None else y + bias.double()


def dora_gradients(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dA, dB and dm of sum(dy * y), written out: (..., in), (r, in), (out, r), (out,); float64.

    With c = m / ||V||:   dx = (c dy) V     dV = (c dy)^T x     dm = sum over tokens of dy * (x V^T) / ||V||
    """
    V = merged_reference(weight, A, B, scaling)
    norms = V.square().sum(dim=1).sqrt()
    norms = norms.masked_fill(norms == 0, 1)
    rows, inputs = dy.double().reshape(-1, dy.shape[-1]), x.double().reshape(-1, x.shape[-1])
    scaled = rows * (magnitude.double() / norms)  # (tokens, out)
    dV = scaled.T @ inputs  # (out, in)
    dm = (rows * (inputs @ V.T) / norms).sum(dim=0)
    return (scaled @ V).view(x.shape), scaling * B.double().T @ dV, scaling * dV @ A.double().T, dm
