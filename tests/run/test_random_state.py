"""minilora/run/random_state.py: the draws of a micro-batch depend on its place in the training alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend.dropout import draw_seed
from minilora.run.random_state import seeded
from minilora.system.distributed import Processes

SEEDS = st.integers(0, 2**63 - 1)


def draws(
    batches: list[str], seed: int, step: int, processes: Processes | None = None
) -> dict[str, list[int]]:
    return {
        batch: [draw_seed(), draw_seed()] for batch in seeded(batches, seed, step, processes or Processes())
    }


@given(SEEDS, st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 4))
def test_a_micro_batch_draws_the_same_in_any_process_and_after_any_other_draws(seed, step, count, ranks):
    batches = [f"batch {i}" for i in range(count)]
    alone = draws(batches, seed, step)
    torch.manual_seed(7)
    shared = [draws(batches, seed, step, Processes(rank, ranks)) for rank in range(ranks)]
    assert alone == {batch: drawn for part in shared for batch, drawn in part.items()}


@given(SEEDS, st.integers(0, 10**9))
def test_other_micro_batches_steps_and_seeds_draw_other_numbers(seed, step):
    others = [draws(["a", "b"], seed, step), draws(["c"], seed, step + 1), draws(["d"], seed ^ 1, step)]
    drawn = [tuple(numbers) for other in others for numbers in other.values()]
    assert len(set(drawn)) == 4  # of 2^126 pairs: equal ones do not come by chance
