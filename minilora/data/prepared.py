"""Tokens that lie ready: what `scripts/prepare.py` encoded once, so that no training, resume or rank has to
do it again.

    prepared/train.jsonl         rows, as `read_rows` reads them
    prepared/train.safetensors   their tokens
        input_ids        int32 (N,), of all examples one after the other
        loss_mask        bool (N,)
        lengths          int32, of every example; their sum is N
        uncut_lengths    int32, of every example before it was cut

Nobody has to say which tokens belong to which rows: tokens are used if they carry the key of what is asked
for, a fingerprint of rows, tokenizer, template and settings. After any change to one of these there are
simply none, and rows are encoded as ever.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minilora.data.chat import ChatTemplate
from minilora.data.examples import Dataset, Example
from minilora.data.rows import Row, to_record
from minilora.data.tokenizer import Tokenizer
from minilora.system.files import fingerprint, write_whole

_FORMAT = "minilora tokens 2"  # to be raised whenever the same rows would give other tokens


def tokens_file(rows_file: str | Path) -> Path:
    """Where the tokens of a file of rows lie."""
    return Path(rows_file).with_suffix(".safetensors")


def tokens_key(
    rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate | None, settings: dict[str, object]
) -> str:
    """What tokens depend on, in twelve digits. `settings`: the other arguments of
    `minilora.data.examples.tokenize`.
    """
    wording = [_FORMAT, tokenizer.fingerprint(), template and template.source, sorted(settings.items())]
    return fingerprint(json.dumps(part, sort_keys=True).encode() for part in (wording, *map(to_record, rows)))


def save_tokens(path: Path, dataset: Dataset, key: str) -> None:
    """Write the tokens of a set that is not packed. `key`: that of its rows."""
    tensors = {
        "input_ids": np.concatenate([e.input_ids for e in dataset.examples]),
        "loss_mask": np.concatenate([e.loss_mask for e in dataset.examples]),
        "lengths": np.array([len(e.input_ids) for e in dataset.examples], dtype=np.int32),
        "uncut_lengths": np.array(dataset.uncut_lengths, dtype=np.int32),
    }
    write_whole(path, save(tensors, metadata={"key": key, "format": "pt"}))


def load_tokens(path: Path, rows: list[Row], key: str) -> Dataset | None:
    """What `save_tokens` was given; None if there are no tokens of this key."""
    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):  # missing, or not written by us
        return None
    ends = np.cumsum(tensors["lengths"])[:-1]
    parts = zip(np.split(tensors["input_ids"], ends), np.split(tensors["loss_mask"], ends), strict=True)
    examples = [Example(input_ids, loss_mask, (len(input_ids),)) for input_ids, loss_mask in parts]
    truncated = int((tensors["uncut_lengths"] > tensors["lengths"]).sum())
    return Dataset(rows, examples, truncated, uncut_lengths=tuple(tensors["uncut_lengths"].tolist()))
