"""The card: what it is, how long a function takes on it, and what it can do at best.

A kernel is judged beside the rate at which this card copies memory, and a training step beside the rate of
its largest matrix products. Both are measured, not read from a data sheet.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minilora.system.device import choose_placement
from minilora.system.errors import UserError

T4_BYTES = 15 * 2**30  # of a T4's 16 GB, what its driver leaves


@dataclass(frozen=True)
class Card:
    """The card that is checked, and how it is used."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    dtype: torch.dtype  # the 16-bit dtype in which it trains
    emulates_t4: bool = False
    device: torch.device = torch.device("cuda", 0)


def read_card() -> Card:
    """Return the first GPU. Raises UserError if there is none, or one that minilora refuses."""
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU was found, and this script checks one; see `nvidia-smi`")
    dtype = choose_placement().dtype
    capability, (_, memory) = torch.cuda.get_device_capability(0), torch.cuda.mem_get_info(0)
    return Card(torch.cuda.get_device_name(0), tuple(capability), memory, dtype)


def as_t4(card: Card) -> Card:
    """Make this process use the card as a T4 would be used: float16, 15 GiB, no flash attention.

    Its kernels are still compiled for the card itself, and its speed is its own.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if card.memory > T4_BYTES:
        torch.cuda.set_per_process_memory_fraction(T4_BYTES / card.memory, card.device)
    return replace(card, dtype=torch.float16, memory=min(card.memory, T4_BYTES), emulates_t4=True)


def milliseconds(function: Callable[[], object], repeat: int, cache_bytes: int) -> float:
    """Return the median time of a call on the card, by events.

    Before each call, zeros are written to `cache_bytes`, more than the L2 cache holds. So the call finds its
    inputs in memory; and the host, which queues everything without waiting, is ahead of the card.
    """
    flush = torch.empty(cache_bytes, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


@dataclass(frozen=True)
class Stopwatch:
    """`milliseconds` with the settings of a whole check or of a dry run."""

    tiny: bool

    def __call__(self, function: Callable[[], object]) -> float:
        return milliseconds(function, *(2, 1 << 10) if self.tiny else (20, 512 << 20))

    def copy_rate(self) -> float:
        """Return bytes a second, read and written, of a copy of half a gigabyte."""
        source = torch.ones(1 << 10 if self.tiny else 512 << 20, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self(lambda: target.copy_(source)) * 1e3

    def product_rate(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations a second of a large product."""
        n = 64 if self.tiny else 8192
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device="cuda")
        return 2 * n**3 / self(lambda: torch.mm(a, b, out=out)) * 1e3


def empty_memory() -> None:
    """Free everything that nobody uses, and start to count peaks anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
