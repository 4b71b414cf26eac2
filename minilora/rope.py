"""Rotary position embedding (RoPE), and five ways to stretch its context.

Pair i of a head's K / 2 pairs turns by the angle position * f_i, with f_i = theta^(-2i / K) (Su et al. 2021,
arXiv:2104.09864, 3.2.2). The first pairs turn fast and tell neighbours apart. The last ones do not complete
one turn within the longest text of training, L_0 tokens. A longer text brings angles that the model has never
seen, so the slow pairs must turn more slowly:

    linear    f_i / s                                     position interpolation (arXiv:2306.15595)
    llama3    f_i / s for slow pairs, f_i for fast ones   a blend between them, linear in turns within L_0
    yarn      the same, with a blend linear in i          and cos and sin times an attention factor
    dynamic   theta grows with the text's length L > L_0  at L, the slowest pair turns as far as before at L_0
    longrope  f_i / (a factor for each i)                 one list of factors up to L_0, another beyond

`dynamic` and `longrope` depend on a length. It is the length of the document, so far: packed rows give every
document the numbers that it gets alone. A cache keeps keys as they were turned when they were written.

The order of operations is transformers', so the frequencies are the same bits. docs/rope.md has the
mathematics, and says where transformers takes another length.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend.copies import to_device
from minilora.backend.documents import lengths_in_documents
from minilora.config import ModelConfig, RopeConfig

BY_LENGTH = ("dynamic", "longrope")  # types whose frequencies depend on the length of the document


def context_length(config: ModelConfig) -> int:
    """Return how many tokens the model is made for: max_position_embeddings, times the factor where the file
    leaves that to the reader, as Qwen's cards do. vLLM has the same rule.
    """
    rope, positions = config.rope, config.max_position_embeddings
    if rope.rope_type in ("linear", "dynamic"):
        return int(positions * rope.factor)
    if rope.rope_type == "yarn":
        return max(positions, int(rope.original_max_position_embeddings * rope.factor))
    return positions


def rope_angles(config: ModelConfig, position_ids: Tensor, lengths: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency, times the attention factor: two float32 (Bt or 1, T, K).

    Both halves of K are alike. position_ids: (Bt or 1, T). lengths: see `document_lengths`.
    """
    frequencies = frequencies_at(config.rope, config.head_dim, lengths, position_ids.device)
    angles = position_ids[:, :, None].float() * frequencies  # (Bt or 1, T, K/2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin, factor = angles.cos(), angles.sin(), config.rope.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def document_lengths(
    rope: RopeConfig, document_ids: Tensor | None, S: int, T: int, device: torch.device
) -> int | Tensor:
    """Return how long the document of each of the last T of S tokens is so far.

    document_ids: (Bt, S). One number for all, or (Bt, T) on the device. Where frequencies do not depend on
    it, the number is S. The host waits for nothing.
    """
    if document_ids is None or rope.rope_type not in BY_LENGTH:
        return S
    return to_device(lengths_in_documents(document_ids)[:, -T:], device)


def frequencies_at(
    rope: RopeConfig, head_dim: int, lengths: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Return radians per token of each pair in a document so long: float32 (K/2,), or (Bt, T, K/2)."""
    frequencies = rope_frequencies(rope, head_dim, device)
    if rope.rope_type not in BY_LENGTH:
        return frequencies
    if isinstance(lengths, int):
        lengths = torch.full((), lengths, device=device)
    lengths = lengths[..., None]  # (1,) or (Bt, T, 1)
    if rope.rope_type == "longrope":
        longer = _long_frequencies(rope, head_dim, lengths.device)
    else:
        longer = _dynamic(rope, head_dim, lengths)
    return torch.where(lengths > rope.original_max_position_embeddings, longer, frequencies)


@lru_cache
def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return radians per token of each pair within the original context, float32 (K/2,)."""
    powers = rope.theta ** _shares(head_dim)  # theta^(2i / K)
    if rope.rope_type == "longrope":
        return (1.0 / (torch.tensor(rope.short_factor) * powers)).to(device)
    if rope.rope_type == "yarn":
        return _yarn(rope, powers).to(device)
    frequencies = 1.0 / powers
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    if rope.rope_type == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies.to(device)


def _shares(head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 2i / K of each pair i, float32 (K/2,)."""
    return torch.arange(0, head_dim, 2, device=device).float() / head_dim


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Keep pairs of many turns within the original context, divide those of few (Llama 3.1): (K/2,)."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_position_embeddings / (2 * math.pi / frequencies)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # share of the old frequency
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, powers: Tensor) -> Tensor:
    """Blend old and divided frequencies (Peng et al. 2023, arXiv:2309.00071, 3.2): theta^(2i/K) -> (K/2,).

    Pairs that make beta_fast turns and more within the original context keep their frequency. Pairs of
    beta_slow turns and fewer take it divided by `factor`.
    """
    K = 2 * len(powers)

    def pair(turns: float) -> float:  # the index i of the pair with so many turns
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return K * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, K - 1)
    span = last - first or 0.001
    keep = 1 - ((torch.arange(K // 2).float() - first) / span).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _dynamic(rope: RopeConfig, head_dim: int, lengths: Tensor) -> Tensor:
    """Return the frequencies of a larger theta: lengths, (1,) or (Bt, T, 1) -> (K/2,) or (Bt, T, K/2).

    theta * (s L / L_0 - s + 1)^(K / (K - 2)). With s = 1 the slowest pair turns, at L, as far as it did at
    L_0.
    """
    original, factor = rope.original_max_position_embeddings, rope.factor
    growth = factor * lengths.clamp(min=original) / original - (factor - 1)
    theta = rope.theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / theta ** _shares(head_dim, lengths.device)


@lru_cache
def _long_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Return frequencies divided by the long factors, (K/2,) (Ding et al. 2024, arXiv:2402.13753)."""
    return (1.0 / (torch.tensor(rope.long_factor) * rope.theta ** _shares(head_dim))).to(device)


# ---- attention factors: scores of a longer text are sharpened, by the factor's square ----


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Return 0.1 ln(factor) + 1 (arXiv:2309.00071, 3.4), or DeepSeek's quotient of two such numbers."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_factor(factor: float, original: int) -> float:
    """Return sqrt(1 + ln(factor) / ln(original context)) (arXiv:2402.13753 and its code)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
