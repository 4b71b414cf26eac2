"""Prepared tokens: `scripts/prepare.py` encodes rows once, for every training, resumed run and rank.

    prepared/train.jsonl         rows, as `read_rows` reads them
    prepared/train.safetensors   their tokens
        input_ids        int32 (N,), of all examples one after the other
        loss_mask        bool (N,)
        lengths          int32 (examples,); their sum is N
        uncut_lengths    int32 (examples,), before each example was cut at cutoff_len
        row_indices      int32 (examples,): the row of each; plain text may be several examples

Tokens carry a key: a hash of rows, tokenizer, template and settings. They are used only if their key is the
expected one. After a change to any of these the key differs, and the rows are encoded as usual. So stale
tokens cannot be used by mistake, and no user has to track which tokens belong to which rows. A file whose
tensors do not fit the rows is ignored in the same way.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from minilora.data.chat import ChatTemplate
from minilora.data.examples import Dataset, Example
from minilora.data.rows import Row, to_record
from minilora.data.tokenizer import Tokenizer
from minilora.system.files import fingerprint, write_whole

_TENSORS = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "lengths": np.int32,
    "uncut_lengths": np.int32,
    "row_indices": np.int32,
}
_FORMAT = "minilora tokens 3"  # to be raised whenever the same rows would get other tokens


def tokens_file(rows_file: str | Path) -> Path:
    """Return the path of the tokens of a file of rows."""
    return Path(rows_file).with_suffix(".safetensors")


def tokens_key(
    rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate | None, settings: dict[str, object]
) -> str:
    """Return a hash, twelve digits, of everything that tokens depend on.

    `settings` are the other arguments of `minilora.data.examples.tokenize`.
    """
    encoding = [_FORMAT, tokenizer.fingerprint(), template and template.source, sorted(settings.items())]
    parts = [encoding, *map(to_record, rows)]
    return fingerprint(json.dumps(part, sort_keys=True).encode() for part in parts)


def save_tokens(path: Path, dataset: Dataset, key: str) -> None:
    """Write the tokens of a dataset that is not packed, with the key of its rows."""
    tensors = {
        "input_ids": np.concatenate([e.input_ids for e in dataset.examples]),
        "loss_mask": np.concatenate([e.loss_mask for e in dataset.examples]),
        "lengths": np.array([len(e.input_ids) for e in dataset.examples], dtype=np.int32),
        "uncut_lengths": np.array(dataset.uncut_lengths, dtype=np.int32),
        "row_indices": np.array(dataset.row_indices, dtype=np.int32),
    }
    about = {"key": key, "format": "pt", "lost_thoughts": str(dataset.lost_thoughts)}
    write_whole(path, save(tensors, metadata=about))


def load_tokens(path: Path, rows: list[Row], key: str, cutoff_len: int | None = None) -> Dataset | None:
    """Return the dataset that `save_tokens` wrote, or None if the file does not hold tokens of this key.

    With `cutoff_len`, no example may be longer. A key is easily copied, so the tensors are checked too.
    """
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            lost_thoughts = int(about.get("lost_thoughts", 0))
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (
        Exception
    ):  # no such file, or one that minilora did not write: wrong names, a dtype that NumPy lacks
        return None
    lengths, uncut_lengths = tensors["lengths"], tensors["uncut_lengths"]
    if not _belong_together(tensors, len(rows)) or lengths.max() > (cutoff_len or lengths.max()):
        return None
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(tensors["input_ids"], ends), np.split(tensors["loss_mask"], ends), strict=True)
    examples = [Example(input_ids, loss_mask, (len(input_ids),)) for input_ids, loss_mask in parts]
    truncated = int((uncut_lengths > lengths).sum())
    lengths, indices = tuple(uncut_lengths.tolist()), tuple(tensors["row_indices"].tolist())
    return Dataset(rows, examples, truncated, 0, lengths, lost_thoughts, indices)


def _belong_together(tensors: dict[str, np.ndarray], count: int) -> bool:
    """Whether the tensors describe examples of `count` rows, each with a token to learn behind its first."""
    if any(tensors[name].dtype != dtype or tensors[name].ndim != 1 for name, dtype in _TENSORS.items()):
        return False
    input_ids, loss_mask, lengths, uncut_lengths, row_indices = (tensors[name] for name in _TENSORS)
    if not len(lengths) == len(uncut_lengths) == len(row_indices) > 0 or lengths.min() < 1:
        return False
    steps = np.diff(row_indices, prepend=-1, append=count)  # every row once or more, one after the other
    if steps.min() < 0 or steps.max() > 1 or steps[0] != 1 or steps[-1] != 1:
        return False
    if not len(input_ids) == len(loss_mask) == lengths.sum(dtype=np.int64) or input_ids.min() < 0:
        return False
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    learned = np.add.reduceat(loss_mask.astype(np.int64), starts)  # tokens of each example
    return bool((uncut_lengths >= lengths).all() and learned.min() > 0 and not loss_mask[starts].any())
