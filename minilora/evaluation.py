"""How good is it: loss and perplexity on held-out examples, and exact answers.

The loss is weighted by tokens, not by batches, so it does not depend on the batch size.
"""

import math
from collections.abc import Sequence

import torch

from minilora.data import Example, Row, collate
from minilora.generation import generate_text
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.tokenizer import Tokenizer


@torch.no_grad()
def evaluate_loss(model: CausalLM, examples: Sequence[Example], batch_size: int = 8, pad_id: int = 0) -> float:
    """Mean loss per supervised token, in nats. Dropout is off while it runs."""
    device, was_training = model.model.embed_tokens.weight.device, model.training
    model.eval()
    total = 0.0
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), batch_size):
        input_ids, labels = collate(ordered[start : start + batch_size], pad_id)
        total += causal_lm_loss(model, input_ids.to(device), labels.to(device)).item()
    model.train(was_training)
    return total / sum(e.supervised for e in examples)


def perplexity(model: CausalLM, examples: Sequence[Example], batch_size: int = 8, pad_id: int = 0) -> float:
    """exp of the mean loss per supervised token: 1 is certainty, V a blind guess. Infinite where exp overflows."""
    loss = evaluate_loss(model, examples, batch_size, pad_id)
    return math.exp(loss) if loss < 700 else math.inf


def answers(model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Row], batch_size: int = 64, slack: int = 8) -> list[str]:
    """The greedy answer to each row's prompt, given `slack` tokens more than the longest expected answer to stop in."""
    was_training = model.training
    model.eval()
    room = max(len(tokenizer.encode(row.completion, bos=False)) for row in rows) + slack
    texts = generate_text(model, tokenizer, [row.prompt for row in rows], batch_size=batch_size, max_new_tokens=room)
    model.train(was_training)
    return [text.strip() for text in texts]


def exact_match(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of answers that are the expected completion, character by character but for surrounding blanks."""
    return sum(text == row.completion.strip() for text, row in zip(texts, rows, strict=True)) / len(rows)
