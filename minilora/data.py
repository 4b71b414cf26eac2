"""From files to token ids, and the order in which they are learnt.

Three forms of row are read, from JSONL (one object a line), JSON (one list of objects) or .txt (documents between blank lines):

    prompt, completion            names may be changed with prompt_column and completion_column
    instruction, input, output    Stanford Alpaca's form; `input` may be empty or absent
    text                          every token is supervised

The supervision mask is built from the structure and never searched for in the text: the prompt is encoded with its BOS, the
completion with its EOS, and what is learnt is exactly the second part. EOS is part of it, or the model would never learn to stop.

The order is a pure function of (seed, epoch, position): no iterator has a state to lose, and any step of a run can be computed
without the steps before it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.errors import UserError
from minilora.loss import IGNORE
from minilora.tokenizer import Tokenizer

_ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
}  # the wording that Alpaca models were trained with; True: the row has an input


class Row(NamedTuple):
    """One example as text. A prompt of None means that all of the completion is plain text to learn."""

    prompt: str | None
    completion: str


class Example(NamedTuple):
    """One example as tokens."""

    input_ids: np.ndarray  # int32 (T,)
    prompt_length: int  # the first tokens, which are read and not learnt

    @property
    def supervised(self) -> int:
        """How many tokens are learnt. The first token of all is never predicted by anything."""
        return max(0, len(self.input_ids) - max(1, self.prompt_length))


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples, their texts, and what happened to those that were too long."""

    rows: list[Row]
    examples: list[Example]
    truncated: int = 0  # cut at cutoff_len; they have no EOS to learn
    dropped: int = 0  # nothing to learn was left of them

    def __len__(self) -> int:
        return len(self.examples)

    def summary(self) -> str:
        """A line for the start of a run."""
        tokens = sum(len(e.input_ids) for e in self.examples)
        learnt = sum(e.supervised for e in self.examples)
        text = f"{len(self):,} examples, {tokens:,} tokens, {learnt:,} of them supervised ({learnt / max(tokens, 1):.0%})"
        if self.truncated or self.dropped:
            total = len(self) + self.dropped
            text += f"; cut at cutoff_len: {self.truncated:,} ({self.truncated / total:.1%})"
            text += f", dropped with nothing left to learn: {self.dropped:,} ({self.dropped / total:.1%})"
        return text


def read_rows(path: str | Path, prompt_column: str = "prompt", completion_column: str = "completion") -> list[Row]:
    """Read a dataset file. Raises UserError naming the file, the line or item, and the column that is wrong."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"dataset {path} does not exist")
    if path.is_dir():
        raise UserError(f"dataset {path} is a directory; name a .jsonl, .json or .txt file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if path.suffix == ".txt":
        rows = [Row(None, document.strip("\n")) for document in text.split("\n\n") if document.strip()]
    elif path.suffix in (".json", ".jsonl"):
        places, objects = _parse_json(path, text)
        rows = _to_rows(places, objects, prompt_column, completion_column)
    else:
        raise UserError(f"dataset {path} ends in {path.suffix!r}; supported: .jsonl, .json, .txt")
    if not rows:
        raise UserError(f"dataset {path} is empty")
    return rows


def _parse_json(path: Path, text: str) -> tuple[list[str], list[dict]]:
    """Places for messages ("file, line 3") and objects. A .json file may hold a list, or, as many do, one object a line."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            objects = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        places = [f"{path}, item {i}" for i in range(1, len(objects) + 1)]
    else:
        places, objects = [], []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    objects.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from error
                places.append(f"{path}, line {number}")
    for place, entry in zip(places, objects, strict=True):
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected an object with columns, found {type(entry).__name__}")
    return places, objects


