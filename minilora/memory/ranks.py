"""Several processes train one adapter: the bytes that each of them holds, and how they share the model.

    ddp     each process holds the whole model, and the adapter's gradients are summed once a step
    fsdp    each of N processes holds 1/N of the frozen weights, and gathers a layer whenever it computes it

With fsdp (Zhao et al. 2023, arXiv:2304.11277, section 3; its idea is stage 3 of ZeRO, Rajbhandari et al.
2020, arXiv:1910.02054, section 5) weights are gathered in groups: each decoder layer, and the root, which is
the embedding, the last norm and the head. A process holds

    shard       the frozen bytes / N: codes, scales, norms, biases, embedding and head
    gathered    the root, and two whole layers: one at work, and the next one, which is fetched ahead
    the rest    as one process: adapter, gradients, moments, scratch, activations of its own rows

The root stays from a micro-batch's forward to the end of its backward, as the loss and the embedding need it.
The optimizer step reads no frozen weight, so nothing is gathered then. An adapter is small: each process
holds all of it. With `offload` the shards lie in main memory, and a GPU holds what is gathered alone.

To sum gradients, `Processes.sum_gradients` makes a message of them all and takes the sums out of it: for a
moment they are there three times. That is little for LoRA, and the peak of a full training.

One process shares with nobody. Shards are counted as even; torch gives whole rows of a tensor to a process,
so the first one may hold a row more. `traffic.py` counts what the processes send to each other.
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
_WITHOUT_WEIGHTS = ("sum of gradients", "optimizer step")  # moments that read no frozen weight

Group = dict[str, int]  # category -> bytes that are gathered together


def frozen_groups(
    model_config: ModelConfig,
    lora: LoraConfig,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    in_files: Mapping[str, InFiles] | None = None,  # see `memory_ledger`
) -> tuple[list[Group], Group]:
    """Return the frozen bytes of each decoder layer, and of the root: embedding, last norm and head."""
    c, counts = model_config, _count(model_config, lora, OUTPUT_HEAD in (in_files or ()))
    number = dtype.itemsize
    heads = 0 if c.tie_word_embeddings or OUTPUT_HEAD in counts.shapes else 1
    root_rest = (1 + heads) * c.vocab_size * c.hidden_size + c.hidden_size
    layer_rest = (counts.rest - root_rest) // c.num_hidden_layers  # norms and biases: alike in every layer
    layers = [
        dict.fromkeys(FROZEN, 0) | {FROZEN[-1]: layer_rest * number} for _ in range(c.num_hidden_layers)
    ]
    root = dict.fromkeys(FROZEN, 0) | {FROZEN[-1]: root_rest * number}
    stored = stored_layers(counts.shapes, quant, in_files, number)
    for name, layer in zip(counts.shapes, stored, strict=True):
        group = root if name == OUTPUT_HEAD else layers[int(name.split(".")[2])]  # model.layers.N.
        group["linear weights"] += layer.weight
        group["scales"] += layer.scales
    return layers, root


def shard_bytes(size: int, processes: int, rank: int = 0) -> int:
    """Return the bytes of a rank's part; the first ranks have one more where `size` is not divisible."""
    assert 0 <= rank < processes
    return size // processes + (rank < size % processes)


def gathered_bytes(layers: list[Group], root: Group) -> int:
    """Return the bytes of whole weights that a process holds while it computes: the root and two layers."""
    largest = sorted((sum(layer.values()) for layer in layers), reverse=True)
    return sum(root.values()) + sum(largest[:2])


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
        layers, root = frozen_groups(model_config, lora, quant, dtype, in_files)
        gathered = gathered_bytes(layers, root)
        for name, held in moments.items():
            for category in FROZEN:
                on_gpu = not (offload and device == "cuda")
                held[category] = shard_bytes(held[category], processes) if on_gpu else 0
            held["gathered weights"] = 0 if name in _WITHOUT_WEIGHTS else gathered
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
    """Return in words what fits where fsdp does not: shards in main memory, or up to 128 times as many."""
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
