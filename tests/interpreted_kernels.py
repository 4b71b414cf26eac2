"""Every Triton kernel against its PyTorch definition, run by Triton's interpreter on the CPU.

Collected by test_kernels.py in a process of its own, because TRITON_INTERPRET must be set before Triton is first imported.
"""

import os

import pytest
import torch

from minilora import ops
from minilora.kernels.rms_norm import rms_norm

assert os.environ["TRITON_INTERPRET"] == "1" and os.environ["MINILORA_BACKEND"] == "torch"  # or ops would call the kernels too

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # of one rounding, relative: half of eps


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3, 64), (5, 100), (2, 1000), (3, 4097)])  # powers of two, and one past one
def test_rms_norm_and_its_gradient_equal_the_definition(shape, dtype):
    x = (3 * randn(*shape, dtype=dtype, seed=1)).requires_grad_()
    weight, dy = randn(shape[-1], dtype=dtype, seed=2), randn(*shape, dtype=dtype, seed=3)
    y = rms_norm(x, weight, 1e-5)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = ops.rms_norm(x, weight, 1e-5)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    u = ROUNDING[dtype]
    # Forward: two roundings in each, in the same places. Triton's interpreter truncates to bfloat16 where a GPU rounds, 2 u each
    # instead of u, so the two sides differ by at most 6 u, and by the order of a float32 sum.
    assert y.dtype == dtype and (y - expected).abs().max() <= (6 * u + 2**-22) * expected.abs().max()
    # Backward: the definition rounds its intermediates to the dtype, the kernel keeps them in float32 and rounds once. The gradient
    # is a difference, zero for D = 1: the error is relative to what is subtracted, w dy / rms(x).
    terms = (weight * dy).float() * torch.rsqrt(x.detach().float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert (dx - expected_dx).abs().max() <= (6 * u + 2**-20) * terms.abs().max()
