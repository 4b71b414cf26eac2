"""Several datasets in one training: their names and weights, and the rows that are used of each.

With weights, `a.jsonl:0.7,b.json:0.3`, they are mixed: 7 of 10 rows come from the first one, and there are as
many rows as possible without any row twice. The seed chooses which rows of each dataset are used, once for
the whole training.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from minilora.data.rows import Row
from minilora.system.errors import UserError
from minilora.system.redaction import hide_secrets, whole


def parse_datasets(datasets: str | Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Return names and weights of `a.jsonl:0.7,b.json:0.3`, or of a list of such entries.

    Without weights, every weight is None.
    """
    entries = whole(datasets).split(",") if isinstance(datasets, str) else datasets
    is_list = isinstance(entries, Sequence) and all(isinstance(entry, str) for entry in entries)
    if not is_list or not entries:
        raise UserError(f"dataset = {datasets!r} must be the name of a dataset, or a list of names")
    if not all(entry.strip() for entry in entries):
        raise UserError(f"dataset = {datasets!r} names nothing between two commas; remove one of them")
    parsed = [_split_weight(whole(entry).strip()) for entry in entries]
    weights = [weight for _, weight in parsed]
    if None in weights and any(weights):
        raise UserError(
            f"dataset = {datasets!r}: only some datasets have a weight; give one to all of them, or to none"
        )
    if 0 in weights:
        raise UserError(f"dataset = {datasets!r}: a weight is 0; leave that dataset out")
    return parsed


def _split_weight(entry: str) -> tuple[str, Fraction | None]:
    """Return name and weight of `a.jsonl:0.7`. What has more digits than a weight belongs to the name."""
    name, _, weight = entry.rpartition(":")
    if name and re.fullmatch(r"\d{1,20}(\.\d{0,20})?|\.\d{1,20}", weight):
        return hide_secrets(name), Fraction(weight)
    return hide_secrets(entry), None


def mix_rows(parts: Sequence[list[Row]], weights: Sequence[Fraction | None], seed: int) -> list[Row]:
    """Return the rows of several datasets, mixed in proportion to their weights.

    The mixture ends where the first dataset is used up. Rows keep their order. Without weights, all rows of
    all datasets are joined.
    """
    if None in weights:
        return [row for part in parts for row in part]
    shares = [weight / sum(weights) for weight in weights]
    # Fractions are exact: the dataset that is used up contributes all of its rows, not one fewer.
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    mixed = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = max(1, math.floor(total * share))
        order = np.random.Generator(np.random.Philox(key=[seed, i])).permutation(len(part))
        mixed += [part[j] for j in sorted(order[:count].tolist())]
    return mixed
