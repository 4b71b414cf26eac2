"""Several short examples in one row: no token is spent on padding, and no example sees another.

Rows are filled by best fit decreasing (Johnson 1974; for language models Ding et al. 2024, arXiv:2404.10830):
the longest example first, each into the fullest row that has room for it, or into a new one. Nothing is cut.
It takes at most 11/9 of the fewest rows (and one more); where examples are much shorter than a row, nearly
every one is full.

What is packed learns exactly what it learns alone: `document_ids` keep attention inside each example,
positions restart with each one, and the first token of each is no label. How many rows there are depends on
the lengths alone. The seed chooses among examples of one length which of them meet; that is done once for a
training, and the order of the rows is each epoch's own.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minilora.data.examples import Dataset, Example


def pack(dataset: Dataset, capacity: int, seed: int) -> Dataset:
    """The same examples in rows of at most `capacity` tokens, of which no example has more."""
    examples = dataset.examples
    packed = [
        _join([examples[i] for i in group])
        for group in best_fit([len(e.input_ids) for e in examples], capacity, seed)
    ]
    return replace(dataset, examples=packed)


def best_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Indices in groups, the lengths of none of which add up to more than `capacity`."""
    assert max(lengths, default=0) <= capacity, "an example is longer than a row"
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(lengths)).tolist()
    groups: list[list[int]] = []
    groups_with: dict[int, list[int]] = defaultdict(
        list
    )  # room left -> the groups that have exactly this much
    rooms: list[int] = []  # the keys of groups_with, in order
    for i in sorted(order, key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[i])
        if place < len(rooms):
            room = rooms[place]
            group = groups_with[room].pop()
            if not groups_with[room]:
                del rooms[place], groups_with[room]
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(i)
        room -= lengths[i]
        if room not in groups_with:
            insort(rooms, room)
        groups_with[room].append(group)
    return groups


def _join(examples: Sequence[Example]) -> Example:
    input_ids, loss_mask, document_lengths = zip(*examples, strict=True)
    return Example(np.concatenate(input_ids), np.concatenate(loss_mask), sum(document_lengths, ()))
