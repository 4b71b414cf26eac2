"""Several processes train one adapter: the bytes that each of them holds, and how they share the model.

    ddp     each process holds the whole model, and the adapter's gradients are summed once a step
    fsdp    each of N processes holds 1/N of the frozen weights, and gathers a layer whenever it computes it

With fsdp (Zhao et al. 2023, arXiv:2304.11277, section 3; its idea is stage 3 of ZeRO, Rajbhandari et al.
2020, arXiv:1910.02054, section 5) weights are gathered in units: the embedding, each decoder layer, the head.
A process holds

    shard       the bytes of all units / N
    gathered    twice the largest unit: one at work, and the next one, which is fetched ahead
    the rest    as one process: norms, biases, adapter, gradients, moments, scratch, activations of its rows

Two neighbours are never larger than twice the largest unit. That much is needed for a moment, too, when a
unit has arrived in one message and is copied out of it into its weights. The last units stay until the next
micro-batch begins, so all moments have them. With `offload` the shards lie in main memory, and a GPU holds
what is gathered alone.

To sum gradients, `Processes.sum_gradients` makes a message of them all and takes the sums out of it: for a
moment they are there three times. That is little for LoRA, and the peak of a full training.

One process shares with nobody. Shards are counted as even. `fully_shard` gives whole rows of a tensor to a
process, so the first one may hold a row more; the offset of double quantization, 4 bytes a layer, is on all.
`traffic.py` counts what the processes send to each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.memory.ledger import CATEGORIES, Ledger, _count, memory_ledger
from minilora.memory.stored_layers import InFiles, stored_layers
from minilora.targets import OUTPUT_HEAD

PARALLEL = ("ddp", "fsdp")
FROZEN = ("linear weights", "scales", "embeddings, head, norms")  # the categories that are sharded

Unit = dict[str, int]  # category -> bytes that are gathered together


def frozen_units(
    model_config: ModelConfig,
    lora: LoraConfig,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    in_files: Mapping[str, InFiles] | None = None,  # see `memory_ledger`
) -> list[Unit]:
    """Return the bytes of the embedding, of each decoder layer, and of the head if it is none of these."""
    c, counts = model_config, _count(model_config, lora, OUTPUT_HEAD in (in_files or ()))
    nothing = dict.fromkeys(FROZEN, 0)
    table = nothing | {FROZEN[-1]: c.vocab_size * c.hidden_size * dtype.itemsize}
    layers, head = [dict(nothing) for _ in range(c.num_hidden_layers)], dict(nothing)
    stored = stored_layers(counts.shapes, quant, in_files, dtype.itemsize)
    for name, layer in zip(counts.shapes, stored, strict=True):
        unit = head if name == OUTPUT_HEAD else layers[int(name.split(".")[2])]  # model.layers.N.
        unit["linear weights"] += layer.weight
        unit["scales"] += layer.scales
    if c.tie_word_embeddings:
        return [table, *layers]
    return [table, *layers, head if OUTPUT_HEAD in counts.shapes else table]


def shard_bytes(size: int, processes: int, rank: int = 0) -> int:
    """Return the bytes of a rank's part; the first ranks have one more where `size` is not divisible."""
    assert 0 <= rank < processes
    return size // processes + (rank < size % processes)


def gathered_bytes(units: list[Unit]) -> int:
    """Return the most bytes of whole weights that a process holds while it computes: see above."""
    return 2 * max(sum(unit.values()) for unit in units)


