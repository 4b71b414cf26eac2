"""Which rows of a batch belong together: those of one adapter are a segment (see segmented.py)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.backend.tables import table


class Segments(NamedTuple):
    """Which rows belong together: segment i is order[bounds[i] : bounds[i + 1]]."""

    order: Tensor | None  # (rows,) int64 on the device of x; None: the rows lie in the order of the segments
    bounds: tuple[int, ...]

    def rows(self, x: Tensor, i: int) -> Tensor:
        """Return the rows of segment i, (n, ...): a view if they lie together."""
        start, end = self.bounds[i : i + 2]
        return x[start:end] if self.order is None else x.index_select(0, self.order[start:end])

    @property
    def are_long(self) -> bool:
        """Whether a segment has 16 rows or more, on average."""
        return self.bounds[-1] >= 16 * (len(self.bounds) - 1)

    def table(self, rows_of: Callable, key: tuple, device: torch.device) -> Tensor:
        """Return a table for a kernel (see tables.py)."""
        return table(rows_of, key, device)

    def put(self, y: Tensor, i: int, part: Tensor) -> None:
        """Write the rows of segment i, (n, ...), to y."""
        start, end = self.bounds[i : i + 2]
        if self.order is None:
            y[start:end] = part
        else:
            y.index_copy_(0, self.order[start:end], part)

    def sorted(self, x: Tensor) -> Tensor:
        """Return all rows in the order of the segments, (rows, ...)."""
        return x if self.order is None else x.index_select(0, self.order)
