"""Dropout whose mask is never stored: drawn from a seed, and drawn again in backward.

Which element is dropped is a function of (seed, stream, row, column) alone: Philox-4x32-10, a counter-based
generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3). It encrypts a
counter with a key, so that every element's bits can be had at any time, in any order, on any device:

    key        the seed, 64 bits
    counter    (column // 8, row, stream, 0): 128 bits, which are 16 for each of 8 columns
    dropped    where these 16 bits are below `threshold` = p * 65536, rounded

The draws are the same in PyTorch, in C and in Triton. So a run drops the same elements on a CPU and on a GPU,
and a second run of a layer needs the seed and no mask. A seed comes from the CPU's generator: no GPU is asked
for it, and whoever restores that generator's state repeats the draws.
"""

import torch
from torch import Tensor

from minilora.backend.choice import fastest
from minilora.backend.scratch import scratch

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF  # the lower 32 bits


def threshold_of(p: float) -> int:
    """Return below which of 65536 values an element is dropped. Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"a dropout probability is at least 0 and below 1, not {p}")
    return min(round(p * 65536), 65535)


def gain_of(threshold: int) -> float:
    """Return 1 / (1 - p) of the probability that is drawn with: what is kept is enlarged by it."""
    return 65536 / (65536 - threshold)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return a new seed, in [0, 2^63), from a generator: by default PyTorch's for the CPU."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator))


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Encrypt counters with the key `seed`. counter: four int64 tensors of 32 bits each -> four alike."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(ROUNDS):
        # int64 products wrap around, which leaves their 64 bits as they are: unsigned ones.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (product1 >> 32 & LOW) ^ c1 ^ k0, (product0 >> 32 & LOW) ^ c3 ^ k1
        c1, c3 = product1 & LOW, product0 & LOW
        k0, k1 = k0 + KEY_STEPS[0] & LOW, k1 + KEY_STEPS[1] & LOW
    return c0, c1, c2, c3


def kept(rows: int, columns: int, seed: int, stream: int, threshold: int, device: torch.device) -> Tensor:
    """Return which elements stay: bool (rows, columns)."""
    group = torch.arange(-(-columns // 8), device=device).view(1, -1)
    row = torch.arange(rows, device=device).view(-1, 1)
    zero = torch.zeros_like(group + row)
    words = torch.stack(philox((group + zero, row + zero, zero + stream, zero), seed), dim=-1)  # (.., .., 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (rows, groups, 4, 2): the lower half first
    return (halves >= threshold).flatten(1)[:, :columns]


def dropout_definition(
    x: Tensor, seed: int, stream: int, threshold: int, out: Tensor | None = None
) -> Tensor:
    """Return x where it is kept, else 0, in `out` if given. x: (rows, columns). The gain is the caller's."""
    return torch.mul(x, kept(*x.shape, seed, stream, threshold, x.device), out=out)


def add_dropped_definition(x: Tensor, y: Tensor, seed: int, stream: int, threshold: int) -> None:
    """x += dropout(y): its backward, added to what is there. x, y: (rows, columns)."""
    x += y * kept(*x.shape, seed, stream, threshold, x.device)


# ---- with the thin products beside it, which a kernel may do in one pass -----------------------------------


def dropped_product_definition(x: Tensor, A: Tensor, seed: int, stream: int, threshold: int) -> Tensor:
    """Return dropout(x) A^T, (rows, r). x: (rows, in), A: (r, in)."""
    return _dropped(x, seed, stream, threshold) @ A.T


def product_with_dropped_definition(g: Tensor, x: Tensor, seed: int, stream: int, threshold: int) -> Tensor:
    """Return g^T dropout(x), (r, in). g: (rows, r), x: (rows, in)."""
    return g.T @ _dropped(x, seed, stream, threshold)


def add_dropped_product_definition(
    dx: Tensor, g: Tensor, A: Tensor, seed: int, stream: int, threshold: int
) -> None:
    """dx += dropout(g A), in place. dx: (rows, in), g: (rows, r), A: (r, in)."""
    update = torch.mm(g, A, out=scratch(tuple(dx.shape), dx.dtype, dx.device))
    fastest("add_dropped", dx, add_dropped_definition)(dx, update, seed, stream, threshold)


def _dropped(x: Tensor, seed: int, stream: int, threshold: int) -> Tensor:
    """Return dropout(x) in the scratch buffer: for a product that follows at once."""
    out = scratch(tuple(x.shape), x.dtype, x.device)
    return fastest("dropout", x, dropout_definition)(x, seed, stream, threshold, out=out)
