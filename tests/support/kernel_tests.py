"""What tests of kernels share: numbers, and Triton's interpreter corrected."""

import numpy
import pytest
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

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


@pytest.fixture
def bfloat16_as_on_a_gpu(monkeypatch):
    """Triton's interpreter truncates to bfloat16, where a GPU rounds to the nearest, and multiplies the bits
    of bfloat16 matrices as if they were whole numbers.
    """
    convert, dot = interpreter._convert_float, InterpreterBuilder.create_dot

    def as_float32(bits: numpy.ndarray) -> numpy.ndarray:
        return (bits.astype(numpy.uint32) << 16).view(numpy.float32)

    def convert_float(x, before, after, rounding):
        if before == triton.language.bfloat16:
            return as_float32(x)
        if after == triton.language.bfloat16:
            rounded = torch.from_numpy(numpy.array(x, dtype=numpy.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(numpy.uint16)
        return convert(x, before, after, rounding)

    def create_dot(self, a, b, *rest):
        if a.dtype == triton.language.bfloat16:
            a, b = (TensorHandle(as_float32(t.data), triton.language.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
