"""Weights in 4 or 8 bits: codebooks, blocks, and scales that are quantized in turn (QLoRA, arXiv:2305.14314,
section 3).

    w  ~  code[symbol] * absmax            symbol: 4 bits, one a weight       absmax: one a block of 64 weights

A weight matrix is cut, in memory order and across its rows, into blocks. Each block is divided by its largest
magnitude, and every value in [-1, 1] becomes the nearest of sixteen codes. Where the codes lie is all there
is to choose:

    nf4   quantiles of the normal distribution: close together where weights, which are about normal, are many (appendix E)
    fp4   a float of 1 sign, 2 exponent and 1 mantissa bits, evenly coarse in proportion to the value; checkpoints have it

One outlier makes its whole block coarse, so blocks are small; but a float32 scale for 64 weights costs half a
bit a weight. Double quantization stores the scales in 8 bits too, centred on their mean, in blocks of 256
with a float32 scale each:

    absmax  ~  dynamic_code[place] * nested_absmax + offset          4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight, not 4.5

Their code is the dynamic one (arXiv:2110.02861, section 2), whose steps grow with the value, so that it holds
seven decades.

Everything here is bitsandbytes' arithmetic to the bit, and its format on disk to the byte: checkpoints go
both ways. Its numbers on a CPU are the reference; PyTorch's mean and bitsandbytes' own CUDA kernels may
differ from them in the last bit. Two things of bitsandbytes 0.50 are not followed. On CPUs with AVX-512 it
gives the wrong scale to a block that spans rows of a matrix whose width is a multiple of 16 and not of the
block. And fp4's second zero, symbol 8, reads as -0 or +0 depending on CPU and width; here as +0.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from minilora import ops
from minilora.system.errors import UserError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TABLE = dict(
    dtype=torch.float32, device="cpu"
)  # of every codebook at first, whatever the defaults are at that moment


@lru_cache
def four_bit_code(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of the sixteen symbols, (16,) float32, largest magnitude 1. Shared: do not write to it.

    nf4: probabilities evenly spaced from 1/2 to 0.9677083 = (1 - 1/30 + 1 - 1/32) / 2, seven for the negative
    codes and eight for the positive ones; their normal quantiles; divided by the largest. Zero is a code of
    its own, for padding and pruned weights. The published float32 table is rounded after each of these three
    steps, and so is this one: it is the same to the bit.

    fp4: sign, two bits of exponent e, one of mantissa m. Here the exponent counts downwards: 2^(4-e) (1 +
    m/2) for e = 1, 2, 3 and m/16 for e = 0, all divided by 12, the largest.
    """
    if quant_type == "nf4":
        below, above = (torch.linspace(0.9677083, 0.5, count + 1, **_TABLE)[:-1].tolist() for count in (7, 8))
        quantile = NormalDist().inv_cdf
        code = torch.tensor(
            [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in reversed(above)], **_TABLE
        )
    elif quant_type == "fp4":
        magnitudes = [2.0 ** (4 - e) * (1 + m / 2) if e else m / 16 for e in range(4) for m in range(2)]
        code = torch.tensor(magnitudes + [0.0 - x for x in magnitudes], **_TABLE)
    else:
        raise UserError(f"quant_type {quant_type!r} is not known; choose {' or '.join(QUANT_TYPES)}")
    return (code / code.max()).to(device)


