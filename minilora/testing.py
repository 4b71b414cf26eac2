"""For property tests of LoRA and of quantization: Hypothesis strategies, and oracles to compare with.

    from hypothesis import given
    from minilora.testing import nearest_codes, weights

    @given(weights())
    def test_my_quantizer_chooses_the_nearest_code(weight):
        symbols, absmax = my_quantizer(weight)
        expected, margin = nearest_codes(weight, code, blocksize=64)
        assert (symbols == expected)[margin > 1e-6].all()

The oracles are slow and plain: float64, one idea a line, no packing, nothing shared with the code they check.
The strategies draw what breaks quantizers: blocks of zeros, values in the middle between two codes, one
outlier that flattens its block, subnormals, sizes that no block divides. They draw a seed and a plan rather
than single numbers, so tensors of thousands stay quick, and Hypothesis shrinks towards small, plain ones.
This is the only module that imports hypothesis, which is a test dependency.
"""

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAWS = ("zero block", "ties", "outliers", "subnormals", "constant block", "tiny block", "negative zeros")


def shapes(max_size: int = 5000, max_dims: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of 1 to `max_dims` dimensions and at most `max_size` elements; odd sizes, and those just beside
    a power of two.
    """
    edges = [2**k + d for k in range(5, 13) for d in (-1, 0, 1) if 2**k + d <= max_size]
    size = st.integers(1, 70) | st.sampled_from(edges)
    return (
        st.lists(size, min_size=1, max_size=max_dims)
        .map(tuple)
        .filter(lambda shape: math.prod(shape) <= max_size)
    )


def lora_shapes(max_features: int = 96, max_rank: int = 16) -> st.SearchStrategy[tuple[int, int, int]]:
    """(in, out, r): any widths, with r from 1 to beyond both, which is allowed though wasteful."""
    features = st.integers(1, max_features)
    return st.tuples(features, features, st.integers(1, max_rank))


@st.composite
def weights(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    flaws: tuple[str, ...] = FLAWS,
    code: Tensor | None = None,
    blocksize: int = 64,
) -> Tensor:
    """Finite tensors, normally distributed at some scale, with a few of `flaws`.

    code, blocksize: of the quantizer under test, for the flaws that aim at it. Ties are exact in the scaled
    value where the block's absmax is a power of two, which they see to.
    """
    size = draw(shapes() if shape is None else shape)
    dtype = draw(st.sampled_from(dtypes))
    exponent = draw(st.integers(-12, 4) | st.integers(-30, 14))  # float16 overflows at 2^16
    chosen = draw(st.sets(st.sampled_from(flaws), max_size=4)) if flaws else set()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(math.prod(size), generator=generator) * 2.0**exponent
    for flaw in sorted(chosen):
        start = int(torch.randint(-(-len(values) // blocksize), (), generator=generator)) * blocksize
        _spoil(values[start : start + blocksize], flaw, code, 2.0**exponent, generator)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).reshape(size).to(dtype)


def _spoil(block: Tensor, flaw: str, code: Tensor | None, scale: float, generator: torch.Generator) -> None:
    """Give one block of a tensor a flaw, in place."""
    if flaw == "zero block":
        block.zero_()
    elif flaw == "constant block":
        block.fill_(-scale)
    elif flaw == "negative zeros":
        block[::2] = -0.0
    elif flaw == "outliers":
        block[int(torch.randint(len(block), (), generator=generator))] = 1000 * scale
    elif flaw == "tiny block":
        block.mul_(2.0**-20)
    elif flaw == "subnormals":
        block.mul_(2.0**-120).mul_(2.0**-15 / scale)
    elif flaw == "ties":
        places = (torch.linspace(-1, 1, 17) if code is None else code).sort().values
        middles = (places[:-1] + places[1:]) / 2
        block.copy_(middles[torch.randint(len(middles), (len(block),), generator=generator)] * scale)
        block[0] = scale  # the block's absmax
    else:
        raise ValueError(f"unknown flaw {flaw!r}; known: {', '.join(FLAWS)}")


def blocks_of(weight: Tensor, blocksize: int) -> list[Tensor]:
    """The weight in memory order, cut into blocks, the last one perhaps shorter; float64."""
    return list(weight.detach().double().reshape(-1).split(blocksize))


def nearest_codes(weight: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The index in `code` that is nearest to each value / absmax, by trying all of them, and by how much it
    beats the next value.

    -> symbols (n,) int64, the first of equals; margin (n,) float64, in units of absmax: where it is smaller
    than the rounding errors of a quantizer, about 1e-7 in float32, either neighbour is right. Blocks of zeros
    are nearest to 0.
    """
    symbols, margins = [], []
    for block in blocks_of(weight, blocksize):
        absmax = block.abs().max()
        scaled = block / absmax if absmax > 0 else block
        distance = (scaled[:, None] - code.double()).abs()  # (b, 16)
        symbol = distance.argmin(dim=1)
        other = code.double() != code.double()[symbol][:, None]  # fp4 has two zeros
        margins.append(distance.masked_fill(~other, math.inf).amin(dim=1) - distance.amin(dim=1))
        symbols.append(symbol)
    return torch.cat(symbols), torch.cat(margins)


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


def lora_reference(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """x (W + scaling * B A)^T in float64, with the update written out. x: (..., in), A: (r, in), B: (out, r)
    -> (..., out).
    """
    updated = weight.double() + scaling * (B.double() @ A.double())  # (out, in)
    return x.double() @ updated.T


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
