"""What a run does about memory, before it reads a weight: ddp or fsdp, recompute, the batches of evaluation.

The ledger predicts (memory/), and here the settings, the data and the machine meet it.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from minilora.backend.choice import padded_length
from minilora.config import LoraConfig, ModelConfig
from minilora.data.examples import Order, tokens_read
from minilora.memory.allocator import compiles_kernels, padded_lengths, return_freed_memory, return_holes
from minilora.memory.ledger import Answers, Ledger, available_memory, process_memory
from minilora.memory.planner import choose_recompute
from minilora.memory.ranks import choose_parallel, rank_ledger
from minilora.memory.stored_layers import InFiles
from minilora.parallel.choice import least
from minilora.run.settings import TrainConfig
from minilora.system.device import Placement, memory_reserved, memory_used
from minilora.system.distributed import Processes

ANSWERS_AT_A_TIME = 64  # at most
ONE = Processes()


@dataclass(frozen=True)
class MemoryPlan:
    """The recompute policies of a run, its predicted memory, and the batches that fit beside it."""

    policies: tuple[str, ...]  # what each layer keeps for backward; see minilora.recompute
    recompute: str  # the same in words
    reason: str
    peak: int  # predicted bytes
    eval_batch_size: int  # held-out examples in one pass
    answer_batch_size: int  # prompts answered together
    rounded: bool  # round the lengths of rows up, so that few kernels are compiled
    parallel: str = "ddp"  # or fsdp: what each of several processes holds of the model
    why_parallel: str = ""

    def measure(self, device: torch.device) -> tuple[int, int | None]:
        """Return the peak bytes so far, in use and reserved (see `system/device.py`).

        Beyond the prediction, a CPU's heap gives its free pages back.
        """
        used = memory_used(device)
        if device.type == "cpu" and used > self.peak:
            return_holes()
        return used, memory_reserved(device)


def plan_memory(
    config: TrainConfig,
    model_config: ModelConfig,
    lora: LoraConfig,
    placement: Placement,
    order: Order,
    eval_length: int,  # tokens of the longest held-out example; 0: there is none
    answers: tuple[int, int] | None = None,  # see `answer_lengths`
    in_files: dict[str, InFiles] | None = None,  # see `StoredTensors.quantized_layers`
    beside: int = 0,  # bytes of what else is trained in this process
    processes: Processes = ONE,
    may_divide: bool = False,  # whether processes may divide the model: see `parallel/choice.py`
) -> MemoryPlan:
    """Choose ddp or fsdp and the recompute policies, and predict their memory. `auto` is the fastest plan
    that fits. All processes choose alike, by the least memory that any of them has.

    On a CPU the heap's holes are counted too. Where they do not fit, glibc is told to return freed memory at
    once: that leaves no holes and is slower. Evaluation and answers take the same under every policy, so they
    do not choose it: their batches follow.
    """
    device, available = placement.device, free_memory(placement.device, processes)
    rounded = compiles_kernels(placement.dtype, device.type)
    eval_batch_size = config.per_device_eval_batch_size if eval_length else 0
    ledger_of = partial(
        rank_ledger,
        model_config,
        lora,
        config.quant_config(),
        **_batch_sizes(order, rounded, config.padding_free),
        dtype=placement.dtype,
        optim=config.optim,
        device=device.type,
        eval_length=padded_length(eval_length) if rounded and eval_length else eval_length,
        process=beside + (process_memory() if device.type == "cpu" else 0),
        in_files=in_files,
        processes=processes.count,
    )
    parallel, why = choose_way(config, ledger_of, available, processes, may_divide)
    ledger_of = partial(ledger_of, parallel=parallel, offload=config.fsdp_offload)
    if device.type == "cpu":
        with_holes = partial(ledger_of, heap_holes=True)
        ledger, _ = choose_policies(config, with_holes, available)
        ledger = with_holes(recompute=ledger.policies, eval_batch_size=eval_batch_size)
        if available is None or ledger.fits(available):
            ledger_of = with_holes
        else:
            return_freed_memory()
    ledger, reason = choose_policies(config, ledger_of, available)
    fitting = _batches_that_fit(
        partial(ledger_of, recompute=ledger.policies), available, eval_batch_size, answers
    )
    if parallel == "fsdp":  # all processes take equally many passes
        fitting = fitting[0], *least(processes, *fitting[1:])
    return MemoryPlan(ledger.policies, ledger.recompute, reason, *fitting, rounded, parallel, why)


def free_memory(device: torch.device, processes: Processes) -> int | None:
    """Return the bytes that each process may count on: the least of all. Processes on one CPU share it."""
    available = available_memory(device)
    if available is None or processes.count == 1:
        return available
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return least(processes, available // sharers)[0]


def choose_way(
    config: TrainConfig,
    ledger_of: Callable[..., Ledger],
    available: int | None,
    processes: Processes,
    may_divide: bool,
) -> tuple[str, str]:
    """Return ddp or fsdp, and why: as requested, or for `auto` as the ledger says."""
    if processes.count == 1:
        return "ddp", "fsdp, which has no effect in one process" if config.parallel == "fsdp" else ""
    if config.parallel != "auto":
        return config.parallel, "as requested"
    if not may_divide:
        return "ddp", "this training cannot divide the model"

    def plan_of(**kind) -> Ledger:
        return choose_policies(config, partial(ledger_of, **kind), available)[0]

    way, _, why = choose_parallel(available, processes.count, plan_of)
    return way, why


def _batch_sizes(order: Order, rounded: bool, padding_free: bool) -> dict[str, int]:
    """Return what the ledger must know of the micro-batches: the largest, and how many lengths there are."""
    largest = order.largest_batch()
    sizes = dict(batch_size=len(largest), length=max(largest))
    sizes["tokens"] = tokens_read(largest, rounded, padding_free)
    if rounded:  # kernels are compiled for each length
        documents = {padded_length(length) for length in order.lengths}
        sizes["row_lengths"] = sizes["document_lengths"] = len(documents)
        if padding_free:
            shortest = sum(sorted(order.lengths)[: order.batch_size])
            sizes["row_lengths"] = padded_lengths(shortest, sum(largest))
    return sizes


def _batches_that_fit(
    ledger_of: Callable[..., Ledger],
    available: int | None,
    eval_batch_size: int,
    answers: tuple[int, int] | None,
) -> tuple[int, int, int]:
    """Return the predicted peak, and how many examples to evaluate and how many prompts to answer at a time.

    Evaluation keeps to the settings as long as that fits into the free memory. No key chooses the number of
    answers, and their texts do not depend on it. They come last, when a failure costs most: so they take no
    more than the training has taken already, or than half of the free memory.
    """
    ledger = ledger_of(eval_batch_size=eval_batch_size)
    while ledger.moment == "evaluation" and eval_batch_size > 1 and not ledger.fits(available or math.inf):
        eval_batch_size //= 2
        ledger = ledger_of(eval_batch_size=eval_batch_size)
    answer_batch_size, most = ANSWERS_AT_A_TIME, max(ledger.peak, (available or 0) // 2)
    while answers:
        wanted = Answers(answer_batch_size, *answers)
        ledger = ledger_of(eval_batch_size=eval_batch_size, answers=wanted)
        if answer_batch_size == 1 or sum(ledger.moments["answers"].values()) <= most:
            break
        answer_batch_size //= 2
    return ledger.peak, eval_batch_size, answer_batch_size


def choose_policies(
    config: TrainConfig, ledger_of: Callable[..., Ledger], available: int | None
) -> tuple[Ledger, str]:
    """Return the ledger of the requested policy, or for `auto` of the fastest plan that fits; the reason."""
    policy = config.gradient_checkpointing
    if policy == "auto":
        return choose_recompute(available, ledger_of)
    ledger = ledger_of(recompute=policy)
    return ledger, "as requested" if ledger.recompute == policy else f"{policy} needs a GPU"
