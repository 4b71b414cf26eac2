"""From rows to token ids, and the order in which a training sees them.

The structure of a row decides which tokens are learned. No text is searched for where a completion starts:
prompt and completion are encoded separately.

    prompt and completion    the completion and its EOS, which teaches the model to stop
    conversation             the assistant's answers, as `minilora.data.chat` marks them
    plain text               all of it

The first token of a document is never learned: no token comes before it to predict it from. What becomes of
an example that is longer than `cutoff_len`, `minilora.data.truncation` says.

Padding. A micro-batch of examples of different lengths is one row: the examples end to end, with no token of
padding. `document_ids` keep them apart, as they do packed examples, so every example has the loss and the
gradients that it has alone. The other way, a row for each example padded to the longest, is
`padding_free: false`: it spends arithmetic on padding, the more the lengths differ.

The order is a pure function of (seed, epoch, position). No iterator has a state to lose, and any step can be
computed without the steps before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.backend.choice import padded_length
from minilora.backend.copies import to_device
from minilora.backend.documents import PADDING
from minilora.data.chat import ChatTemplate, Encoded
from minilora.data.rows import Row
from minilora.data.templates import TEMPLATES
from minilora.data.tokenizer import Tokenizer
from minilora.data.truncation import kept_tokens, pieces
from minilora.loss import IGNORE_INDEX
from minilora.system.errors import UserError, raise_error
from minilora.system.files import fingerprint

_GROUPED_STEPS = 50  # group_by_length sorts the examples of this many steps together


class Example(NamedTuple):
    """One example as tokens, or several packed into one row, one after the other."""

    input_ids: np.ndarray  # int32 (T,)
    loss_mask: np.ndarray  # bool (T,): True where the token is learned; never at the start of a document
    document_lengths: tuple[int, ...]  # the tokens of each packed document; they sum to T

    @property
    def supervised(self) -> int:
        """Number of learned tokens."""
        return int(self.loss_mask.sum())

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first learned one."""
        return int(self.loss_mask.argmax())


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples, the rows they come from, and counts of what was too long or left out."""

    rows: list[Row]
    examples: list[Example]  # one for each row; more where plain text is split, fewer once they are packed
    truncated: int = 0  # examples cut at cutoff_len
    dropped: int = 0  # examples without a learned token before cutoff_len
    uncut_lengths: tuple[int, ...] = ()  # tokens of each example before it was cut
    lost_thoughts: int = 0  # answers whose thoughts the template leaves out
    row_indices: tuple[int, ...] = ()  # the row of each example, before they are packed

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lost_tokens(self) -> int:
        """Tokens cut off at cutoff_len."""
        return sum(self.uncut_lengths) - sum(len(e.input_ids) for e in self.examples)

    def summary(self) -> str:
        """One line on the examples, for the start of a run."""
        tokens = sum(len(e.input_ids) for e in self.examples)
        learned = sum(e.supervised for e in self.examples)
        text = f"{len(self.rows):,} examples, {tokens:,} tokens, "
        text += f"{learned:,} of them supervised ({learned / max(tokens, 1):.0%})"
        if (pieces := len(self.uncut_lengths)) > len(self.rows):
            text += f", split into {pieces:,} pieces"
        if pieces != len(self):
            text += f", packed into {len(self):,} rows"
        total = len(self.rows) + self.dropped
        if self.truncated:
            text += f"; cut at cutoff_len: {self.truncated:,} ({self.truncated / total:.1%})"
            text += f", {self.lost_tokens:,} tokens lost"
        if self.dropped:
            text += f"; dropped with nothing left to learn: {self.dropped:,} ({self.dropped / total:.1%})"
        if self.lost_thoughts:
            text += f"; the template leaves out the thoughts of {self.lost_thoughts:,} answers"
        return text

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with any token and any bit of its mask."""
        arrays = ((e.input_ids, e.loss_mask, np.array(e.document_lengths)) for e in self.examples)
        return fingerprint(b"".join(array.tobytes() for array in example) for example in arrays)


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    cutoff_len: int,
    train_on_prompt: bool = False,
    template: ChatTemplate | None = None,
    mask_history: bool = False,
    truncation: str = "end",
    on_error: Callable[[UserError], None] = raise_error,
) -> Dataset:
    """Encode rows, fit each into `cutoff_len` tokens, and drop those that keep no learned token.

    `template` words all rows but plain text; with `mask_history` only the last answer of each is learned. A
    conversation without a template, or one that the template refuses, is a UserError with the row's location.
    `on_error` receives it; by default it is raised.
    """
    kept, examples, uncut_lengths, row_indices = [], [], [], []
    truncated, dropped, lost_thoughts = 0, 0, 0
    for row in rows:
        try:
            encoded = _encode(row, tokenizer, template, mask_history)
        except UserError as error:
            on_error(error)
            continue
        T = len(encoded.input_ids)
        if row.prompt is None:
            parts = pieces(T, cutoff_len)
        else:
            parts = [kept_tokens(encoded.answers, cutoff_len, truncation, last_first=mask_history)]
        made = [
            _example(encoded.input_ids[part], encoded.loss_mask[part] | train_on_prompt) for part in parts
        ]
        if not any(example.supervised for example in made):
            dropped += 1
            continue
        truncated += row.prompt is not None and cutoff_len < T
        lost_thoughts += encoded.lost_thoughts
        uncut_lengths += [len(e.input_ids) for e in made] if row.prompt is None else [T]
        row_indices += [len(kept)] * len(made)
        kept.append(row)
        examples += made
    lengths, indices = tuple(uncut_lengths), tuple(row_indices)
    return Dataset(kept, examples, truncated, dropped, lengths, lost_thoughts, indices)


