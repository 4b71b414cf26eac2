"""The random numbers of a training: every micro-batch seeds its own.

Dropout draws from PyTorch's generator for the CPU (backend/dropout.py). Before each micro-batch, the
generator is seeded with a function of the run's seed, the step and the number of the micro-batch within the
step. So a micro-batch drops the same elements whichever process computes it, however many there are, and
whatever else is trained beside it. A checkpoint saves no state of a generator: step n + 1 does not depend on
what was drawn before it.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from minilora.system.distributed import Processes

Batch = TypeVar("Batch")


def seeded(batches: Sequence[Batch], seed: int, step: int, processes: Processes) -> Iterator[Batch]:
    """Yield this process's micro-batches of a step, each with a generator that was seeded for it."""
    for number, batch in processes.share(list(enumerate(batches))):
        seed_micro_batch(seed, step, number)
        yield batch


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Seed PyTorch's generator for the CPU. number: of the micro-batch in its step, over all processes.

    numpy's SeedSequence mixes the three numbers, so that neighbours give unrelated seeds.
    """
    (mixed,) = np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(mixed >> 1))
