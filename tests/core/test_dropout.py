"""Dropout from a seed: known answers of its generator, and what a mask must be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.backend.dropout import (
    add_dropped_definition,
    draw_seed,
    dropout_definition,
    gain_of,
    kept,
    philox,
    threshold_of,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "counter, key, answer",
    [  # the first two of Random123's kat_vectors for philox4x32 with 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, answer):
    found = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in found) == answer


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 6),
    threshold=st.integers(0, 65535),
)  # fmt: skip
def test_an_element_is_decided_by_its_place_alone(rows, columns, seed, stream, threshold):
    whole = kept(rows, columns, seed, stream, threshold, CPU)
    assert whole.shape == (rows, columns) and whole.dtype == torch.bool
    assert torch.equal(kept(rows + 3, columns + 11, seed, stream, threshold, CPU)[:rows, :columns], whole)
    # A lower threshold drops fewer elements, and none that a higher one keeps.
    assert (kept(rows, columns, seed, stream, threshold // 2, CPU) | ~whole).all()
    assert kept(rows, columns, seed, stream, 0, CPU).all()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_dropped_elements_is_p_in_every_seed_and_stream(p):
    n = 400 * 500
    masks = [
        kept(400, 500, seed, stream, threshold_of(p), CPU) for seed in (1, 2**40 + 1) for stream in (0, 1)
    ]
    deviation = (p * (1 - p) / n) ** 0.5
    for mask in masks:
        assert abs((~mask).float().mean() - p) < 5 * deviation + 2**-17  # p is rounded to 1 / 65536
    for i, one in enumerate(masks):  # independent: together they drop p^2
        for other in masks[:i]:
            both = (~one & ~other).float().mean()
            assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5 + 2**-15


def test_what_is_kept_is_enlarged_so_that_the_expectation_stays():
    for p in (0.0, 0.05, 0.5, 0.99):
        threshold = threshold_of(p)
        assert gain_of(threshold) * (65536 - threshold) == pytest.approx(65536, rel=1e-12)
    with pytest.raises(ValueError, match="at least 0 and below 1, not 1"):
        threshold_of(1.0)


def test_seeds_follow_the_generator_of_the_cpu():
    torch.manual_seed(4)
    first = [draw_seed() for _ in range(3)]
    state = torch.get_rng_state()
    after = draw_seed()
    torch.manual_seed(4)
    assert [draw_seed() for _ in range(3)] == first and len({*first, after}) == 4
    torch.set_rng_state(state)
    assert draw_seed() == after


def test_the_backward_of_dropout_drops_the_same_elements():
    x, y = torch.randn(7, 19), torch.randn(7, 19)
    mask = kept(7, 19, 3, 1, 20000, CPU)
    assert torch.equal(dropout_definition(x, 3, 1, 20000), x.where(mask, torch.zeros(())))
    total = x.clone()
    add_dropped_definition(total, y, 3, 1, 20000)
    assert torch.equal(total, x + y.where(mask, torch.zeros(())))
