"""Do the Triton kernels of a GPU compute their definitions? Each tries once for each dtype, on its first use.

A kernel that compiles may still be wrong for a card, a driver or a compiler that nobody has tried. So it
computes the trials of elementwise_trial.py, a few rows each, and the results are compared with those of the
definition on the CPU. A kernel that fails, or computes something else, is not used: one line says so, and the
definition runs.

The bits need not be the same: sums have another order, and a GPU's exp is another one. What is compared is
the distance, in roundings to the dtype. An element that is dropped but should not be, a sign or a factor that
is wrong, is off by hundreds.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import elementwise_trial
from minilora.backend.library import warn
from minilora.backend.native_trial import trial_values
from minilora.backend.segments import Segments
from minilora.system.errors import one_line

_ROUNDINGS = 8  # of the largest value, in a chain of at most four operations
_DRAWS = 0x123456789ABCDEF0, 3, 19661  # seed, stream, threshold


@lru_cache
def passed(
    operation: str, form: Callable, definition: Callable, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a kernel, `form`, can be used on a GPU for tensors of a dtype."""
    problem = _problem(TRIALS[operation], form, definition, device, dtype)
    if problem:
        warn(f"{operation} is slower here, without its Triton kernel: {problem}")
    return not problem


def _problem(
    trial: Callable, form: Callable, definition: Callable, device: torch.device, dtype: torch.dtype
) -> str:
    """Return '' if both compute the same, else what happened."""
    try:
        found = trial(_on(device, form), dtype)
    except Exception as error:  # whatever a compiler, a driver or an installation may raise
        return f"{type(error).__name__}: {one_line(str(error))}"
    bound = _ROUNDINGS * torch.finfo(dtype).eps
    for mine, right in zip(found, trial(definition, dtype), strict=True):
        mine, right = mine.float(), right.float()
        if not ((mine - right).abs() <= bound * right.abs().max()).all():
            return "a trial gave other numbers than the definition"
    return ""


def _on(device: torch.device, form: Callable) -> Callable:
    """Return a function of the host's tensors that computes on a device, in place where the form does."""

    def moved(t):
        if isinstance(t, Segments):
            return Segments._make(map(moved, t))
        if isinstance(t, list):
            return [*map(moved, t)]
        return t.to(device) if isinstance(t, Tensor) else t

    def run(*operands, **options):
        there = [*map(moved, operands)]
        results = form(*there, **options)
        for mine, other in zip(operands, there, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        if isinstance(results, tuple):
            return tuple(t.cpu() for t in results)
        return results if results is None else results.cpu()

    return run


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (40, 72), A (5, 72) and g (40, 5)."""
    return tuple(trial_values(n * m).view(n, m).to(dtype) for n, m in ((40, 72), (5, 72), (40, 5)))


def _dropped_product_trial(product: Callable, dtype: torch.dtype) -> list[Tensor]:
    x, A, _ = _operands(dtype)
    return [product(x, A, *_DRAWS)]


def _product_with_dropped_trial(product: Callable, dtype: torch.dtype) -> list[Tensor]:
    x, _, g = _operands(dtype)
    return [product(g, x, *_DRAWS)]


def _add_dropped_product_trial(add: Callable, dtype: torch.dtype) -> list[Tensor]:
    x, A, g = _operands(dtype)
    add(x, g, A, *_DRAWS)
    return [x]


def _mixtures(A: Tensor) -> Iterator[tuple[list[Tensor | None], Segments]]:
    """Yield factors, (r, 72) float32, and segments of 40 rows: short ones, and long ones in another order."""
    A = A.float()
    yield [A[:2], None, A], Segments(None, (0, 7, 18, 40))
    yield [A[3:4], A], Segments(torch.arange(39, -1, -1, device="cpu"), (0, 3, 40))


def _shrink_trial(shrink: Callable, dtype: torch.dtype) -> list[Tensor]:
    (x, A, _), found = _operands(dtype), []
    for factors, segments in _mixtures(A):
        n = shrink(x, factors, [0.5, 1.0, 2.0][: len(factors)], segments)
        parts = zip(factors, segments.bounds, segments.bounds[1:], strict=False)
        found += [n[start:end, : len(F)] for F, start, end in parts if F is not None]
    return found


def _expand_trial(expand: Callable, dtype: torch.dtype) -> list[Tensor]:
    x, A, n = _operands(dtype)
    for factors, segments in _mixtures(A):
        expand(x, n, [None if F is None else F.T for F in factors], segments)
        expand(x, n, [None if F is None else F.T.contiguous() for F in factors], segments)
    return [x]


TRIALS = elementwise_trial.TRIALS | {
    "dropped_product": _dropped_product_trial,
    "product_with_dropped": _product_with_dropped_trial,
    "add_dropped_product": _add_dropped_product_trial,
    "shrink": _shrink_trial,
    "expand": _expand_trial,
}
