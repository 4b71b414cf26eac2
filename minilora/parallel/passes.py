"""Passes through a sharded model: all ranks take equally many, or some would wait for weights for ever.

Of the micro-batches of a step, or of the held-out examples, some ranks get one less than others, or none. To
gather a layer takes all ranks. So a rank that has run out of work goes on with idle passes: two tokens, whose
loss is multiplied by zero. They open the same units in the same order as any other pass.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch

from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.parallel.gathering import Gathering
from minilora.system.distributed import Processes


def gathering_of(model: CausalLM) -> Gathering | None:
    """Return what gathers the weights of a sharded model. None: the model is whole."""
    return getattr(model, "gathering", None)


def gathered_on_reading(model: CausalLM) -> AbstractContextManager:
    """Within, whoever reads a weight has it gathered: for starts of adapters. All ranks read the same."""
    gathering = gathering_of(model)
    return nullcontext() if gathering is None else gathering.on_reading()


def catch_up(model: CausalLM, processes: Processes, items: int, eval_batch_size: int = 0) -> None:
    """Take idle passes until this rank has taken as many as rank 0, which has the most.

    items: the micro-batches that the ranks have shared (`Processes.share`), each with its backward pass; or,
    with an eval_batch_size, the examples that they have evaluated in passes of that size, without one.
    """
    if gathering_of(model) is None:
        return
    mine, most = (len(range(rank, items, processes.count)) for rank in (processes.rank, 0))
    ids, size = torch.zeros(1, 2, dtype=torch.long), eval_batch_size or 1
    for _ in range(math.ceil(most / size) - math.ceil(mine / size)):
        with torch.set_grad_enabled(not eval_batch_size):
            loss = causal_lm_loss(model, ids.to(model.lm_head.weight.device), ids) * 0
        if not eval_batch_size:
            loss.backward()
