"""Many adapters in one product: each row of x meets its own A and B (the segmented gather product).

    y_i += n_i B_a^T        n_i = s_a dropout(x_i) A_a^T        a: the adapter of row i, or none

One copy of the frozen W serves a batch in which every row belongs to another adapter: Punica (Chen et al.
2023, arXiv:2310.18547, section 4) and S-LoRA (Sheng et al. 2023, arXiv:2311.03285, section 5) compute it so.
It is two passes. The first shrinks a row to the r numbers of its adapter, the second expands them. Both are
one operation with other factors, and so is the backward pass:

    shrink(x, F)   n_i = s_a x_i F_a^T    F = A, and of dy F = B^T: g_i = s_a dy_i B_a
    expand(y, F)   y_i += n_i F_a^T       F = B, and into dx F = A^T: dx_i += g_i A_a
    dA_a = g_a^T dropout(x_a)             dB_a = dy_a^T n_a           over the rows of the adapter

Rows of one adapter are a segment (segments.py). They need not lie together: `Segments.order` sorts them.
Ranks may differ: n is as wide as the largest, and a row uses the first r numbers. Scalings, which dropout's
gain is part of, are an adapter's own, too.

The definition takes one segment after the other: two thin products each, as an adapter alone takes them. On a
GPU one kernel takes all segments (kernels/segmented.py). It reads A and B as they are stored, in float32, so
that no token waits for a cast.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.backend.choice import fastest, has_tensor_cores, product_dtype
from minilora.backend.dropout import dropout_definition
from minilora.backend.fused_lora import Adapter, wide_product
from minilora.backend.segments import Segments
from minilora.backend.tables import NoTable


def segmented_update(
    y: Tensor,  # (..., out), written to
    x: Tensor,  # (..., in)
    adapters: Sequence[Adapter | None],  # of each segment
    segments: Segments,  # of the rows of x
    draws: Sequence[tuple[int, int]] = (),  # of dropout: a seed and a stream of each segment that drops
) -> Tensor:
    """Return y with every row's update added in place; gradients reach y, x and all A and B."""
    tensors = [t for adapter in adapters if adapter for t in adapter[:2]]
    return _SegmentedUpdate.apply(y, x, _Call(tuple(adapters), segments, draws), *tensors) if tensors else y


class _Call(NamedTuple):
    adapters: tuple[Adapter | None, ...]
    segments: Segments
    draws: Sequence[tuple[int, int]]

    @property
    def scalings(self) -> list[float]:
        return [adapter.scaling if adapter else 0.0 for adapter in self.adapters]

    def spread(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the tensor of each segment, None for one without an adapter."""
        given = iter(tensors)
        return [next(given) if adapter else None for adapter in self.adapters]

    def dropped(self, x: Tensor) -> Tensor:
        """Return dropout(x), (rows, in), without the gain. A segment draws as if it were alone."""
        thresholds = [adapter.threshold if adapter else 0 for adapter in self.adapters]
        if not any(thresholds):
            return x
        dropped, drop = x.clone(), fastest("dropout", x, dropout_definition)
        for i, threshold in enumerate(thresholds):
            if threshold:
                part = drop(self.segments.rows(x, i), *self.draws[i], threshold)
                self.segments.put(dropped, i, part)
        return dropped


class _SegmentedUpdate(torch.autograd.Function):
    """See the module's docstring. The inputs behind `call` are A and B of each segment's adapter in turn."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, call: _Call, *tensors: Tensor) -> Tensor:
        dtype = product_dtype(x)
        As, Bs = call.spread(tensors[::2]), call.spread(tensors[1::2])
        narrow = shrink(call.dropped(_rows(x)).to(dtype), As, call.scalings, call.segments)
        expand(y.view(-1, y.shape[-1]), narrow, Bs, call.segments)
        ctx.mark_dirty(y)
        ctx.call, ctx.dtypes = call, (x.dtype, dtype)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3::2]) else None, narrow, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, *tensors = ctx.saved_tensors
        call, segments, (x_dtype, dtype) = ctx.call, ctx.call.segments, ctx.dtypes
        dy_rows, dx, gradients = _rows(dy).to(dtype), None, []
        Bs = [None if B is None else B.T for B in call.spread(tensors[1::2])]
        g = shrink(dy_rows, Bs, call.scalings, segments)  # (rows, R)
        if ctx.needs_input_grad[1]:
            As = [None if A is None else A.T for A in call.spread(tensors[::2])]
            dx = dy_rows.new_zeros(len(dy_rows), tensors[0].shape[1])
            expand(dx, g, As, segments)
            dx = call.dropped(dx).to(x_dtype).view(*dy.shape[:-1], -1)
        dropped = None if x is None else call.dropped(_rows(x)).to(dtype)
        needs = iter(ctx.needs_input_grad[3:])
        for i, adapter in enumerate(call.adapters):
            if adapter is None:
                continue
            (start, end), r = segments.bounds[i : i + 2], len(adapter.A)
            need_A, need_B = next(needs), next(needs)
            dA = wide_product(g[start:end, :r].T, segments.rows(dropped, i)) if need_A else None
            dB = wide_product(segments.rows(dy_rows, i).T, narrow[start:end, :r]) if need_B else None
            gradients += [None if d is None else d.to(t.dtype) for d, t in ((dA, adapter.A), (dB, adapter.B))]
        return dy, dx, None, *gradients


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


