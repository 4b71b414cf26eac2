"""AdamW in float64, as its paper writes it (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_reference(
    parameter: Tensor,
    gradients: Sequence[Tensor],  # one a step, of the parameter's shape
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """Return the parameter after a step for each gradient, float64, in the parameter's shape.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    p <- p - lr weight_decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    p = parameter.detach().double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        mean, square = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * weight_decay * p - lr * mean / (square.sqrt() + eps)
    return p