def _to_rows(places: list[str], objects: list[dict], prompt_column: str, completion_column: str) -> list[Row]:
    """The first object decides the form; every other one must have it too."""
    if not objects:
        return []
    columns = objects[0].keys()
    if {prompt_column, completion_column} <= columns:
        needed = (prompt_column, completion_column)
    elif {"instruction", "output"} <= columns:
        needed = ("instruction", "output")
    elif "text" in columns:
        needed = ("text",)
    else:
        raise UserError(
            f"{places[0]}: no columns {prompt_column} + {completion_column}, instruction + output, or text; it has "
            f"{', '.join(columns) or 'none'}; say which with prompt_column and completion_column"
        )
    rows = []
    for place, entry in zip(places, objects, strict=True):
        values = [entry.get(column) for column in needed]
        for column, value in zip(needed, values, strict=True):
            if not isinstance(value, str):
                raise UserError(
                    f"{place}: the column {column} " + ("is missing" if column not in entry else f"holds {value!r}, not text")
                )
        if needed == ("text",):
            rows.append(Row(None, values[0]))
        elif needed == ("instruction", "output"):
            context = entry.get("input") or ""
            if not isinstance(context, str):
                raise UserError(f"{place}: the column input holds {context!r}, not text")
            rows.append(Row(_ALPACA[bool(context)].format(instruction=values[0], input=context), values[1]))
        else:
            rows.append(Row(*values))
    return rows


def tokenize(rows: Sequence[Row], tokenizer: Tokenizer, cutoff_len: int, train_on_prompt: bool = False) -> Dataset:
    """Encode rows. What is longer than `cutoff_len` tokens is cut at its end, and dropped if nothing to learn is left."""
    kept, examples, truncated, dropped = [], [], 0, 0
    for row in rows:
        prompt_ids = [] if row.prompt is None else tokenizer.encode(row.prompt)
        completion_ids = tokenizer.encode(row.completion, bos=row.prompt is None, eos=True)
        input_ids = np.array((prompt_ids + completion_ids)[:cutoff_len], dtype=np.int32)
        example = Example(input_ids, 0 if train_on_prompt else len(prompt_ids))
        too_long = len(prompt_ids) + len(completion_ids) > cutoff_len
        if not example.supervised:
            dropped += 1
            continue
        truncated += too_long
        kept.append(row)
        examples.append(example)
    return Dataset(kept, examples, truncated, dropped)


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the right to the longest: input_ids and labels, both int64 (B, T). Labels are the ids, or IGNORE where not learnt.

    No mask is needed: a token never sees what follows it, and padding is never learnt, whatever its id.
    """
    T = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), T), pad_id)
    labels = torch.full((len(examples), T), IGNORE)
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids).long()
        input_ids[i, : len(ids)] = ids
        labels[i, example.prompt_length : len(ids)] = ids[example.prompt_length :]
    labels[:, 0] = IGNORE  # nothing comes before the first token to predict it
    return input_ids, labels


def steps_per_epoch(count: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in one pass over `count` examples; the last one may be smaller."""
    return -(-count // (batch_size * accumulation))


def step_batches(lengths: Sequence[int], step: int, batch_size: int, accumulation: int, seed: int) -> list[list[int]]:
    """The micro-batches of optimizer step `step` (from 0), as indices: a pure function of its arguments.

    An epoch is a permutation drawn from (seed, epoch), cut into steps. Within a step the examples are sorted by length, so that
    neighbours of like length share a micro-batch; the loss of the step is a sum over all of them, so this changes nothing but
    the amount of padding.
    """
    epoch, position = divmod(step, steps_per_epoch(len(lengths), batch_size, accumulation))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(lengths))
    size = batch_size * accumulation
    chosen = sorted(order[position * size : (position + 1) * size].tolist(), key=lambda i: (lengths[i], i))
    return [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share (below 1) or a number of rows, chosen by the seed; the order of the others is kept."""
    count = round(len(rows) * val_size) if val_size < 1 else int(val_size)
    if not 0 < count < len(rows):
        raise UserError(f"val_size = {val_size:g} would hold out {count} of {len(rows)} rows; both parts need at least one")
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(rows))
    held_out = set(order[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]
