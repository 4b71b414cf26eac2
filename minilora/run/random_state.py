"""The state of every random generator that a training draws from, as tensors that a checkpoint saves.

Python's and numpy's generators have states of nested tuples, with a float among whole numbers. Here each is
one vector of whole numbers, in which the float is its bits. So processes can gather each other's states, and
no pickle is needed.

Dropout needs none of them: before every micro-batch the CPU's generator, from which its seeds come, is seeded
from the run's seed, the step and the micro-batch's number in it. So a micro-batch drops the same elements
whichever process takes it, and whatever else was trained beside it.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minilora.system.distributed import Processes

Batch = TypeVar("Batch")


def seeded(batches: Sequence[Batch], seed: int, step: int, processes: Processes) -> Iterator[Batch]:
    """Yield this process's micro-batches of a step; the CPU's generator is seeded before each."""
    for number, batch in processes.share(list(enumerate(batches))):
        (words,) = np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(words))
        yield batch


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of this process's random generators: PyTorch's on the CPU and its GPU, numpy's, Python's.

    The shapes never change, so that processes can gather each other's states.
    """
    _, keys, *counters, normal = np.random.get_state()
    _, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), *counters, _bits(normal)]),
        "python": torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)]),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the generators to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    *keys, position, has_normal, normal = state["numpy"].tolist()
    np.random.set_state(("MT19937", keys, position, has_normal, _number(normal)))
    *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(words), _number(gauss) if has_gauss else None))


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
