"""The oracles are right by another way than their own: autograd, PyTorch, bitsandbytes, worked examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora.int8 import quantize_int8
from minilora.quantization import QUANT_TYPES, dequantize_dynamic, dynamic_code, four_bit_code, quantize_4bit
from minilora.testing import (
    adamw_reference,
    dora_gradients,
    dora_reference,
    dropped_reference,
    factors,
    int8_reference,
    is_nearest,
    lora_gradients,
    lora_reference,
    lora_shapes,
    merged_reference,
    nearest_codes,
    nested_reference,
    unpack_symbols,
    weights,
)

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# ---- quantizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_advertised_example_holds_for_our_own_quantizer(quant_type):
    code = four_bit_code(quant_type)

    def my_quantizer(weight):
        q = quantize_4bit(weight, quant_type, double_quant=False)
        return unpack_symbols(q.packed, weight.numel())

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(weights(code=code))
    def test_my_quantizer_chooses_the_nearest_code(weight):
        assert is_nearest(my_quantizer(weight), weight, code, blocksize=64).all()

    test_my_quantizer_chooses_the_nearest_code()


def test_inputs_without_a_single_right_answer_accept_each_right_one_and_no_other():
    code = torch.tensor([-1.0, 0.0, 0.5, 1.0, -0.0])  # two zeros, as in fp4

    def accepted(*values):
        """The symbols that are right for the last value."""
        weight = torch.tensor(values)
        found = [is_nearest(torch.full((len(values),), s), weight, code) for s in range(len(code))]
        return {s for s, right in enumerate(found) if right[-1]}

    assert accepted(1.0, 0.1) == {1, 4}  # one value, two symbols
    assert accepted(1.0, 0.75) == {2, 3}  # in the middle
    assert accepted(1.0, 0.7500001) == {2, 3}  # as good as in the middle, in float32
    assert accepted(1.0, 0.751) == {3}
    assert accepted(1e-20, 0.751e-20) == {3}  # small, and still a normal number
    assert accepted(2e-39, 1.5e-39) == {0, 1, 2, 3, 4}  # the block's absmax is subnormal
    assert accepted(0.0, 0.0) == {1, 4}  # a block of zeros is zeros


def test_margins_are_zero_where_float32_is_too_coarse_to_say():
    code = torch.tensor([-1.0, 0.0, 1.0])
    symbols, margin = nearest_codes(torch.tensor([1.0, 0.5, 0.25]), code, 64)
    assert symbols[[0, 2]].tolist() == [2, 1] and margin.tolist() == [1.0, 0.0, 0.5]
    assert nearest_codes(torch.tensor([1e-39, 0.25e-39]), code, 64)[1].tolist() == [0.0, 0.0]


def test_scales_of_scales_are_those_that_the_library_dequantizes():
    weight = torch.randn(300 * 64, generator=torch.Generator().manual_seed(0))  # two nested blocks
    q = quantize_4bit(weight)
    expected = dequantize_dynamic(q.absmax, q.nested_absmax, dynamic_code(), 256) + q.offset
    found = nested_reference(q.absmax, q.nested_absmax, dynamic_code(), q.offset)
    assert (found - expected.double()).abs().max() <= 2**-22 * found.abs().max()  # two float32 roundings


@few
@given(weights())
def test_int8_is_the_nearest_multiple_by_row(weight):
    q = quantize_int8(weight)
    symbols, absmax, margin = int8_reference(weight)
    assert torch.equal(q.absmax.double(), absmax)
    # A step's place is off by two roundings of a number up to 127: 2^-16. Below 1e-36 rows count as zero.
    certain = (margin > 2**-14) & (absmax > 1e-36).unsqueeze(-1)
    assert torch.equal(q.data.long()[certain], symbols[certain])


# ---- LoRA and DoRA -----------------------------------------------------------------------------------------


def numbers(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def close(found, expected):
    """Float64 throughout, sums of at most 200 products: 200 * 2^-53, with room."""
    return torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@few
@given(lora_shapes(24, 8), st.floats(0.1, 8), st.integers(0, 99))
def test_gradients_written_out_are_those_of_autograd_with_and_without_dropout(shape, scaling, seed):
    in_features, out_features, r = shape
    x, W, A, B, dy = numbers(seed, (2, 3, in_features), (out_features, in_features), (r, in_features), (out_features, r), (2, 3, out_features))  # fmt: skip
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) > 0.25
    leaves = [t.requires_grad_() for t in (x, A, B)]
    plain = lora_gradients(x, W, A, B, scaling, dy)
    expected = torch.autograd.grad(lora_reference(x, W, A, B, scaling), leaves, dy)
    assert all(close(mine, other) for mine, other in zip(plain, expected, strict=True))
    dropped = lora_gradients(x, W, A, B, scaling, dy, keep.double() / 0.75)
    expected = torch.autograd.grad(dropped_reference(x, W, A, B, scaling, keep, 0.25), leaves, dy)
    assert all(close(mine, other) for mine, other in zip(dropped, expected, strict=True))


@few
@given(lora_shapes(24, 8), st.floats(0.1, 8), st.integers(0, 99))
def test_doras_gradients_written_out_are_those_of_autograd(shape, scaling, seed):
    in_features, out_features, r = shape
    x, W, A, B, m, dy = numbers(seed, (3, in_features), (out_features, in_features), (r, in_features), (out_features, r), (out_features,), (3, out_features))  # fmt: skip
    leaves = [t.requires_grad_() for t in (x, A, B, m)]
    expected = torch.autograd.grad(dora_reference(x, W, A, B, m, scaling), leaves, dy)
    found = dora_gradients(x, W, A, B, m, scaling, dy)
    assert all(close(mine, other) for mine, other in zip(found, expected, strict=True))


def test_dora_by_hand():
    W, A, B = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0], [0.0]])
    m, x = torch.tensor([10.0, 7.0]), torch.tensor([[1.0, 1.0]])
    # V = [[3, 4], [0, 0]] with scaling 2: a row of length 5, and one of zeros, which stays so.
    assert merged_reference(W, A, B, 2.0).tolist() == [[3, 4], [0, 0]]
    assert dora_reference(x, W, A, B, m, 2.0).tolist() == [[14, 0]]
    assert dora_reference(x, W, A, B, m, 2.0, bias=torch.tensor([1.0, 2.0])).tolist() == [[15, 2]]


@few
@given(factors())
def test_factors_fit_one_another(drawn):
    A, B = drawn
    assert A.shape[0] == B.shape[1] and (B @ A).shape == (B.shape[0], A.shape[1])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_pytorchs(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(12)]
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert close(parameter.detach(), adamw_reference(start, gradients, 1e-2, (0.8, 0.95), 1e-6, weight_decay))