def rank_ledger(
    model_config: ModelConfig,
    lora: LoraConfig,
    quant: QuantConfig | None,
    *,
    dtype: torch.dtype,
    processes: int = 1,
    parallel: str = "ddp",  # or fsdp
    offload: bool = False,  # fsdp: shards lie in main memory; on a CPU they do anyway
    device: str = "cuda",
    in_files: Mapping[str, InFiles] | None = None,
    **run,
) -> Ledger:
    """Return the ledger of one of several processes; batch and length are its own. See `memory_ledger`.

    `gathered weights` and `summed gradients` are the categories that one process does not have.
    """
    assert parallel in PARALLEL and processes > 0
    shared = dict(dtype=dtype, device=device, in_files=in_files)
    ledger = memory_ledger(model_config, lora, quant, **shared, **run)
    if processes == 1:
        return ledger
    moments = {name: dict(held) for name, held in ledger.moments.items()}
    step = moments.pop("optimizer step")
    message = {"summed gradients": 2 * step["gradients"]}  # the message, and the sums taken out of it
    moments |= {"sum of gradients": step | message, "optimizer step": step}
    if parallel == "fsdp":
        units = frozen_units(model_config, lora, quant, dtype, in_files)
        for held in moments.values():
            for category in FROZEN:
                whole = sum(unit[category] for unit in units)
                shard = 0 if offload and device == "cuda" else shard_bytes(whole, processes)
                held[category] += shard - whole  # norms and biases stay
            held["gathered weights"] = gathered_bytes(units)
    assert all(tuple(held) == CATEGORIES for held in moments.values())
    return replace(ledger, moments=moments)


# ---- ddp or fsdp? ------------------------------------------------------------------------------------------


def choose_parallel(
    memory: float | None,  # free bytes of each process; None: not known
    processes: int,
    plan_of: Callable[..., Ledger],
    seconds_of: Callable[[Ledger, str], float] | None = None,
) -> tuple[str, Ledger, str]:
    """Return `ddp` or `fsdp`, the ledger of one process, and why.

    `plan_of(parallel=..., processes=..., offload=...)` is that ledger, its recompute policies chosen: see
    `rank_ledger` and `planner.choose_recompute`. `seconds_of(ledger, parallel)` is the longest that a step
    may take (`traffic.step_seconds`). ddp wins where it fits: with the same recompute it sends less. fsdp
    leaves more room to recompute less, so it wins there if the seconds are known and are fewer.

    Where neither fits, fsdp, and the reason says what would: a prediction is no reason not to try.
    """
    ddp = plan_of(parallel="ddp", processes=processes)
    if processes == 1:
        return "ddp", ddp, "one process shares with nobody"
    if memory is None:
        return "ddp", ddp, "this system does not tell how much memory is free"
    free = f"{memory / 2**30:.2f} GiB"
    ddp_fits = ddp.fits(memory)
    if ddp_fits and seconds_of is None:
        return "ddp", ddp, f"needs {_gib(ddp)} of {free} free"
    fsdp = plan_of(parallel="fsdp", processes=processes)
    if ddp_fits:
        with_ddp, with_fsdp = seconds_of(ddp, "ddp"), seconds_of(fsdp, "fsdp")
        if fsdp.fits(memory) and with_fsdp < with_ddp:
            times = f"at most {with_fsdp:.3g} s a step, ddp {with_ddp:.3g}"
            return "fsdp", fsdp, f"needs {_gib(fsdp)} of {free} free; {times}"
        times = f"{with_ddp:.3g} s a step, fsdp up to {with_fsdp:.3g}"
        return "ddp", ddp, f"needs {_gib(ddp)} of {free} free; {times}"
    if fsdp.fits(memory):
        return "fsdp", fsdp, f"needs {_gib(fsdp)} of {free} free; ddp would need {_gib(ddp)}"
    needs = f"even fsdp needs {_gib(fsdp)} GiB; {free} are free, and a tenth should be left"
    return "fsdp", fsdp, f"{needs}; {_what_would_fit(memory, processes, plan_of)}"


def _what_would_fit(memory: float, processes: int, plan_of: Callable[..., Ledger]) -> str:
    """Return in words what fits where fsdp does not: shards in main memory, or up to 128 N processes."""
    ways = []
    if plan_of(parallel="fsdp", processes=processes, offload=True).fits(memory):
        ways.append("with its shards in main memory")
    for more in (processes * 2**i for i in range(1, 8)):
        if plan_of(parallel="fsdp", processes=more).fits(memory):
            ways.append(f"over {more} processes")
            break
    if ways:
        return f"it would fit {' or '.join(ways)}"
    return "no number of processes would do: take shorter rows, a smaller micro-batch or a smaller adapter"


def _gib(ledger: Ledger) -> str:
    return f"{ledger.peak / 2**30:.2f}"
