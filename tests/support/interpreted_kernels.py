"""The kernels of weights and of the optimizer against their definitions, run by Triton's interpreter.

Collected by test_kernels.py in a process of its own, because TRITON_INTERPRET must be set before Triton is
first imported.
"""

import os
from dataclasses import replace

import numpy
import pytest
import torch
from minilora.kernels.adamw_8bit import adamw_8bit as adamw_8bit_kernel
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from minilora import optim
from minilora.backend import triton_trial
from minilora.kernels import nf4
from minilora.quantization import (
    QuantizedTensor,
    dynamic_code,
    four_bit_code,
    nearest_code_bounds,
    nearest_of_steps,
    quantize_4bit,
)
from support.kernel_tests import ROUNDING, bfloat16_as_on_a_gpu, bits, randn

assert (
    os.environ["TRITON_INTERPRET"] == "1" and os.environ["MINILORA_BACKEND"] == "torch"
)  # or ops would call the kernels too
__all__ = ["bfloat16_as_on_a_gpu"]
pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("n", "blocksize"), [(1, 64), (63, 32), (64, 64), (5001, 64), (4200, 128), (8193, 4096)]
)
def test_4bit_quantization_is_the_definition_to_the_bit(n, blocksize, quant_type, dtype):
    bounds, symbols = nearest_code_bounds(four_bit_code(quant_type))
    x = randn(n, dtype=dtype, seed=n)
    if n > 300:
        near = torch.cat([bounds, bounds.nextafter(bounds - 1), bounds.nextafter(bounds + 1)])  # 45 values
        x[:64] = torch.cat([near, torch.ones(19)]).to(
            dtype
        )  # the block's magnitude is 1: float32 bounds are ties
        tail = n % blocksize
        tiny = 1e-39 if dtype != torch.float16 else 0.0  # less than is divided by
        x[128:256] = tiny
        x[-tail:] = (
            torch.cat([near, torch.ones(tail - 45)]).to(dtype) * 1.7 if tail > 45 else tiny
        )  # / 1.7 is not * (1 / 1.7)
    packed, absmax = (
        torch.full(((n + 1) // 2 + 1,), 99, dtype=torch.uint8),
        torch.full((-(-n // blocksize) + 1,), 99.0),
    )
    nf4.quantize(x, bounds, symbols, blocksize, packed[:-1], absmax[:-1])
    assert packed[-1] == 99 and absmax[-1] == 99  # nothing is written behind the end
    expected = quantize_4bit(x, quant_type, blocksize, double_quant=False)
    assert torch.equal(packed[:-1], expected.packed)
    assert torch.equal(bits(absmax[:-1]), bits(expected.absmax))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity times zero
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_4bit_quantization_shows_values_that_are_not_finite_in_the_scale(bad):
    x = torch.ones(150)
    x[[70, 149]] = bad  # in a whole block and in the last
    bounds, symbols = nearest_code_bounds(four_bit_code("nf4"))
    packed, absmax = torch.empty(75, dtype=torch.uint8), torch.empty(3)
    nf4.quantize(x, bounds, symbols, 64, packed, absmax)
    assert absmax[0] == 1 and not absmax[1:].isfinite().any()


def quantized(shape: tuple[int, ...], quant_type: str, blocksize: int, double_quant: bool) -> QuantizedTensor:
    """A random weight. Behind its float32 scales stand NaN, which must not be read."""
    x = randn(*shape, dtype=torch.float32, seed=sum(shape))
    q = quantize_4bit(x, quant_type, blocksize, double_quant)
    return q if double_quant else replace(q, absmax=torch.cat([q.absmax, torch.full((8,), torch.nan)])[:-8])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(  # the fourth has 386 scales, more than one scale of scales
    ("n", "quant_type", "blocksize"),
    [(1, "nf4", 64), (31, "fp4", 32), (4096, "nf4", 64), (12345, "fp4", 32), (8198, "nf4", 4096)],
)
def test_4bit_dequantization_is_the_definition_to_the_bit(n, quant_type, blocksize, double_quant, dtype):
    q = quantized((n,), quant_type, blocksize, double_quant)
    out = torch.full((n + 16,), 99, dtype=dtype)
    nf4.dequantize(q, out[:n])
    assert (out[n:] == 99).all()  # nothing is written behind the end
    assert torch.equal(bits(out[:n]), bits(q.dequantize(torch.float32).to(dtype)))


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # loop bounds, in Triton 3.6
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("double_quant", "rank"), [(False, 0), (True, 0), (True, 1), (False, 5), (True, 16)])
@pytest.mark.parametrize(  # rows that begin within a byte, a group or a block; fewer and more columns than are read at a time
    ("shape", "blocksize"),
    [((1, 1), 64), ((32, 7), 32), ((3, 100), 64), ((9, 128), 64), ((6, 2056), 4096), ((2, 4097), 64)],
)
def test_4bit_matrix_vector_product_is_the_dequantized_one(shape, blocksize, double_quant, rank, dtype):
    q = quantized(shape, "nf4", blocksize, double_quant)
    out_features, in_features = shape
    weight = q.dequantize(torch.float32).double()
    x = randn(in_features, dtype=dtype, seed=1)
    out = torch.full((out_features + 1,), 99, dtype=dtype)
    n, B = (randn(*size, dtype=torch.float32, seed=2) for size in ((rank,), (out_features, rank)))
    bias = randn(out_features, dtype=dtype, seed=3) if rank else None
    nf4.gemv(q, x, out[:-1], bias, (n, B) if rank else None)
    assert out[-1] == 99
    expected, terms = weight @ x.double(), weight.abs() @ x.double().abs()
    if rank:
        expected += B.double() @ n.double() + bias.double()
        terms += B.double().abs() @ n.double().abs() + bias.double().abs()
    # A term is rounded twice, as is its scale, and once in every sum that it is added to: 7 of its group, one
    # for every 2048 columns, and 20 of the 256 partial sums (numpy adds eight strands of 32, then the
    # strands; a GPU adds in a tree of 8 levels). The update's terms are rounded less often before they meet the
    # others in one sum more, and the bias in another.
    float32_error = (2 + 2 + 7 + 20 + 2 + -(-in_features // 2048)) * 2**-24 * terms
    store_error = ROUNDING[dtype] * expected.abs()
    assert ((out[:-1].double() - expected).abs() <= store_error + float32_error).all()


@pytest.fixture
def fused_multiply_add(monkeypatch):
    """Triton's interpreter rounds the product of an FMA; here, as on a GPU, it does not (but for one sum in
    2^29 rounded twice).
    """
    x = torch.tensor([1 + 2**-12])
    if (x.square().neg().add(x, alpha=1 + 2**-12) == 0).all():  # x^2 rounded, and so cancelled
        pytest.skip("PyTorch uses no FMA on this CPU, as a GPU does")

    def create_fma(self, x, y, z):
        exact = x.data.astype(numpy.float64) * y.data + z.data
        return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # 1 / 0, 0 * infinity: blocks of zeros
def test_8bit_adamw_is_the_definition_to_the_bit():
    codes = dynamic_code(True), dynamic_code(False)
    nearest = tuple(map(nearest_of_steps, codes))
    sides = [], []
    for n in (1, 256, 4099, 700):  # fewer and more blocks than the next, tails of 1, 3 and 188
        p = randn(n, dtype=torch.float32, seed=n)
        for tensors in sides:
            moments = [
                torch.zeros(size, dtype=dtype)
                for size, dtype in ((n, torch.uint8), (-(-n // 256), torch.float32)) * 2
            ]
            tensors.append((p.clone(), torch.zeros(n), *moments))
    behind = [[torch.full((4,), 99, dtype=part.dtype) for part in parts] for parts in sides[0]]
    sides[0][:] = [  # each part followed by what must not be written
        tuple(torch.cat(pair)[:-4] for pair in zip(parts, guards, strict=True))
        for parts, guards in zip(sides[0], behind, strict=True)
    ]
    for step in range(1, 6):
        for i, (mine, other) in enumerate(zip(*sides, strict=True)):
            g = randn(len(mine[0]), dtype=torch.float32, seed=100 * step + i) * 10.0 ** (-3 * i)
            g[256:512] *= 1e-25 if step < 3 else 0.0  # v is subnormal, then the block decays
            g[512:600] = 0  # zeros beside other values
            mine[1].copy_(g)
            other[1].copy_(g)
        settings = 1e-2 / step, (0.9, 0.999), 1e-8, 0.1, step
        adamw_8bit_kernel(sides[0], codes, nearest, optim._scalars(*settings))
        optim.adamw_8bit(sides[1], *settings)
        for mine, other in zip(*sides, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
    for parts in sides[0]:
        assert all((part.as_strided((4,), (1,), len(part)) == 99).all() for part in parts)


def test_kernels_that_run_pass_their_trial_and_wrong_bits_do_not(monkeypatch):
    here = torch.device("cpu")
    assert triton_trial._problem_of_a_launch(here) == ""
    dequantize = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda q, out: (dequantize(q, out), out[7].add_(1e-6)))
    assert triton_trial._problem_of_a_launch(here) == "a trial gave other bits than PyTorch"