def _example(input_ids: np.ndarray, loss_mask: np.ndarray) -> Example:
    """Return one document as an example."""
    loss_mask = loss_mask.copy()
    loss_mask[:1] = False
    return Example(input_ids.copy(), loss_mask, (len(input_ids),))


def _encode(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, mask_history: bool) -> Encoded:
    """The row as tokens. Raises UserError with its location."""
    if row.prompt is None or (template is None and row.messages is None):
        prompt = [] if row.prompt is None else tokenizer.encode(row.prompt)
        completion = tokenizer.encode(row.completion, bos=row.prompt is None, eos=True)
        input_ids = np.array(prompt + completion, dtype=np.int32)
        answer = (np.arange(len(input_ids)) >= len(prompt)).astype(np.int32)
        return Encoded(input_ids, answer > 0, answer, lost_thoughts=0)
    if template is None:
        raise UserError(
            f"{row.location}: the tokenizer has no chat template for conversations; "
            f"choose one of {', '.join(TEMPLATES)}"
        )
    try:
        return template.encode_all(row.conversation, mask_history)
    except UserError as error:
        raise UserError(f"{row.location}: {error}") from error


ANSWER_SLACK = 8  # tokens an answer may have beyond the longest expected one, so that it can end by itself


def prompt_ids(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[int]:
    """Token ids of everything before a row's completion: the input from which a model answers it."""
    if template is None:
        return tokenizer.encode(row.prompt)
    return template.encode_prompt(row.conversation[:-1])


def end_to_end(examples: Sequence[Example]) -> Example:
    """Return one example that holds these, one after the other, as documents of their own."""
    input_ids, loss_mask, document_lengths = zip(*examples, strict=True)
    return Example(np.concatenate(input_ids), np.concatenate(loss_mask), sum(document_lengths, ()))


def row_length(examples: Sequence[Example], rounded: bool) -> int:
    """Return T of a micro-batch: the longest example's length, or that rounded up (see `padded_length`)."""
    longest = max(len(e.input_ids) for e in examples)
    return padded_length(longest) if rounded else longest


def tokens_read(lengths: Sequence[int], rounded: bool, padding_free: bool) -> int:
    """Return how many tokens, padding included, the model reads of a micro-batch of such examples."""
    rows, T = (1, sum(lengths)) if padding_free else (len(lengths), max(lengths))
    return rows * (padded_length(T) if rounded else T)


def collate(examples: Sequence[Example], pad_id: int, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels, both int64 (Bt, T), padded on the right to `row_length`.

    A label is the token's id, or IGNORE_INDEX if the token is not learned. Padding needs no mask: no token
    attends to tokens after it, and padding is never learned, whatever its id.
    """
    T = row_length(examples, rounded)
    input_ids = torch.full((len(examples), T), pad_id)
    labels = torch.full((len(examples), T), IGNORE_INDEX)
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids).long()
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = ids.where(torch.from_numpy(example.loss_mask), IGNORE_INDEX)
    return input_ids, labels


def document_ids(examples: Sequence[Example], rounded: bool = False) -> Tensor | None:
    """Return the index of each token's document, int64 (Bt, T); None if every row is one document."""
    if all(len(e.document_lengths) == 1 for e in examples):
        return None
    T = row_length(examples, rounded)
    ids = torch.full((len(examples), T), PADDING)
    for i, example in enumerate(examples):
        lengths = torch.tensor(example.document_lengths)
        ids[i, : len(example.input_ids)] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return ids


def batch_for(
    device: torch.device,
    examples: Sequence[Example],
    pad_id: int,
    rounded: bool = False,
    padding_free: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return input_ids, labels and document_ids for `causal_lm_loss` on a device: all examples in one row,
    (1, N) each, or with `padding_free=False` a row for each example, (Bt, T).

    Labels and document_ids stay on the CPU, and nothing of this waits for a GPU. `rounded` fills the row up
    to a length that comes often (see `padded_length`): only compiled kernels want that.
    """
    rows = [end_to_end(examples)] if padding_free else examples
    input_ids, labels = collate(rows, pad_id, rounded)
    return to_device(input_ids, device), labels, document_ids(rows, rounded)


def count_supervised(labels: Tensor) -> int:
    """Return how many tokens `causal_lm_loss` sums over. labels: (Bt, T)."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


# ---- the order ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Which examples form the micro-batches of each optimizer step.

    An epoch is a permutation of all examples, drawn from (seed, epoch) and cut into steps. Within a step the
    examples are sorted by length, so examples of similar length share a micro-batch. The loss of a step is a
    sum over all its examples, so this changes no number but the amount of padding. End to end there is no
    padding; then examples of equal length, side by side, share one call of attention on a CPU.

    `group_by_length` is for rows with padding: it saves more of it and changes more. It sorts the permutation
    by length, 50 steps at a time, so a step holds examples of similar length. The steps are then shuffled, or
    every 50 of them would begin with the shortest examples.
    """

    lengths: Sequence[int]  # tokens of each example
    batch_size: int  # examples in a micro-batch
    accumulation: int  # micro-batches in a step
    seed: int
    group_by_length: bool = False

    @property
    def examples_per_step(self) -> int:
        """Examples in a full step; the last step of an epoch may hold fewer."""
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over all examples."""
        return -(-len(self.lengths) // self.examples_per_step)

    def batches(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step `step` (from 0), as lists of example indices."""
        epoch, position = divmod(step, self.steps_per_epoch)
        permutation, size = _permutation(self.seed, epoch, len(self.lengths)), self.examples_per_step
        if self.group_by_length:
            position = int(_permutation(self.seed, epoch, self.steps_per_epoch)[position])
            first = position - position % _GROUPED_STEPS  # the first step of those that are sorted together
            group = self._by_length(permutation[first * size : (first + _GROUPED_STEPS) * size])
            chosen = group[(position - first) * size : (position - first + 1) * size]
        else:
            chosen = self._by_length(permutation[position * size : (position + 1) * size])
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]

    def padding_share(self, rounded: bool = False, padding_free: bool = True) -> float:
        """Return the share of padding among all tokens that the model reads in the first epoch."""
        batches = (batch for step in map(self.batches, range(self.steps_per_epoch)) for batch in step)
        read = (tokens_read([self.lengths[i] for i in batch], rounded, padding_free) for batch in batches)
        return 1 - sum(self.lengths) / sum(read)

    def largest_batch(self) -> list[int]:
        """Return the lengths of the micro-batch with the most tokens that may come, the longest last."""
        return sorted(self.lengths)[-self.batch_size :]

    def _by_length(self, indices: np.ndarray) -> list[int]:
        return sorted(indices.tolist(), key=lambda i: (self.lengths[i], i))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those held out: a share (below 1) or a number, chosen by the seed."""
    count = round(len(rows) * val_size) if val_size < 1 else int(val_size)
    if not 0 < count < len(rows):
        raise UserError(
            f"val_size = {val_size:g} would hold out {count} of {len(rows)} rows; "
            "both parts need at least one"
        )
    held_out = set(_permutation(seed, 0, len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]
