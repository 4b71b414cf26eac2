"""Numbers of each dtype, and how it rounds."""

import torch

ROUNDING = {
    torch.float32: 2**-24,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}  # of one rounding, relative: half of eps


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats, so that equality tells -0 from 0 and holds for NaN."""
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])
