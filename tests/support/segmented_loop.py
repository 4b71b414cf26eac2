"""What segmented products are, row by row in float64: for tests of the definition and of the kernels."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minilora.backend.segments import Segments


def segments_of(sizes: Sequence[int], shuffled: bool, device: str | torch.device = "cpu") -> Segments:
    """Segments of these sizes, whose rows lie in order or anywhere."""
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(7)) if shuffled else None
    return Segments(None if order is None else order.to(device), tuple(accumulate(sizes, initial=0)))


def owners_of(segments: Segments) -> list[tuple[int, int, int]]:
    """Of each place in the order of segments: its row, its segment, and which row of the segment it is."""
    order = range(segments.bounds[-1]) if segments.order is None else segments.order.tolist()
    found = []
    for i, (start, end) in enumerate(zip(segments.bounds, segments.bounds[1:], strict=False)):
        found += [(order[place], i, place - start) for place in range(start, end)]
    return found


def shrink_by_rows(
    x: Tensor, factors: Sequence[Tensor | None], scalings: Sequence[float], segments: Segments
) -> list[Tensor | None]:
    """n of each place, (r,) float64, None without an adapter."""
    factors = [None if F is None else F.double() for F in factors]
    return [
        None if factors[i] is None else scalings[i] * (factors[i] @ x[row].double())
        for row, i, _ in owners_of(segments)
    ]


def expand_by_rows(
    y: Tensor, n: Sequence[Tensor | None], factors: Sequence[Tensor | None], segments: Segments
) -> Tensor:
    """y_i + n_i F^T, (rows, width) float64. n: (r or more,) of each place."""
    rows = [*y.double()]
    factors = [None if F is None else F.double() for F in factors]
    for place, (row, i, _) in enumerate(owners_of(segments)):
        if factors[i] is not None:
            rows[row] = rows[row] + factors[i] @ n[place][: factors[i].shape[1]].double()
    return torch.stack(rows)
