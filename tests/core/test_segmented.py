"""Rows that meet different adapters: the definition against a loop over rows."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rounding import ROUNDING, randn
from support.segmented_loop import (
    THRESHOLD,
    adapters_of,
    by_rows,
    magnitudes,
    ours,
    result_and_gradients,
    segments_of,
)

from minilora.backend.segmented import segmented_update

MIXTURES = {  # rows of each segment, ranks
    "one": ([5], [4]),
    "three": ([2, 0, 3, 1], [1, 7, None, 64]),
    "sixteen": ([1, 2] * 8, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64]),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_and_gradients_are_those_of_a_loop_over_rows_in_float64(mixture, shuffled, threshold, dtype):
    sizes, ranks = MIXTURES[mixture]
    segments, rows = segments_of(sizes, shuffled), sum(sizes)
    adapters = adapters_of(ranks, 40, 24, threshold=threshold)
    y, x, dy = (randn(rows, n, dtype=dtype, seed=90 + n) for n in (24, 40, 25))
    dy = dy[:, :24]
    found = result_and_gradients(ours, y, x, adapters, segments, dy)
    right = result_and_gradients(by_rows, y, x, adapters, segments, dy)
    # The same loop over magnitudes gives the sum of the magnitudes of all terms of a result or a gradient.
    terms = result_and_gradients(by_rows, y.abs(), x.abs(), magnitudes(adapters), segments, dy.abs())
    # At most six roundings, of A, B, the narrow matrix, the product, the sum, and the gradient; and two sums
    # of at most 64 terms in float32, which round 2^-18 away at most.
    for mine, expected, bound in zip(found, right, terms, strict=True):
        assert ((mine - expected).abs() <= (6 * ROUNDING[dtype] + 2**-17) * bound).all()


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_backward_pass_is_the_derivative(shuffled, threshold):
    segments = segments_of([2, 1, 0, 2], shuffled)
    adapters = adapters_of([2, None, 3, 1], 5, 4, torch.float64, threshold)
    inputs = [randn(5, n, dtype=torch.float64, seed=n).requires_grad_() for n in (4, 5)]
    leaves = [*inputs, *chain(*(adapter[:2] for adapter in adapters if adapter))]
    assert torch.autograd.gradcheck(lambda y, x, *_: ours(y, x, adapters, segments), leaves)


segment = st.tuples(st.integers(0, 6), st.none() | st.integers(1, 70))


@given(st.lists(segment, min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_any_mixture_is_a_loop_over_rows(mixture, width, out, shuffled):
    sizes, ranks = zip(*mixture, strict=True)
    segments, rows = segments_of(sizes, shuffled), sum(sizes)
    adapters = adapters_of(ranks, width, out, torch.float64, THRESHOLD)
    y, x, dy = (randn(rows, n, dtype=torch.float64, seed=n) for n in (out, width, out))
    if rows == 0:
        assert ours(y, x, adapters, segments).shape == (0, out)
        return
    found = result_and_gradients(ours, y, x, adapters, segments, dy)
    right = result_and_gradients(by_rows, y, x, adapters, segments, dy)
    for mine, expected in zip(found, right, strict=True):
        # Sums of at most 70 products of two sums of float64, of normal numbers: far below 1e-10.
        assert ((mine - expected).abs() <= 1e-10 * (1 + expected.abs())).all()


def test_rows_without_an_adapter_stay_to_the_bit_and_no_adapter_is_no_operation():
    segments, y, x = segments_of([2, 3, 2], shuffled=True), randn(7, 9, dtype=torch.bfloat16, seed=1), None
    x = randn(7, 12, dtype=torch.bfloat16, seed=2)
    after = segmented_update(y.clone(), x, adapters_of([4, None, 2], 12, 9), segments)
    untouched = segments.order[2:5]
    assert torch.equal(after[untouched], y[untouched]) and not torch.equal(after, y)
    assert segmented_update(y, x, [None, None, None], segments) is y


def test_numbers_that_are_no_rows_side_by_side_are_taken_as_they_are():
    """A gradient of sum() is one number, expanded; an input may be a part of a wider one."""
    segments, adapters = segments_of([2, 4], shuffled=True), adapters_of([3, 5], 8, 6)
    wide = randn(2, 3, 20, dtype=torch.float32, seed=1)
    grads = {}
    for name, x in (("part", wide[..., :8]), ("copy", wide[..., :8].contiguous())):
        y = segmented_update(torch.zeros(2, 3, 6), x, adapters, segments)
        grads[name] = [y.detach(), *torch.autograd.grad(y.sum(), chain(*(a[:2] for a in adapters)))]
    assert all(map(torch.equal, grads["part"], grads["copy"]))
