"""From rows to token ids, and the order in which they are learned.

Which tokens are learned is known from how a row is made, and never searched for in it: of a prompt and its
completion, which are encoded apart, exactly the completion with its EOS, without which the model would never
learn to stop; of a conversation what `minilora.data.chat` says; of plain text all of it. The first token of a
document is learned in no case: nothing comes before it to predict it.

The order is a pure function of (seed, epoch, position): no iterator has a state to lose, and any step of a
run can be computed without the steps before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.data.chat import ChatTemplate
from minilora.data.rows import Row
from minilora.data.templates import TEMPLATES
from minilora.data.tokenizer import Tokenizer
from minilora.loss import IGNORE_INDEX
from minilora.model import PADDING
from minilora.system.errors import UserError, raise_error

_GROUPED_STEPS = 50  # how many steps' examples are sorted by length together


class Example(NamedTuple):
    """One example as tokens, or several packed into one row, one after the other."""

    input_ids: np.ndarray  # int32 (T,)
    loss_mask: (
        np.ndarray
    )  # bool (T,): whether the loss is taken on predicting this token; never on the first one of a document
    document_lengths: tuple[int, ...]  # of what is packed; their sum is T

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return int(self.loss_mask.sum())

    @property
    def prompt_length(self) -> int:
        """The first tokens, which are read and not learned."""
        return int(self.loss_mask.argmax())


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples, their texts, and what happened to those that were too long."""

    rows: list[Row]
    examples: list[Example]  # one a row, until they are packed
    truncated: int = 0  # cut at cutoff_len; they have no EOS to learn
    dropped: int = 0  # nothing to learn was left of them
    uncut_lengths: tuple[int, ...] = ()  # tokens of each row before it was cut

    def __len__(self) -> int:
        return len(self.examples)

    def summary(self) -> str:
        """A line for the start of a run."""
        tokens = sum(len(e.input_ids) for e in self.examples)
        learned = sum(e.supervised for e in self.examples)
        text = f"{len(self.rows):,} examples, {tokens:,} tokens, {learned:,} of them supervised ({learned / max(tokens, 1):.0%})"
        if len(self.rows) != len(self):
            text += f", packed into {len(self):,} rows"
        total = len(self.rows) + self.dropped
        if self.truncated:
            text += f"; cut at cutoff_len: {self.truncated:,} ({self.truncated / total:.1%})"
        if self.dropped:
            text += f"; dropped with nothing left to learn: {self.dropped:,} ({self.dropped / total:.1%})"
        return text


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    cutoff_len: int,
    train_on_prompt: bool = False,
    template: ChatTemplate | None = None,
    mask_history: bool = False,
    on_error: Callable[[UserError], None] = raise_error,
) -> Dataset:
    """Encode rows. What is longer than `cutoff_len` tokens is cut at its end, and dropped if nothing to learn
    is left.

    Conversations are worded by `template`; `mask_history`: of each only the last answer is learned. Raises
    UserError, with the row's place, for a conversation where there is no template, or that the template
    refuses; or `on_error` does something else.
    """
    kept, examples, truncated, dropped, uncut_lengths = [], [], 0, 0, []
    for row in rows:
        try:
            input_ids, loss_mask = _encode(row, tokenizer, template, mask_history)
        except UserError as error:
            on_error(error)
            continue
        length = len(input_ids)
        input_ids, loss_mask = input_ids[:cutoff_len].copy(), loss_mask[:cutoff_len] | train_on_prompt
        loss_mask[:1] = False
        if not loss_mask.any():
            dropped += 1
            continue
        truncated += length > cutoff_len
        uncut_lengths.append(length)
        kept.append(row)
        examples.append(Example(input_ids, loss_mask, (len(input_ids),)))
    return Dataset(kept, examples, truncated, dropped, tuple(uncut_lengths))


