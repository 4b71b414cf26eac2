"""Memory of a rank: its part of the weights, and two gathered units; which are gathered when."""

import pytest

POLICIES = ("off", "selective", "full")


@pytest.fixture(scope="module")
def seen(run_program, deep_dir):
    jobs = {f"peak {n}": ("peak", n, dict(directory=deep_dir)) for n in (1, 2, 4)}
    jobs |= {f"held {policy}": ("held", 2, dict(directory=deep_dir, policy=policy)) for policy in POLICIES}
    return run_program("sharded", jobs)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_peak_of_a_rank_is_its_part_of_the_model_and_two_layers(seen, ranks):
    """Beside what one process allocates beside the model: one layer is whole, the next one on its way.

    A third one is allowed: gloo's thread may let go of a message some time after the rank has read it.
    """
    (alone,) = seen["peak 1"]
    for rank in seen[f"peak {ranks}"]:
        model = ranks * rank["kept"]
        beside = rank["peak"] - model / ranks - (alone["peak"] - model)
        assert model >= 24 * rank["unit"]
        assert rank["unit"] < beside <= 3 * rank["unit"]


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_and_backward_gather_each_layer_once_and_hold_one_at_a_time(seen, policy):
    """Unit 0 is the embedding, which is the head too. Backward does not read it again."""
    for rank in seen[f"held {policy}"]:
        course = [
            unit
            for unit, before in zip(rank["opened"], [None, *rank["opened"]], strict=False)
            if unit != before
        ]
        assert course == [*range(25), 0, *range(24, 0, -1)]
        assert rank["most"] == 1


def test_nearly_every_gather_was_begun_before_it_was_needed_and_none_was_in_vain(seen):
    """A pass opens 50 times; at its end the embedding of the next one is on its way."""
    (one, other) = seen["peak 2"]
    assert one["gathers"] == other["gathers"] <= 50 + 1
