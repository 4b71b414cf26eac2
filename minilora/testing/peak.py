"""How much memory a function takes at its peak: exact, and the same each time."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that PyTorch's tensors on the CPU held at a time while the function ran, beyond what
    they held before.

    From the allocator's own events, so it is exact and the same each time, other than the memory of the
    process.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [
        (e.start_ns(), e.nbytes())
        for e in profiler.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return max(accumulate(nbytes for _, nbytes in sorted(events)), default=0)
