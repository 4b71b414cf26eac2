"""The kernels of the segmented gather product against a loop over rows in float64.

Collected by test_kernels.py in processes of their own: Triton's interpreter runs them on the CPU if
TRITON_INTERPRET is set, and else a GPU does.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora.backend import segmented
from minilora.backend.fused_lora import Adapter
from minilora.kernels import segmented as kernels
from support.kernel_tests import ROUNDING, bfloat16_as_on_a_gpu
from support.kernels_of_operations import ADDED, DEVICE, INTERPRETED, SUM, TENSOR_CORES, assert_close, randn
from support.segmented_loop import expand_by_rows, segments_of, shrink_by_rows

__all__ = ["bfloat16_as_on_a_gpu"]
pytestmark = [pytest.mark.usefixtures("bfloat16_as_on_a_gpu")] if INTERPRETED else []

MIXTURES = {  # rows of each segment, ranks
    "one row": ([1], [8]),
    "a row each": ([1] * 16, [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 32, 33, 48, 63, 64]),
    "some without, some empty": ([2, 0, 3, 1, 0], [16, 4, None, 1, None]),
    "long": ([35, 5], [3, 16]),
    "long, one without": ([34, 0, 19, 12], [20, 64, None, 1]),
    "long, of a large rank": ([17], [130]),
}
LAYOUTS = {  # of the same numbers
    "as A": lambda F: F.contiguous(),
    "as B^T": lambda F: F.T.contiguous().T,
    "with gaps": lambda F: torch.stack([F, F], dim=-1)[..., 0],
}


def factors_of(ranks, width: int, dtype: torch.dtype, layout: str) -> list[torch.Tensor | None]:
    return [
        None if r is None else LAYOUTS[layout](randn(r, width, dtype=dtype, seed=i))
        for i, r in enumerate(ranks)
    ]


def scalings_of(ranks) -> list[float]:
    return [0.5 + 0.3 * i for i in range(len(ranks))]


def tolerance(x: torch.Tensor, segments, factor_dtype: torch.dtype, terms: int) -> float:
    """What a sum is off by, relative to the sum of its terms' magnitudes, before it is rounded to x's dtype.

    A tile's factors are rounded to the dtype of x, and tensor cores cut off what they add.
    """
    if not kernels.takes_tiles(x, segments):
        return SUM
    return terms * ADDED + (ROUNDING[x.dtype] if factor_dtype != x.dtype else 0) * (1 + terms * ADDED)


def check_shrink(sizes, ranks, width, dtype, factor_dtype, layout, shuffled) -> None:
    segments, scalings = segments_of(sizes, shuffled, DEVICE), scalings_of(ranks)
    x, factors = (
        randn(sum(sizes), width, dtype=dtype, seed=99),
        factors_of(ranks, width, factor_dtype, layout),
    )
    n = kernels.shrink(x, factors, scalings, segments)
    assert n.dtype == dtype and n.shape == (len(x), max(r for r in ranks if r))
    expected = shrink_by_rows(x, factors, scalings, segments)
    terms = shrink_by_rows(x.abs(), [None if F is None else F.abs() for F in factors], scalings, segments)
    off, u = tolerance(x, segments, factor_dtype, width), ROUNDING[dtype]
    for mine, right, bound in zip(n.double(), expected, terms, strict=True):
        if right is not None:
            assert_close(mine[: len(right)], right, u * right.abs() + (1 + u) * off * bound)


def check_expand(sizes, ranks, width, dtype, factor_dtype, layout, shuffled) -> None:
    segments, R = segments_of(sizes, shuffled, DEVICE), max(r for r in ranks if r)
    rows = sum(sizes)
    behind = randn(rows + 1, width, dtype=dtype, seed=98)
    y, before, n = behind[:rows], behind.clone(), randn(rows, R, dtype=dtype, seed=99)
    factors = [None if F is None else F.T for F in factors_of(ranks, width, factor_dtype, layout)]
    kernels.expand(y, n, factors, segments)
    assert torch.equal(behind[rows], before[rows])  # nothing is written behind the end
    expected = expand_by_rows(before[:rows], n, factors, segments)
    sizes_of = [None if F is None else F.abs() for F in factors]
    terms = expand_by_rows(before[:rows].abs(), n.abs(), sizes_of, segments)
    off, u = tolerance(n, segments, factor_dtype, R + 1), ROUNDING[dtype]
    assert_close(y.double(), expected, u * expected.abs() + (1 + u) * off * terms)
    places = segments.order if segments.order is not None else torch.arange(rows)
    for i, r in enumerate(ranks):
        untouched = places[segments.bounds[i] : segments.bounds[i + 1]]
        assert r is not None or torch.equal(y[untouched], before[untouched])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_kernels_take_factors_of_every_layout_and_round_once(mixture, layout, dtype):
    """Float32 factors beside 16-bit rows: a program of one row does not round them."""
    for check in (check_shrink, check_expand):
        check(*MIXTURES[mixture], 72, dtype, torch.float32, layout, layout != "as A")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("mixture", ["some without, some empty", "long, one without"])
def test_the_kernels_take_factors_of_the_dtype_of_the_rows(mixture, dtype):
    for check in (check_shrink, check_expand):
        check(*MIXTURES[mixture], 72, dtype, dtype, "as A", shuffled=True)


@pytest.mark.parametrize("mixture", ["some without, some empty", "long"])
@pytest.mark.parametrize("width", [1, 127, 1025])  # past a block of columns, and past the last one
def test_the_kernels_take_any_width(width, mixture):
    for layout in ("as A", "as B^T"):
        for check in (check_shrink, check_expand):
            check(*MIXTURES[mixture], width, torch.float16, torch.float32, layout, shuffled=True)


segment = st.tuples(st.integers(0, 20), st.none() | st.integers(1, 70))


@settings(max_examples=15 if INTERPRETED else 100, deadline=None)
@given(
    mixture=st.lists(segment, min_size=1, max_size=4).filter(
        lambda found: any(r for _, r in found) and any(rows for rows, _ in found)
    ),
    width=st.integers(1, 80),
    dtype=st.sampled_from(list(ROUNDING)),
    layout=st.sampled_from(list(LAYOUTS)),
    shuffled=st.booleans(),
)
@example(
    mixture=[(0, 3), (2, None)], width=8, dtype=torch.float16, layout="as A", shuffled=True
)  # no program
def test_the_kernels_are_a_loop_over_rows_for_any_mixture(mixture, width, dtype, layout, shuffled):
    for check in (check_shrink, check_expand):
        check(*zip(*mixture, strict=True), width, dtype, torch.float32, layout, shuffled)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels are chosen without being asked for")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_update_runs_the_kernels_where_the_environment_says_so(dtype, monkeypatch):
    calls = []
    for name in ("shrink", "expand"):
        kernel = getattr(kernels, f"{name}_rows_kernel")
        spy = type("Spy", (), {"__getitem__": lambda _, grid, k=kernel: calls.append(k) or k[grid]})()
        monkeypatch.setattr(kernels, f"{name}_rows_kernel", spy)
    segments, x = segments_of([2, 1, 3], shuffled=True), randn(6, 40, dtype=dtype, seed=1)
    As, Bs = factors_of([3, 9], 40, torch.float32, "as A"), factors_of([3, 9], 24, torch.float32, "as B^T")
    pairs = [Adapter(A, B.T, 0.5, 0) for A, B in zip(As, Bs, strict=True)]
    adapters = [pairs[0], None, pairs[1]]
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MINILORA_BACKEND", backend)
        before = len(calls)
        y = segmented.segmented_update(torch.zeros(6, 24, dtype=dtype), x, adapters, segments)
        found[backend] = y, len(calls) - before
    assert found["torch"][1] == 0 and found["triton"][1] >= 2
    terms = x.abs().double().sum() * max(A.abs().max() for A in As) * max(B.abs().max() for B in Bs)
    # Five roundings in the definition (A, B, n, the product, the sum), two in the kernels.
    assert ((found["torch"][0] - found["triton"][0]).abs() <= 7 * ROUNDING[dtype] * terms).all()


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_adapters_of_a_large_layer_give_the_same_bits_in_every_run(rows, dtype):
    if rows == 300 and not (TENSOR_CORES and dtype != torch.float32):
        pytest.skip("the definition takes long segments without tensor cores")
    ranks = [8, 16, 64, None, 1, 32, 128]
    mixture = [rows] * len(ranks), ranks
    for check in (check_shrink, check_expand):
        check(*mixture, 4096, dtype, torch.float32, "as A", shuffled=True)
    segments, x = segments_of(mixture[0], True, DEVICE), randn(7 * rows, 4096, dtype=dtype, seed=1)
    factors = factors_of(ranks, 4096, torch.float32, "as A")
    runs = [kernels.shrink(x, factors, scalings_of(ranks), segments) for _ in range(3)]
    for i, r in enumerate(ranks):
        here = slice(i * rows, (i + 1) * rows)
        assert r is None or all(torch.equal(runs[0][here, :r], run[here, :r]) for run in runs[1:])


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_tiles_are_all_rows_with_an_adapter_once(mixture, size):
    sizes, ranks = MIXTURES[mixture]
    adapted = [i for i, r in enumerate(ranks) if r is not None]
    owner = [i for i, n in enumerate(sizes) for _ in range(n)]
    bounds = segments_of(sizes, shuffled=False).bounds
    tiles = kernels.tiles_of(bounds, tuple(r is not None for r in ranks), size)
    found = [(row, adapted[factor]) for factor, start, end in tiles for row in range(start, end)]
    assert found == [(row, i) for row, i in enumerate(owner) if i in adapted]
    assert all(0 < end - start <= size for _, start, end in tiles)
