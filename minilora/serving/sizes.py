"""How many slots there are, and how long: from the memory that the model leaves free, or as given.

    a slot      2 * layers * G * max_length * K numbers: keys and values of one text
    beside it   adapters on the device; a layer at work on the prompts of a step, or on all slots' keys

What is not given is chosen: SLOTS slots of the model's whole context. Where they do not fit there are fewer,
down to FEWEST; where these do not fit either they are shorter. As everywhere, MARGIN times the sum must be
free, since nobody predicts what an allocator wastes.
"""

from typing import NamedTuple

import torch

from minilora.config import LoraConfig, ModelConfig
from minilora.memory.activations import answer_bytes, layer_bytes, widths_of
from minilora.memory.ledger import MARGIN
from minilora.rope import context_length
from minilora.serving.engine import PROMPT_TOKENS
from minilora.serving.slots import slot_bytes
from minilora.system.errors import UserError

SLOTS, FEWEST = 16, 4
SHORTEST = 64  # tokens


class Sizes(NamedTuple):
    """Slots, the tokens of each, and what they take in bytes."""

    slots: int
    max_length: int
    cache: int
    work: int  # at most, while a step runs

    def __str__(self) -> str:
        held = f"{_shown(self.cache)} for keys and values, {_shown(self.work)} at work"
        return f"{self.slots} answers at once, of {self.max_length} tokens with their prompts: {held}"


def choose_sizes(
    config: ModelConfig,
    dtype: torch.dtype,
    device: str,  # cuda or cpu
    free: int | None,  # bytes; None: unknown
    slots: int | None = None,
    max_length: int | None = None,
) -> Sizes:
    """Return the sizes that fit. Raises UserError if none do, or for more than the context."""
    longest = context_length(config)
    if max_length is not None and max_length > longest:
        raise UserError(f"max_model_len = {max_length} is more than the {longest} positions of the model")
    lengths = [max_length] if max_length else [longest]
    while not max_length and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    for length in lengths:
        counts = [slots] if slots else range(SLOTS, (1 if length == lengths[-1] else FEWEST) - 1, -1)
        for count in counts:
            sizes = _sizes(config, dtype, device, count, length)
            if free is None or MARGIN * (sizes.cache + sizes.work) <= free:
                return sizes
    raise UserError(
        f"{sizes} do not fit into the {_shown(free)} that are free; lower --max_num_seqs or "
        "--max_model_len, or quantize the weights with --quantization_bit 4"
    )


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _sizes(config: ModelConfig, dtype: torch.dtype, device: str, slots: int, length: int) -> Sizes:
    widths, tokens = widths_of(config, dtype, device), max(PROMPT_TOKENS, length)
    prompts = layer_bytes(config, LoraConfig(), frozenset(), tokens, widths).alone
    prompts += 2 * tokens * config.hidden_size * dtype.itemsize  # all tokens, before and behind the norm
    step = answer_bytes(config, slots, length, 2, widths)[1]
    sampling = 6 * 4 * slots * config.vocab_size  # of the sorted logits, and where they were
    return Sizes(slots, length, slots * slot_bytes(config, length, dtype), max(prompts, step) + sampling)