def _encode(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, mask_history: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 (T,), and which of them are the row's own to learn, bool (T,)."""
    if row.messages is None:
        prompt_ids = [] if row.prompt is None else tokenizer.encode(row.prompt)
        completion_ids = tokenizer.encode(row.completion, bos=row.prompt is None, eos=True)
        input_ids = np.array(prompt_ids + completion_ids, dtype=np.int32)
        return input_ids, np.arange(len(input_ids)) >= len(prompt_ids)
    if template is None:
        raise UserError(
            f"{row.location}: the tokenizer has no chat template for conversations; choose one of {', '.join(TEMPLATES)}"
        )
    try:
        return template.encode(row.messages, mask_history)
    except UserError as error:
        raise UserError(f"{row.location}: {error}") from error


def prompt_ids(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[int]:
    """What a model is given to answer a row: all that comes before its completion."""
    if row.messages is None:
        return tokenizer.encode(row.prompt)
    return template.encode_prompt(row.messages[:-1])


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the right to the longest: input_ids and labels, both int64 (B, T). Labels are the ids, or IGNORE_INDEX
    where not learned.

    No mask is needed for padding: a token never sees what follows it, and padding is never learned, whatever
    its id.
    """
    T = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), T), pad_id)
    labels = torch.full((len(examples), T), IGNORE_INDEX)
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids).long()
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = ids.where(torch.from_numpy(example.loss_mask), IGNORE_INDEX)
    return input_ids, labels


def document_ids(examples: Sequence[Example]) -> Tensor | None:
    """Which document of its row each token of `collate` belongs to, int64 (B, T); None where no row holds
    more than one.
    """
    if all(len(e.document_lengths) == 1 for e in examples):
        return None
    T = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), T), PADDING)
    for i, example in enumerate(examples):
        lengths = torch.tensor(example.document_lengths)
        ids[i, : len(example.input_ids)] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return ids


# ---- the order -------------------------------------------------------------------------------------------------------------


def steps_per_epoch(count: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in one pass over `count` examples; one of them may be smaller."""
    return -(-count // (batch_size * accumulation))


def step_batches(
    lengths: Sequence[int],
    step: int,
    batch_size: int,
    accumulation: int,
    seed: int,
    group_by_length: bool = False,
) -> list[list[int]]:
    """The micro-batches of optimizer step `step` (from 0), as indices: a pure function of its arguments.

    An epoch is a permutation drawn from (seed, epoch), cut into steps. Within a step the examples are sorted
    by length, so that neighbours of like length share a micro-batch; the loss of the step is a sum over all
    of them, so this changes nothing but the amount of padding.

    `group_by_length` saves more and changes more: the permutation is sorted by length 50 steps at a time, so
    that a step holds examples of like length, and the steps are taken in an order of their own, lest every 50
    steps begin with the short ones.
    """
    steps = steps_per_epoch(len(lengths), batch_size, accumulation)
    epoch, position = divmod(step, steps)
    order, size = _permutation(seed, epoch, len(lengths)), batch_size * accumulation

    def by_length(i: int) -> tuple[int, int]:
        return lengths[i], i

    if group_by_length:
        position = int(_permutation(seed, epoch, steps)[position])
        first = position - position % _GROUPED_STEPS
        order = sorted(order[first * size : (first + _GROUPED_STEPS) * size].tolist(), key=by_length)
        chosen = order[(position - first) * size : (position - first + 1) * size]
    else:
        chosen = sorted(order[position * size : (position + 1) * size].tolist(), key=by_length)
    return [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def padding_share(
    lengths: Sequence[int], batch_size: int, accumulation: int, seed: int, group_by_length: bool = False
) -> float:
    """The share of padding in all that goes through the model in the first epoch."""
    padded = 0
    for step in range(steps_per_epoch(len(lengths), batch_size, accumulation)):
        for batch in step_batches(lengths, step, batch_size, accumulation, seed, group_by_length):
            padded += len(batch) * max(lengths[i] for i in batch)
    return 1 - sum(lengths) / padded


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share (below 1) or a number of rows, chosen by the seed; the order of the others is kept."""
    count = round(len(rows) * val_size) if val_size < 1 else int(val_size)
    if not 0 < count < len(rows):
        raise UserError(
            f"val_size = {val_size:g} would hold out {count} of {len(rows)} rows; both parts need at least one"
        )
    held_out = set(_permutation(seed, 0, len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]
