"""Few rows of several adapters on a CPU: two products for all of them, in place of two for each.

    y_i += s_a B_a A_a x_i        as (K, m, in) (K, in, R) (K, R, out), with m rows of each adapter at most

A token of each row is little arithmetic. With the definition of segmented.py, eight adapters in all layers of
a small model are hundreds of tiny products, and to call PyTorch takes longer than to compute. So A and B of
the adapters are stacked, filled up to the largest rank with zeros, which add nothing. The stack is a copy in
memory, of MOST_NUMBERS at most: in larger layers a product takes longer than its call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.backend.fused_lora import Adapter

MOST_ROWS, MOST_NUMBERS = 64, 1 << 20
WASTE = 4  # times as many cells as rows, at most


class Stack(NamedTuple):
    """Adapters of one layer."""

    names: tuple[str, ...]
    A: Tensor  # (K, in, R) float32
    B: Tensor  # (K, R, out) float32, scaled
    sources: tuple[Tensor, ...]  # A and B of each adapter
    state: tuple[int, ...]  # of the sources when they were copied

    @property
    def is_fresh(self) -> bool:
        """Whether no adapter was written to since."""
        return self.state == _state(self.sources)


class Grid(NamedTuple):
    """Which row is in which cell. Empty cells are filled with row 0, and nobody reads their results."""

    filling: Tensor  # (K m,) rows
    rows: Tensor  # (n,) that have an adapter
    cells: Tensor  # (n,) of these rows


def stack_of(names: Sequence[str], adapters: Sequence[Adapter]) -> Stack | None:
    """Return a stack, or None for one that is too large."""
    R, width, out = max(len(a.A) for a in adapters), adapters[0].A.shape[1], len(adapters[0].B)
    if len(adapters) * R * (width + out) > MOST_NUMBERS:
        return None
    A, B = (torch.zeros(len(adapters), *shape) for shape in ((width, R), (R, out)))
    for k, adapter in enumerate(adapters):
        r = len(adapter.A)
        A[k, :, :r] = adapter.A.T
        torch.mul(adapter.B.T, adapter.scaling, out=B[k, :r])
    sources = tuple(t for adapter in adapters for t in adapter[:2])
    return Stack(tuple(names), A, B, sources, _state(sources))


def _state(sources: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(number for t in sources for number in (t.data_ptr(), t._version))


def grid_of(owners: Sequence[str | None], names: Sequence[str]) -> Grid | None:
    """Return where rows lie whose adapters are `owners`. None: too many cells would be empty."""
    taken: dict[str, list[int]] = {name: [] for name in names}
    for row, owner in enumerate(owners):
        if owner in taken:
            taken[owner].append(row)
    m = max(map(len, taken.values()))
    if len(names) * m > WASTE * len(owners):
        return None
    filling = [row for rows in taken.values() for row in (*rows, *[0] * (m - len(rows)))]
    cells = [k * m + j for k, rows in enumerate(taken.values()) for j in range(len(rows))]
    rows = [row for rows in taken.values() for row in rows]
    return Grid(*(torch.tensor(places, dtype=torch.long) for places in (filling, rows, cells)))


def add_stacked(y: Tensor, x: Tensor, stack: Stack, grid: Grid) -> None:
    """Add each row's update to y, in place. y: (rows, out), x: (rows, in). The sums are in float32."""
    cells = x.index_select(0, grid.filling).view(len(stack.names), -1, x.shape[1]).float()
    found = torch.bmm(torch.bmm(cells, stack.A), stack.B).flatten(0, 1)  # (K m, out)
    y.index_add_(0, grid.rows, found.index_select(0, grid.cells).to(y.dtype))
