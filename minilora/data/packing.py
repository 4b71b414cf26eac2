"""Packing: several short examples in one row. No token is spent on padding, no example sees another.

Rows are filled by best fit decreasing (Johnson 1974; for language models Ding et al. 2024, arXiv:2404.10830):
the longest example first, each into the fullest row that has room for it, or into a new row. No example is
cut. The number of rows is at most 11/9 of the minimum, plus one. If examples are much shorter than a row,
nearly every row is full.

A packed example has the loss and the gradients that it has alone: `document_ids` restrict attention to the
example itself, positions restart with every example, and the first token of an example is never a label.

The number of rows depends only on the lengths. Among examples of equal length, the seed chooses which of them
share a row. Rows are packed once per training; their order is drawn anew for every epoch.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minilora.data.examples import Dataset, end_to_end


def pack(dataset: Dataset, capacity: int, seed: int) -> Dataset:
    """Return the same examples in rows of at most `capacity` tokens. No example may be longer."""
    examples = dataset.examples
    groups = best_fit([len(e.input_ids) for e in examples], capacity, seed)
    return replace(dataset, examples=[end_to_end([examples[i] for i in group]) for group in groups])


def best_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Return the indices of `lengths` in groups; the lengths of each group sum to at most `capacity`."""
    assert max(lengths, default=0) <= capacity, "an example is longer than a row"
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(lengths)).tolist()
    groups: list[list[int]] = []
    groups_with: dict[int, list[int]] = defaultdict(list)  # room left in a group -> indices of such groups
    rooms: list[int] = []  # the keys of groups_with, sorted: at most `capacity`, for a binary search
    for i in sorted(order, key=lambda i: -lengths[i]):
        fitting = bisect_left(rooms, lengths[i])
        if fitting < len(rooms):
            room = rooms[fitting]  # the smallest that is enough: the fullest group
            group = groups_with[room].pop()
            if not groups_with[room]:
                del rooms[fitting], groups_with[room]
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(i)
        room -= lengths[i]
        if room not in groups_with:
            insort(rooms, room)
        groups_with[room].append(group)
    return groups
