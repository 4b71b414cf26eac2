"""The training loss: the sum of the token losses.

The sum, not the mean: examples differ in length, and micro-batches in how many supervised tokens they hold. Whoever accumulates
gradients divides once, by the number of supervised tokens of the whole optimizer step; then 1 x 8, 4 x 2 and 8 x 1 are the same
step. A mean per micro-batch would weigh a token of a short micro-batch more.

The output head is the widest product of a small model and the largest tensor of a large one, (B, T, V). Only the places that have
something to learn go through it, which on prompt/completion data is often a third of them.
"""

import torch.nn.functional as F
from torch import Tensor

from minilora.model import CausalLM

IGNORE = -100  # the label of a place that is not learnt


def causal_lm_loss(model: CausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Sum over supervised tokens of -log p(token | tokens before it), float32.

    input_ids, labels: (B, T). `labels` are the ids themselves or IGNORE; the place t is predicted from the places before it.
    """
    targets = labels[:, 1:]  # (B, T-1)
    supervised = targets != IGNORE
    hidden = model.model(input_ids)[:, :-1]  # (B, T-1, D)
    logits = model.lm_head(hidden[supervised]).float()  # (N, V), N supervised tokens
    return F.cross_entropy(logits, targets[supervised], reduction="sum")


def count_supervised(labels: Tensor) -> int:
    """How many tokens `causal_lm_loss` sums over. labels: (B, T)."""
    return int((labels[:, 1:] != IGNORE).sum())
