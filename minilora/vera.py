"""VeRA: two small vectors a layer are trained beside random matrices that all layers share (Kopiczko et al.
2023, arXiv:2310.11454, section 3).

    y = x W^T + b  +  dropout(x) A'^T B'^T      A' = diag(lambda_d) A[:, :in]     B' = diag(lambda_b) B[:out]

A: (r, widest in) and B: (widest out, r) are drawn once and frozen. lambda_d: (r,) starts at 0.1 everywhere,
lambda_b: (out,) at 0. So the adapted model starts as the base model, like LoRA's. Training moves r + out
numbers a layer. A file needs neither A nor B, only the seed they were drawn from.

It is LoRA with scaling 1 and the factors A' and B'. The layer computes LoRA's products; autograd takes their
gradients dA', dB' on to the vectors:

    d lambda_d = rowsum(dA' * A[:, :in])                  d lambda_b = rowsum(dB' * B[:out])

r is larger than LoRA's, such as 256, since a random direction is worth less than a learned one. A' and B' are
r (in + out) float32 numbers a layer while a step runs.
"""

import math

import torch
from torch import Tensor

_HERE = dict(dtype=torch.float32, device="cpu")  # where PEFT draws, so that a seed means the same everywhere


def shared_projections(r: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), float32, bit-identical to PEFT's for the same `projection_prng_key`.

    in_features, out_features: the largest of all adapted layers. Kaiming's uniform distribution for ReLU:
    U(-sqrt(6 / in), sqrt(6 / in)) for A, with r in place of `in` for B.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    A = _kaiming_uniform(r, in_features, generator)
    return A, _kaiming_uniform(out_features, r, generator)


def _kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))  # in PEFT's order of roundings
    return torch.empty(rows, columns, **_HERE).uniform_(-bound, bound, generator=generator)


def initial_vectors(r: int, out_features: int, d_initial: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return lambda_d (r,) and lambda_b (out,) as they start, float32."""
    return torch.full((r,), d_initial, **_HERE), torch.zeros(out_features, **_HERE)


def factors(
    lambda_d: Tensor,  # (r,)
    lambda_b: Tensor,  # (out,)
    A: Tensor,  # (r, widest in)
    B: Tensor,  # (widest out, r)
    in_features: int,
) -> tuple[Tensor, Tensor]:
    """Return LoRA's factors A' (r, in) and B' (out, r) of one layer. Gradients reach both vectors."""
    return lambda_d.unsqueeze(1) * A[:, :in_features], lambda_b.unsqueeze(1) * B[: len(lambda_b)]
