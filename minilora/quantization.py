"""Weights in 4 bits: codebooks, blocks, scales that are quantized in turn (QLoRA, arXiv:2305.14314, 3).

    w  ~  code[symbol] * absmax            symbol: 4 bits, one a weight     absmax: one a block of 64 weights

A weight matrix is cut, in memory order and across its rows, into blocks. Each block is divided by its largest
magnitude, and every value in [-1, 1] becomes the nearest of sixteen codes. The only choice is where the codes
lie:

    nf4   quantiles of the normal distribution: close together where weights, roughly normal, are many
    fp4   a float of 1 sign, 2 exponent and 1 mantissa bits: steps grow with the value; in some checkpoints

One outlier makes its whole block coarse, so blocks are small; but a float32 scale for 64 weights costs half a
bit a weight. Double quantization stores the scales in 8 bits too, centred on their mean, in blocks of 256:

    absmax  ~  dynamic_code[index] * nested_absmax + offset     4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight

Their code is the dynamic one (arXiv:2110.02861, section 2). Its steps grow with the value, so it spans seven
decades.

Everything here is bitsandbytes' arithmetic on a CPU, bit for bit (docs/parity.md lists two faults of it that
are not followed). The functions with `definition` in their name say what the numbers are. They run where
neither the Triton kernels (kernels/nf4.py) nor the C library (backend/native.py) does, and both are tested
against them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.backend import native
from minilora.backend.choice import form_for
from minilora.backend.decoding import multiply_vector
from minilora.system.errors import UserError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TABLE = dict(dtype=torch.float32, device="cpu")  # codebooks are made here, whatever PyTorch's defaults are
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # values at a time: a CPU's cache holds them, or they fill a GPU


@lru_cache
def four_bit_code(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the values of the sixteen symbols, (16,) float32, largest magnitude 1. Shared: do not write to
    it.

    nf4: take probabilities evenly spaced from 1/2 to 0.9677083 = (1 - 1/30 + 1 - 1/32) / 2, seven for the
    negative codes and eight for the positive ones, their normal quantiles, and divide by the largest. Zero
    has its own code, for padding and pruned weights. The published table is rounded to float32 after each
    step, and so is this one.

    fp4: sign, two bits of exponent e, one of mantissa m. The exponent counts downwards: 2^(4-e) (1 + m/2) for
    e = 1, 2, 3 and m/16 for e = 0, all divided by 12, the largest.
    """
    if quant_type == "nf4":
        below, above = (torch.linspace(0.9677083, 0.5, n + 1, **_TABLE)[:-1].tolist() for n in (7, 8))
        quantile = NormalDist().inv_cdf
        values = [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in reversed(above)]
    elif quant_type == "fp4":
        magnitudes = [2.0 ** (4 - e) * (1 + m / 2) if e else m / 16 for e in range(4) for m in range(2)]
        values = magnitudes + [0.0 - x for x in magnitudes]
    else:
        raise UserError(f"quant_type {quant_type!r} is not known; choose {' or '.join(QUANT_TYPES)}")
    code = torch.tensor(values, **_TABLE)
    return (code / code.max()).to(device)


