"""What a quantizer should give, slowly and plainly: float64, one idea a line, nothing shared with the code
under test.

**Which inputs have no single right answer?** Three kinds.

- A value in the middle between two codes, or so near to it that float32 cannot tell: either is nearest.
- A code that holds one value twice, as FP4 holds zero: both symbols are right, and mean the same.
- A block whose largest magnitude is subnormal, below 2^-126. It has fewer bits than 24 and its reciprocal may
  overflow, so quantizers put a floor under it. Nothing is then said of its symbols, only that its values stay
  that small.

`is_nearest` accepts every right answer of these and no other.
"""

import math

import torch
from torch import Tensor

SMALLEST = 2.0**-126  # of float32's normal numbers
# A float32 quantizer rounds the reciprocal, the scaled value, the midpoint and the product, 2^-24 of absmax
# each: 2^-22. A wrong choice shows twice, as distance lost on one side and won on the other.
ROUNDING = 2.0**-21


def blocks_of(weight: Tensor, blocksize: int) -> list[Tensor]:
    """The weight in memory order, cut into blocks, the last one perhaps shorter; float64."""
    return list(weight.detach().double().reshape(-1).split(blocksize))


def absmax_of(weight: Tensor, blocksize: int | None) -> Tensor:
    """Return each value's scale: the largest magnitude of its block, or of its row where blocksize is None.
    (...) -> (n,) float64.
    """
    rows = weight.reshape(-1, weight.shape[-1]).double() if blocksize is None else ()
    blocks = list(rows) if blocksize is None else blocks_of(weight, blocksize)
    return torch.cat([block.abs().amax().expand(len(block)) for block in blocks])


def nearest_codes(weight: Tensor, code: Tensor, blocksize: int | None) -> tuple[Tensor, Tensor]:
    """The index in `code` that is nearest to each value / absmax, by trying all of them, and by how much it
    beats the next value.

    -> symbols (n,) int64, the first of equals; margin (n,) float64, in units of absmax: where it is smaller
    than the rounding errors of a quantizer, about 1e-7 in float32, either neighbour is right. Blocks of zeros
    are nearest to 0. In subnormal blocks the margin is 0.
    """
    distance = _distances(weight, code, blocksize)  # (n, codes)
    symbols = distance.argmin(dim=1)
    other = code.double() != code.double()[symbols][:, None]  # fp4 has two zeros
    margins = distance.masked_fill(~other, math.inf).amin(dim=1) - distance.amin(dim=1)
    absmax = absmax_of(weight, blocksize)
    return symbols, margins.masked_fill((absmax > 0) & (absmax < SMALLEST), 0)


def is_nearest(symbols: Tensor, weight: Tensor, code: Tensor, blocksize: int | None = 64) -> Tensor:
    """Return whether each symbol is right: (n,) bool. symbols: (n,), indices into `code`, in memory order.

    Right is every symbol whose value is as near as the nearest, up to float32's rounding; in a block of
    subnormal numbers, every symbol.
    """
    distance = _distances(weight, code, blocksize)
    chosen = distance.gather(1, symbols.long()[:, None])[:, 0]
    absmax = absmax_of(weight, blocksize)
    return (chosen <= distance.amin(dim=1) + ROUNDING) | ((absmax > 0) & (absmax < SMALLEST))


def smallest_errors(weight: Tensor, code: Tensor, blocksize: int | None) -> Tensor:
    """Return the error of the best code for each value: (n,) float64, in the weight's units."""
    return _distances(weight, code, blocksize).amin(dim=1) * absmax_of(weight, blocksize)


def _distances(weight: Tensor, code: Tensor, blocksize: int | None) -> Tensor:
    """Return | value / absmax - code |: (n, codes) float64."""
    absmax = absmax_of(weight, blocksize)
    scaled = weight.detach().double().reshape(-1) / absmax.masked_fill(absmax == 0, 1)
    return (scaled[:, None] - code.double()).abs()


def unpack_symbols(packed: Tensor, n: int) -> Tensor:
    """packed: two symbols a byte, the first in the high nibble -> (n,) int64."""
    bytes_ = packed.reshape(-1).tolist()
    return torch.tensor([symbol for byte in bytes_ for symbol in divmod(byte, 16)][:n])


def dequantize_reference(symbols: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """code[symbol] * absmax of its block: (n,) float64, exact (24 + 24 bits)."""
    scale = absmax.double().repeat_interleave(blocksize)[: len(symbols)]
    return code.double()[symbols] * scale


def largest_half_gap(code: Tensor) -> float:
    """Return half the largest distance between neighbouring codes: no value is further from the nearest."""
    return float(code.double().sort().values.diff().max() / 2)