# ---- the two passes ----------------------------------------------------------------------------------------


def shrink(
    x: Tensor, factors: Sequence[Tensor | None], scalings: Sequence[float], segments: Segments
) -> Tensor:
    """Return n_i = s_a x_i F_a^T, (rows, R), in the order of the segments; R is the largest rank.

    x: (rows, in), in any order; F_a: (r, in), in the dtype of x or as it is stored. Columns from an adapter's
    r on, and rows without an adapter, are not defined.
    """
    try:
        return _form("shrink", x, factors, segments, shrink_definition)(x, factors, scalings, segments)
    except NoTable:
        return shrink_definition(x, factors, scalings, segments)


def expand(y: Tensor, n: Tensor, factors: Sequence[Tensor | None], segments: Segments) -> None:
    """y_i += n_i F_a^T, in place. y: (rows, out), in any order; n: as `shrink` returns it; F_a: (out, r)."""
    try:
        _form("expand", n, factors, segments, expand_definition)(y, n, factors, segments)
    except NoTable:
        expand_definition(y, n, factors, segments)


def _form(operation: str, x: Tensor, factors: Sequence, segments: Segments, definition: Callable) -> Callable:
    """Return the kernel or the definition. A kernel reads factors of one dtype. Long segments it takes on
    tensor cores only: elsewhere a product for each is faster.
    """
    dtypes = {F.dtype for F in factors if F is not None}
    if len(dtypes) > 1 or torch.float64 in dtypes or (segments.are_long and not has_tensor_cores(x)):
        return definition
    return fastest(operation, x, definition)


def shrink_definition(
    x: Tensor, factors: Sequence[Tensor | None], scalings: Sequence[float], segments: Segments
) -> Tensor:
    """See `shrink`."""
    n, x = x.new_empty(len(x), max(len(F) for F in factors if F is not None)), segments.sorted(x)
    for F, scaling, start, end in zip(factors, scalings, *_ends(segments), strict=True):
        if F is not None:
            part = n[start:end, : len(F)]
            torch.addmm(part, x[start:end], F.to(x.dtype).T, beta=0, alpha=scaling, out=part)
    return n


def expand_definition(y: Tensor, n: Tensor, factors: Sequence[Tensor | None], segments: Segments) -> None:
    """See `expand`. Rows that do not lie together get their updates in one addition, not one a segment."""
    in_place = segments.order is None and y.dtype == n.dtype
    updates = y if in_place else n.new_zeros(y.shape)
    for F, start, end in zip(factors, *_ends(segments), strict=True):
        if F is not None:
            updates[start:end].addmm_(n[start:end, : F.shape[1]], F.to(n.dtype).T)
    if in_place:
        return
    if segments.order is None:
        y += updates.to(y.dtype)
    else:
        y.index_add_(0, segments.order, updates.to(y.dtype))


def _ends(segments: Segments) -> tuple[Sequence[int], Sequence[int]]:
    return segments.bounds[:-1], segments.bounds[1:]