@lru_cache
def dynamic_code(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """Return the 8-bit dynamic code, (256,) float32, ascending from about -1, or 0, to 1. Shared: do not
    write to it.

    A byte is a sign (if signed), a unary exponent of i zeros and a one, and the rest a linear fraction: in
    each of seven decades, 10^-7..10^-6 up to 0.1..1, the midpoints of 2^i, or unsigned 2^(i+1), equal parts.
    And 0, and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, **_TABLE)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        values += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(values), **_TABLE).to(device)


# ---- 4 bits ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 4 bits. All tensors share the two codebooks, 1.1 kB."""

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
    def code(self) -> Tensor:
        """The values of the symbols, (16,) float32."""
        return four_bit_code(self.quant_type, self.packed.device)

    @property
    def nested_code(self) -> Tensor | None:
        """The values that a doubly quantized absmax indexes, (256,) float32."""
        return None if self.nested_absmax is None else dynamic_code(True, self.packed.device)

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
    """Return the weight, of any shape, in 4 bits, with little memory beside the result (ibid., equation 1).

    A value in the middle between two codes takes the smaller one. Takes float32, bfloat16 and float16 on any
    device. Raises UserError for infinities and NaN, which would spoil their blocks, for other dtypes and
    block sizes.
    """
    code = four_bit_code(quant_type, weight.device)
    if blocksize not in BLOCK_SIZES:
        raise UserError(
            f"blocksize {blocksize} is not supported; choose one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    check_floats(weight)
    x = weight.detach().contiguous().view(-1)  # (n,)
    packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32, device=x.device)
    arguments = x, *nearest_code_bounds(code), blocksize, packed, absmax
    match form_for(x, "quantize"):
        case "triton":
            from minilora.kernels import nf4

            nf4.quantize(*arguments)
        case "c":
            native.quantize(*arguments)
        case _:
            quantize_definition(*arguments)
    offset = absmax.mean()
    if not offset.isfinite():
        check_finite(weight, absmax)
        if double_quant:
            raise UserError(
                f"the weight's magnitudes, up to {absmax.max():.3g}, overflow double quantization; omit it"
            )
    fields = dict(packed=packed, shape=weight.shape, dtype=x.dtype)
    fields |= dict(quant_type=quant_type, blocksize=blocksize)
    if not double_quant:
        return QuantizedTensor(absmax=absmax, **fields)
    nested_code = dynamic_code(True, weight.device)
    indices, nested_absmax = quantize_dynamic(absmax - offset, nested_code, NESTED_BLOCK_SIZE)
    return QuantizedTensor(absmax=indices, nested_absmax=nested_absmax, offset=offset, **fields)


def nearest_code_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """code: (16,) -> the midpoints between codes, ascending (15,), and the symbols in that order (16,)."""
    symbols = code.argsort(stable=True)
    return (code[symbols[:-1]] + code[symbols[1:]]) / 2, symbols.to(torch.uint8)


def quantize_definition(
    x: Tensor,  # (n,) float32, bfloat16 or float16
    bounds: Tensor,  # (15,) float32
    symbols: Tensor,  # (16,) uint8
    blocksize: int,
    packed: Tensor,  # (ceil(n / 2),) uint8, filled
    absmax: Tensor,  # (blocks,) float32, filled; infinite or NaN where the block holds such a value
) -> None:
    """Fill `packed` and `absmax`.

    As in bitsandbytes, whole blocks are multiplied by 1 / absmax and a shorter last block is divided by
    absmax, which rounds differently. absmax is taken to be at least 1e-38, and the last block's is stored so.
    """
    chunk, n = _CHUNK.get(x.device.type, 1 << 24), x.numel()  # a chunk is a multiple of every block size
    for start in range(0, n, chunk):
        values = x[start : start + chunk].float()
        whole = values.numel() - values.numel() % blocksize
        blocks = values[:whole].view(-1, blocksize)
        scale = absmax[start // blocksize :][: len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=scale)
        scaled = (blocks * (1.0 / scale.clamp(min=1e-38)).view(-1, 1)).view(-1)
        if whole < values.numel():
            tail = values[whole:]
            absmax[-1] = tail.abs().max().clamp(min=1e-38)
            scaled = F.pad(torch.cat([scaled, tail / absmax[-1]]), (0, n % 2))
        pair = symbols[torch.bucketize(scaled, bounds, out_int32=True)].view(-1, 2)
        packed[start // 2 : start // 2 + len(pair)] = (pair[:, 0] << 4) | pair[:, 1]


def dequantize_4bit(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Return code[symbol] * absmax in q's shape, multiplied in float32 and rounded once to `dtype`, out's or
    q's.

    `out` is filled and returned: contiguous, of q's shape and on its device. On a CPU a buffer that is used
    again saves most of the time. Raises UserError for an `out` that does not fit.
    """
    dtype = dtype or (q.dtype if out is None else out.dtype)
    if dtype not in FLOATS.values():
        raise UserError(f"cannot dequantize to {dtype}; choose {', '.join(FLOATS)}")
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    elif (out.shape, out.dtype, out.device) != (q.shape, dtype, q.device) or not out.is_contiguous():
        given = f"{tuple(out.shape)} {out.dtype} on {out.device}" + ", not contiguous" * (
            not out.is_contiguous()
        )
        raise UserError(f"out is {given}; it must be contiguous {tuple(q.shape)} {dtype} on {q.device}")
    match form_for(out, "dequantize"):
        case "triton":
            from minilora.kernels import nf4

            nf4.dequantize(q, out)
        case "c":
            native.dequantize(q, out)
        case _:
            dequantize_definition(q, out)
    return out


def dequantize_definition(q: QuantizedTensor, out: Tensor) -> None:
    """Fill `out`, contiguous, with q's values."""
    out, n, absmax = out.view(-1), out.numel(), q.absmax
    if q.nested_absmax is not None:
        absmax = dequantize_dynamic(absmax, q.nested_absmax, q.nested_code, NESTED_BLOCK_SIZE) + q.offset
    pairs = torch.cartesian_prod(q.code, q.code)  # (256, 2): the two values of every byte, in one look-up
    chunk = _CHUNK.get(out.device.type, 1 << 24)
    buffer = torch.empty(min(chunk, n + 1) // 2, 2, dtype=torch.float32, device=out.device)
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        bytes_ = q.packed[start // 2 : (start + count + 1) // 2]
        values = buffer[: len(bytes_)]  # (count / 2, 2)
        torch.index_select(pairs, 0, bytes_.int(), out=values)
        values = values.view(-1)[:count]
        scale = absmax[start // q.blocksize : -(-(start + count) // q.blocksize)]
        whole = count - count % q.blocksize
        values[:whole].view(-1, q.blocksize).mul_(scale[: whole // q.blocksize].view(-1, 1))
        if whole < count:
            values[whole:].mul_(scale[-1])
        out[start : start + count] = values


def gemv_4bit(q: QuantizedTensor, x: Tensor) -> Tensor:
    """W x for one vector, as in decoding at batch 1, where reading W is all the cost. x: (in,) -> (out,), x's
    dtype.

    Triton and C dequantize on the fly, in float32, and never write W; elsewhere W is rounded to x's dtype
    first.
    """
    out = torch.empty(q.shape[0], dtype=x.dtype, device=x.device)
    multiply_vector(x, q, out)
    return out


# ---- 8 bits, dynamic: scales of scales, and the moments of AdamW (optim.py) --------------------------------


def quantize_dynamic(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the index in `code` of about the nearest code for every value, and absmax of its block.

    x: (n,); code: (256,) float32, ascending -> uint8 (n,), float32 (blocks,). As in bitsandbytes, values are
    first rounded to one of 65,536 equal steps from -1 to 1, and a table has the nearest code of each step. A
    block of zeros is all index 0, whatever that code is: 0 times any code is 0.
    """
    nearest = nearest_of_steps(code)
    indices = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32, device=x.device)
    # On a CPU so few at a time that PyTorch starts no threads: for small steps they cost more than they save.
    chunk = max(1, (1 << 14 if x.device.type == "cpu" else 1 << 24) // blocksize) * blocksize
    for start in range(0, x.numel(), chunk):
        values = x[start : start + chunk].float()
        blocks = F.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
        scale = absmax[start // blocksize :][: len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=scale)
        scaled = (blocks * (1.0 / scale).view(-1, 1)).clamp_(-1, 1)
        scaled.nan_to_num_(nan=-1.0)  # 0 * inf, in a block of (next to) nothing
        step = ((scaled + 1) * 0.5).double() * 65535 + 0.5  # exact: 24 + 16 bits
        index = nearest[step.float().int()].masked_fill_(scale.view(-1, 1) == 0, 0)
        indices[start : start + chunk] = index.view(-1)[: len(values)]
    return indices, absmax


def dequantize_dynamic(indices: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Return code[index] * absmax of its block. indices: (n,) uint8 -> (n,) float32."""
    return code[indices.int()] * absmax.repeat_interleave(blocksize)[: indices.numel()]


@lru_cache(maxsize=4)  # by the tensor itself, not its values: a GPU need not be asked for them
def nearest_of_steps(code: Tensor) -> Tensor:
    """Return (65536,) uint8: the index in `code`, (256,), nearest to each of 65,536 steps from -1 to 1."""
    steps = torch.arange(65536, **_TABLE) * 2 / 65535 - 1  # a GPU rounds this division differently
    values = code.cpu()
    return torch.bucketize(steps, (values[:-1] + values[1:]) * 0.5).to(torch.uint8).to(code.device)


def check_floats(weight: Tensor) -> None:
    """Raise UserError for a dtype that is not quantized, and for an empty weight."""
    if weight.dtype not in FLOATS.values():
        raise UserError(f"cannot quantize {weight.dtype}; the weight must be one of {', '.join(FLOATS)}")
    if weight.numel() == 0:
        raise UserError(f"cannot quantize a weight of shape {tuple(weight.shape)}: it is empty")


def check_finite(weight: Tensor, absmax: Tensor) -> None:
    """Raise UserError for infinities and NaN: they show in the scale of their block."""
    if not absmax.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise UserError(
            f"cannot quantize the weight: {bad} of its {weight.numel()} values are infinite or NaN"
        )