@lru_cache
def dynamic_code(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the 8-bit dynamic code, (256,) float32, ascending from about -1, or 0, to 1. Shared:
    do not write to it.

    A byte is a sign (if signed), a unary exponent of i zeros and a one, and what is left as a linear
    fraction: in each of seven decades, 10^-7..10^-6 up to 0.1..1, the midpoints of 2^i, or unsigned 2^(i+1),
    equal parts of the decade. And 0, and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, **_TABLE)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        values += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(values), **_TABLE).to(device)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 4 bits. The two codebooks, 1.1 kB, are the module's and the same for all."""

    packed: Tensor  # (ceil(n / 2),) uint8: two symbols a byte, the first in the high nibble
    absmax: Tensor  # (blocks,) float32, or uint8 when doubly quantized
    shape: torch.Size
    dtype: torch.dtype  # of the tensor that was quantized, and of `dequantize()`
    quant_type: str  # nf4 or fp4
    blocksize: int
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32
    offset: Tensor | None = None  # () float32: the mean of the float32 absmax

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """See `dequantize_4bit`."""
        return dequantize_4bit(self, dtype, out)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        fields = ("packed", "absmax", "nested_absmax", "offset")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """The weight, of any shape, in 4 bits: see the module's docstring for what is stored.

    Takes float32, bfloat16 and float16 as they are, on any device, with little memory beside the result.
    Raises UserError for infinities and NaN, which would spoil their blocks, for other dtypes, and for block
    sizes but the powers of two from 32 to 4096.
    """
    code = four_bit_code(quant_type, weight.device)
    if blocksize not in BLOCK_SIZES:
        raise UserError(
            f"blocksize {blocksize} is not supported; choose one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    check_floats(weight)
    packed, absmax = ops.quantize_4bit(weight.detach().contiguous().view(-1), code, blocksize)
    offset = absmax.mean()
    if not offset.isfinite():
        check_finite(weight, absmax)
        if double_quant:
            raise UserError(
                f"the weight's magnitudes, up to {absmax.max():.3g}, are too large for double quantization; leave it out"
            )
    fields = dict(
        packed=packed, shape=weight.shape, dtype=weight.dtype, quant_type=quant_type, blocksize=blocksize
    )
    if not double_quant:
        return QuantizedTensor(absmax=absmax, **fields)
    places, nested_absmax = ops.quantize_8bit(
        absmax - offset, dynamic_code(True, weight.device), NESTED_BLOCK_SIZE
    )
    return QuantizedTensor(absmax=places, nested_absmax=nested_absmax, offset=offset, **fields)


def dequantize_4bit(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """code[symbol] * absmax in q's shape, multiplied in float32 and rounded once to `dtype`, or to that of
    `out`, or to q's.

    `out` is filled and returned: contiguous, of q's shape and on its device. A buffer that is used again
    saves the larger part of the time on a CPU. Raises UserError for an `out` that does not fit.
    """
    dtype = dtype or (q.dtype if out is None else out.dtype)
    if dtype not in FLOATS.values():
        raise UserError(f"cannot dequantize to {dtype}; choose {', '.join(FLOATS)}")
    device = q.packed.device
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=device)
    elif (out.shape, out.dtype, out.device) != (q.shape, dtype, device) or not out.is_contiguous():
        given = f"{tuple(out.shape)} {out.dtype} on {out.device}" + ", not contiguous" * (
            not out.is_contiguous()
        )
        raise UserError(f"out is {given}; it must be contiguous {tuple(q.shape)} {dtype} on {device}")
    nested = () if q.nested_absmax is None else (q.nested_absmax, dynamic_code(True, device), q.offset)
    code = four_bit_code(q.quant_type, device)
    ops.dequantize_4bit(q.packed, q.absmax, code, q.blocksize, q.shape.numel(), out.view(-1), *nested)
    return out


def gemv_4bit(q: QuantizedTensor, x: Tensor) -> Tensor:
    """W x without W ever being written out, where there is a kernel for it. x: (in,) -> (out,) in x's dtype."""
    nested = (None, None, None)
    if q.nested_absmax is not None:
        nested = (q.nested_absmax, dynamic_code(True, q.device), q.offset)
    return ops.gemv_4bit(
        x, q.packed, q.absmax, four_bit_code(q.quant_type, q.device), q.blocksize, tuple(q.shape), *nested
    )


def check_floats(weight: Tensor) -> None:
    if weight.dtype not in FLOATS.values():
        raise UserError(f"cannot quantize {weight.dtype}; the weight must be one of {', '.join(FLOATS)}")
    if weight.numel() == 0:
        raise UserError(f"cannot quantize a weight of shape {tuple(weight.shape)}: it is empty")


def check_finite(weight: Tensor, absmax: Tensor) -> None:
    """Infinities and NaN come out as such in the scale of their block, which is all that has to be searched."""
    if not absmax.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise UserError(
            f"cannot quantize the weight: {bad} of its {weight.numel()} values are infinite or NaN; use sound weights"
        )
