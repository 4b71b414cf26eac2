"""What tests of kernels share: Triton's interpreter corrected, and the numbers of rounding.py."""

import numpy
import pytest
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from support.rounding import ROUNDING, bits, randn

__all__ = ["ROUNDING", "bfloat16_as_on_a_gpu", "bits", "randn"]


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
