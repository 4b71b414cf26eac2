"""How much several processes send to each other in a step, and how long a step takes on a given link.

A ring of N processes gathers n bytes of which each holds n / N: every process receives the N - 1 parts of the
others. A sum over all is a reduce-scatter and a gather, each of the same cost (Thakur, Rabenseifner and
Gropp 2005, "Optimization of collective communication operations in MPICH", section 4):

    all-gather    (N - 1) / N n    bytes received by each process
    all-reduce    2 (N - 1) / N n

With ddp a step all-reduces the adapter's gradients, in float32, once, whatever the accumulation. With fsdp
each micro-batch gathers the model besides (Zhao et al. 2023, arXiv:2304.11277, section 3):

    forward     the embedding, every decoder layer, the head (the embedding again, if they are tied)
    backward    every decoder layer that it reaches, and the one below these, which is fetched ahead; a second
                run and its backward share a gather, and the loss reads the head in forward alone

ZeRO's stage 3 sends 3 n a step, as it scatters n bytes of gradients too (Rajbhandari et al. 2020,
arXiv:1910.02054, section 7). Frozen weights have none, and in 4 bits n is a quarter: two gathers of n / 4
are a sixth of 3 n.

With offload a process also reads its own part from main memory at every gather: (N - 1) / N becomes 1. All
of it is counted against the same link: right where the GPUs meet over PCIe, and too much elsewhere.

A step computes for `flop / rate` seconds. Gathers may hide behind that or not, so it has two bounds:

    all hidden     max(compute, gathers) + all-reduce
    none hidden    compute + gathers + all-reduce

The all-reduce comes after the last backward and before the optimizer step: nothing hides it. Latency,
kernels that wait for memory, and the optimizer step are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.memory.ledger import Ledger, _count
from minilora.memory.ranks import PARALLEL, frozen_units
from minilora.memory.stored_layers import InFiles
from minilora.targets import OUTPUT_HEAD


class Traffic(NamedTuple):
    """Bytes that a process receives in an optimizer step."""

    gathered: int  # frozen weights; with offload, those that it reads from main memory too
    summed: int  # gradients

    @property
    def total(self) -> int:
        return self.gathered + self.summed


def step_traffic(
    model_config: ModelConfig,
    lora: LoraConfig,
    quant: QuantConfig | None,
    *,
    dtype: torch.dtype,  # of unquantized weights
    processes: int,
    parallel: str = "ddp",
    offload: bool = False,
    micro_batches: int = 1,  # of one process in a step: gradient accumulation
    in_files: Mapping[str, InFiles] | None = None,
) -> Traffic:
    """Return the bytes that one of `processes` receives in a step."""
    assert parallel in PARALLEL and processes > 0 and micro_batches > 0
    counts = _count(model_config, lora, OUTPUT_HEAD in (in_files or ()))
    summed = 2 * 4 * sum(counts.trainable) * (processes - 1) // processes
    if parallel == "ddp" or processes == 1:
        return Traffic(0, summed)
    units = frozen_units(model_config, lora, quant, dtype, in_files)
    embedding, *others = (sum(unit.values()) for unit in units)
    layers, tied = others[: model_config.num_hidden_layers], model_config.tie_word_embeddings
    whole = embedding * (1 + tied) + sum(others) + sum(layers[max(counts.first_adapted - 1, 0) :])
    received = whole if offload else whole * (processes - 1) // processes
    return Traffic(micro_batches * received, summed)


class StepSeconds(NamedTuple):
    """Bounds of a step's time."""

    compute: float
    least: float  # all gathers hidden behind arithmetic
    most: float  # none


def step_seconds(
    ledger: Ledger,
    traffic: Traffic,
    *,
    micro_batches: int = 1,
    flop_rate: float,  # operations a second that a process reaches
    byte_rate: float,  # bytes a second that a process receives
) -> StepSeconds:
    """Return how long a step of a process takes, from its arithmetic and its traffic."""
    compute = ledger.flop_per_token * micro_batches * ledger.batch_size * ledger.length / flop_rate
    gathers, sums = traffic.gathered / byte_rate, traffic.summed / byte_rate
    return StepSeconds(compute, max(compute, gathers) + sums, compute + gathers + sums)
