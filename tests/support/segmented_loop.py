"""What segmented products are, row by row in float64: for tests of the definition and of the kernels."""

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from minilora.backend.dropout import kept
from minilora.backend.fused_lora import Adapter
from minilora.backend.segmented import segmented_update
from minilora.backend.segments import Segments
from support.rounding import randn

DRAWS = [(2**40 + 3 + i, 5) for i in range(64)]  # a seed and a stream of each segment
THRESHOLD = 16384  # a quarter is dropped


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


# ---- both products, and their gradients ----------------------------------------------------------------------


def adapters_of(ranks, width: int, out: int, dtype=torch.float32, threshold=0) -> list[Adapter | None]:
    """Adapters with scalings of their own; every second one drops, if any does."""
    return [
        None
        if r is None
        else Adapter(
            randn(r, width, dtype=dtype, seed=i).requires_grad_(),
            randn(out, r, dtype=dtype, seed=50 + i).requires_grad_(),
            0.3 + 0.1 * i,
            threshold * (i % 2),
        )
        for i, r in enumerate(ranks)
    ]


def by_rows(y, x, adapters, segments):
    """y + s_a (mask_i x_i) A_a^T B_a^T of each row, (rows, out) float64."""
    rows = [*y.double()]
    for row, i, k in owners_of(segments):
        if adapters[i] is not None:
            A, B, scaling, threshold = adapters[i]
            count = segments.bounds[i + 1] - segments.bounds[i]
            mask = kept(count, x.shape[1], *DRAWS[i], threshold, x.device)[k]
            rows[row] = rows[row] + B.double() @ (scaling * (A.double() @ (x[row].double() * mask)))
    return torch.stack(rows)


def result_and_gradients(function, y, x, adapters, segments, dy):
    """The result, and the gradients of y, x and every A and B: zeros of an adapter without rows."""
    y, x = y.detach().requires_grad_(), x.detach().requires_grad_()
    leaves = [y, x, *chain(*(adapter[:2] for adapter in adapters if adapter))]
    result = function(y, x, adapters, segments)
    dy = dy.to(result.dtype)
    return [
        result.detach(),
        *torch.autograd.grad(result, leaves, dy, allow_unused=True, materialize_grads=True),
    ]


def ours(y, x, adapters, segments):
    return segmented_update(y.clone(), x, adapters, segments, DRAWS)


def magnitudes(adapters):
    """The adapters with |A| and |B|."""
    pairs = [None if a is None else (a.A.detach().abs(), a.B.detach().abs(), a) for a in adapters]
    return [p and Adapter(p[0].requires_grad_(), p[1].requires_grad_(), *p[2][2:]) for p in pairs]
