"""The next token of every row, when each has settings and random numbers of its own.

Rows with the same settings go through the chain of `inference/generation.py` together. Only the random
numbers are drawn row by row, each from its own generator, which nobody else uses: an answer depends on its
seed, and not on who is answered beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.backend.copies import to_device
from minilora.inference.assistant import GenerationSettings
from minilora.inference.generation import draw, penalize, probabilities


class Sampler:
    """The settings of one answer, its random numbers, and the tokens that it may not repeat."""

    def __init__(
        self, settings: GenerationSettings, prompt: Sequence[int], vocab_size: int, device: torch.device
    ):
        self.chain = settings.temperature, settings.top_k, settings.top_p
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.penalty = settings.repetition_penalty
        self.present: Tensor | None = None  # bool (V,): tokens of the text, where they are punished
        if self.penalty != 1.0:
            self.present = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.present[to_device(torch.tensor(prompt), device)] = True

    def note(self, token: int) -> None:
        """Remember a token of the answer."""
        if self.present is not None:
            self.present[token].fill_(True)


def next_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Choose one token for each row: (n, V) float32 -> n numbers. The host waits once."""
    chosen = torch.empty(len(samplers), dtype=torch.long, device=logits.device)
    for chain in dict.fromkeys(sampler.chain for sampler in samplers):
        rows = [i for i, sampler in enumerate(samplers) if sampler.chain == chain]
        places = to_device(torch.tensor(rows), logits.device)
        chosen[places] = _choose(logits[places], [samplers[i] for i in rows])
    tokens = chosen.tolist()
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.note(token)
    return tokens


def _choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Choose a token for rows of one chain of settings: (n, V) -> (n,)."""
    for i, sampler in enumerate(samplers):
        if sampler.present is not None:
            logits[i] = penalize(logits[i], sampler.present, sampler.penalty)
    temperature, top_k, top_p = samplers[0].chain
    if temperature == 0:
        return logits.argmax(-1)
    likely = probabilities(logits, temperature, top_k, top_p)
    u = torch.empty_like(likely)
    for i, sampler in enumerate(samplers):
        u[i : i + 1].exponential_(generator=sampler.generator)
    return draw(likely, u)
