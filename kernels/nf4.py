"""4-bit weights: dequantize, quantize, and the matrix-vector product of decoding (QLoRA, arXiv:2305.14314,
section 3).

    weight    w[i] = code[symbol[i]] * scale[i // blocksize]                 symbol in 0..15, code in [-1, 1]
    scale     scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + offset, or a float32 absmax[b]

The weight is flattened, and two symbols share a byte, the first in the high nibble: byte i is symbol[2i] * 16
+ symbol[2i + 1]. 64 weights are 32 bytes and a scale; with the scales quantized in their turn, 4 + 8/64 +
32/(64 * 256) = 4.127 bits a weight.

Why not multiply with the packed weight? In training a weight meets thousands of tokens: writing it out in 16
bits (0.5 bytes read, 2 written) for cuBLAS costs a few percent of the product. A fused product would decode
it again for every tile of tokens, and on a T4 `tl.dot` has no tensor cores. With one token the product does
nothing but read the weight, so there it is fused: `gemv` moves 0.52 bytes a weight, where dequantizing
first moves 4.5. On a card that reads 300 GB a second, 4096 x 4096 weights take 29 us at the least. Bias and
LoRA's second thin product, y = W x + b + B n, are added to the sums before they are stored: no launch of
their own, and r * 4 bytes a row.

Dequantization is bound by its stores. Each thread writes 16 bytes at a time, next to its neighbour's: a group
is the elements of one store, 8 of 16 bits or 4 of 32. A group's symbols are one load, and it has one scale:
block sizes are multiples of a group.

`tl.gather` keeps the sixteen values in 64 bytes of shared memory: one load an element and never a bank
conflict, because sixteen words lie in sixteen banks. Compiled for a T4 that makes 11.6 instructions an
element in all, as docs/kernels.md counts them.

A scale is rounded twice, after the product and after the sum. `enable_fp_fusion=False` keeps the compiler
from making one FMA of it, so that a dequantized weight is the same to the bit here, in the definition
(`minilora.ops`) and in bitsandbytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements a program handles: a multiple of every block size
NESTED_BLOCK = tl.constexpr(256)  # scales to a scale of scales
ROWS, GROUPS = (
    4,
    256,
)  # of a weight that one program of the matrix-vector product reads at a time; 8 elements a group


@triton.jit
def load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside):
    """The float32 scale of each block, dequantized if it is quantized itself."""
    scale = tl.load(absmax_ptr + block, mask=inside, other=0)
    if nested_code_ptr is not None:
        outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    return scale


@triton.jit
def look_up(code_ptr, byte):
    """The values of the two symbols in each byte: (..., bytes) -> (..., 2 * bytes) float32."""
    symbol = tl.interleave(byte.to(tl.int32) >> 4, byte.to(tl.int32) & 15)  # the high nibble comes first
    table = tl.load(code_ptr + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.reshape(symbol, (symbol.numel,)), 0), symbol.shape)


@triton.jit
def dequantize_kernel(
    packed_ptr,  # (ceil(n / 2),) uint8
    absmax_ptr,  # (blocks,) float32, or uint8 if nested
    code_ptr,  # (16,) float32
    nested_absmax_ptr,  # (ceil(blocks / 256),) float32, or None
    nested_code_ptr,  # (256,) float32, or None
    offset_ptr,  # () float32, or None
    out_ptr,  # (n,)
    n,
    n_bytes,  # ceil(n / 2): a separate argument, so that Triton sees that 16 divides it and loads whole words
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,  # elements in 16 bytes of out
    TILE: tl.constexpr,
):
    """out = code[symbol] * scale, one tile of n."""
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * TILE  # n may pass 2^31
    group = tl.arange(0, TILE // GROUP)
    byte_at = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]  # (groups, GROUP / 2)
    byte = tl.load(packed_ptr + start // 2 + byte_at, mask=byte_at < n_bytes - start // 2, other=0)
    block = tile * (TILE // BLOCKSIZE) + group // (BLOCKSIZE // GROUP)  # (groups,)
    inside = group * GROUP < n - start
    scale = load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside)
    value = look_up(code_ptr, byte) * scale[:, None]  # (groups, GROUP)
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + start + element, value.to(out_ptr.dtype.element_ty), mask=element < n - start)


@triton.jit
def quantize_kernel(
    x_ptr,  # (n,)
    bounds_ptr,  # (15,) float32, ascending
    symbols_ptr,  # (16,) uint8
    packed_ptr,  # (ceil(n / 2),) uint8
    absmax_ptr,  # (blocks,) float32
    n,
    n_bytes,  # ceil(n / 2)
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """absmax of the blocks of one tile, and the symbol of the code nearest to every x / absmax."""
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * TILE
    row = tl.arange(0, TILE // BLOCKSIZE)  # a block is a row
    element = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(x_ptr + start + element, mask=element < n - start, other=0.0).to(
        tl.float32
    )  # (rows, BLOCKSIZE)
    # The bits of positive floats are ordered like the floats, with NaN above all: so a NaN is not lost, as it
    # would be in tl.max.
    absmax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)  # (rows,)
    divisor = tl.where(absmax < 1e-38, 1e-38, absmax)
    # bitsandbytes multiplies a whole block by the reciprocal, divides a last one that is not whole, and
    # stores what it divided by.
    block = tile * (TILE // BLOCKSIZE) + row
    whole = (row + 1) * BLOCKSIZE <= n - start
    multiplied, divided = (
        x * tl.div_rn(1.0, divisor)[:, None],
        tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)),
    )
    x = tl.where(whole[:, None], multiplied, divided)
    tl.store(absmax_ptr + block, tl.where(whole, absmax, divisor), mask=row * BLOCKSIZE < n - start)

    rank = tl.zeros(x.shape, dtype=tl.int32)  # how many bounds lie below x: a tie goes down
    for i in tl.static_range(15):
        rank += (x > tl.load(bounds_ptr + i)).to(tl.int32)
    symbols = tl.load(symbols_ptr + tl.arange(0, 16)).to(tl.int32)
    symbol = tl.gather(symbols, tl.reshape(rank, (TILE,)), 0)
    high, low = tl.split(tl.reshape(symbol, (TILE // 2, 2)))
    byte_at = tl.arange(0, TILE // 2)
    tl.store(
        packed_ptr + start // 2 + byte_at, (high * 16 + low).to(tl.uint8), mask=byte_at < n_bytes - start // 2
    )


@triton.jit
def gemv_kernel(
    x_ptr,  # (in_features,)
    packed_ptr,  # (ceil(out_features * in_features / 2),) uint8
    absmax_ptr,  # (blocks,) float32, or uint8 if nested
    code_ptr,  # (16,) float32
    nested_absmax_ptr,  # (ceil(blocks / 256),) float32, or None
    nested_code_ptr,  # (256,) float32, or None
    offset_ptr,  # () float32, or None
    bias_ptr,  # (out_features,), or None
    narrow_ptr,  # (rank,) float32, or None
    update_ptr,  # (out_features, rank) float32, or None
    out_ptr,  # (out_features,)
    out_features,
    in_features,
    n_bytes,
    rank,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether rows start where groups of 8 elements do
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,  # the power of two from rank on
):
    """out = W x + bias + B n for ROWS rows of W. A group is 8 elements of the flattened weight; a row may
    start within one.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64) * in_features
    lead = (start % 8).to(tl.int32)  # elements of the row's first group that belong to the row before
    groups = in_features // 8 if ALIGNED else (in_features + 7 + 7) // 8  # that a row touches at most
    total = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        here = (start // 8).to(tl.int32)[:, None] + group[
            None, :
        ]  # (ROWS, GROUPS), counted from the weight's beginning
        inside = (row < out_features)[:, None] & (group < groups)[None, :]
        byte_at = here.to(tl.int64)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        if ALIGNED:  # x is the same for every row, and loads are whole words
            byte = tl.load(packed_ptr + byte_at, mask=inside[:, :, None], other=0)
            x = tl.load(x_ptr + column, mask=column < in_features, other=0.0)  # (1, GROUPS, 8)
        else:
            inside &= here.to(tl.int64) * 4 < n_bytes
            byte = tl.load(packed_ptr + byte_at, mask=inside[:, :, None] & (byte_at < n_bytes), other=0)
            column -= lead[:, None, None]
            x = tl.load(
                x_ptr + column, mask=(column >= 0) & (column < in_features), other=0.0
            )  # (ROWS, GROUPS, 8)
        block = here // (BLOCKSIZE // 8)
        scale = load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, inside)
        total += tl.sum(look_up(code_ptr, byte) * x.to(tl.float32), axis=2) * scale
    y = tl.sum(total, axis=1)
    if narrow_ptr is not None:
        k = tl.arange(0, RANK)
        inside = (row < out_features)[:, None] & (k < rank)[None, :]
        update = tl.load(update_ptr + row[:, None] * rank + k[None, :], mask=inside, other=0.0)
        y += tl.sum(update * tl.load(narrow_ptr + k, mask=k < rank, other=0.0)[None, :], axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=row < out_features)


# ---- launches, each on its tensors' device: Triton launches on the current one.
#      q is a 4-bit tensor with the fields of `minilora.quantization.QuantizedTensor`:
#      packed (ceil(n / 2),) uint8; absmax (blocks,) float32, or uint8 with nested_absmax (ceil(blocks /
#      256),) float32, nested_code (256,) float32 and offset () float32; code (16,) float32; blocksize; shape.


def dequantize(q, out: Tensor) -> None:
    """Fill `out`, contiguous float32, bfloat16 or float16, with q's values: one launch, bit-identical to
    bitsandbytes.
    """
    n = out.numel()
    assert out.is_contiguous()
    check(q, n)
    if n:
        with torch.cuda.device_of(out):
            dequantize_kernel[(triton.cdiv(n, TILE),)](
                q.packed, q.absmax, q.code, q.nested_absmax, q.nested_code, q.offset, out, n, (n + 1) // 2,
                BLOCKSIZE=q.blocksize, GROUP=16 // out.element_size(), TILE=TILE, enable_fp_fusion=False,
            )  # fmt: skip


def quantize(
    x: Tensor,  # (n,) contiguous; float32, bfloat16 or float16
    bounds: Tensor,  # (15,) float32: the midpoints between neighbouring codes, ascending
    symbols: Tensor,  # (16,) uint8, in the order of their codes: 0..15 for NF4
    blocksize: int,
    packed: Tensor,  # (ceil(n / 2),) uint8
    absmax: Tensor,  # (blocks,) float32
) -> None:
    """Fill `packed` and `absmax`, bit-identical to the definition: ties, zeros and NaN included."""
    n = x.numel()
    assert (
        x.is_contiguous() and packed.dtype == symbols.dtype == torch.uint8 and absmax.dtype == torch.float32
    )
    assert packed.numel() == (n + 1) // 2 and absmax.numel() == triton.cdiv(n, blocksize)
    assert is_block_size(blocksize), f"blocksize {blocksize}: not a power of two in 32..{TILE}"
    if n:
        constants = dict(BLOCKSIZE=blocksize, TILE=TILE, num_warps=8)
        with torch.cuda.device_of(x):
            quantize_kernel[(triton.cdiv(n, TILE),)](
                x, bounds, symbols, packed, absmax, n, (n + 1) // 2, **constants
            )


def gemv(
    q,  # a matrix (out, in)
    x: Tensor,  # (in,) contiguous
    out: Tensor,  # (out,) contiguous
    bias: Tensor | None = None,  # (out,)
    update: tuple[Tensor, Tensor] | None = None,  # n (rank,) and B (out, rank), contiguous float32
) -> None:
    """out = W x + bias + B n, computed in float32 without writing W."""
    out_features, in_features = q.shape
    n = out_features * in_features
    narrow, B = update or (None, None)
    rank = 0 if narrow is None else len(narrow)
    assert x.is_contiguous() and out.is_contiguous()
    assert x.numel() == in_features and out.numel() == out_features
    assert n < 2**34  # groups are counted in 32 bits
    assert B is None or (B.is_contiguous() and B.shape == (out_features, rank) and B.numel() < 2**31)
    check(q, n)
    with torch.cuda.device_of(out):
        gemv_kernel[(triton.cdiv(out_features, ROWS),)](
            x, q.packed, q.absmax, q.code, q.nested_absmax, q.nested_code, q.offset, bias, narrow, B, out,
            out_features, in_features, (n + 1) // 2, rank,
            BLOCKSIZE=q.blocksize, ALIGNED=in_features % 8 == 0, ROWS=ROWS, GROUPS=GROUPS,
            RANK=triton.next_power_of_2(rank),
        )  # fmt: skip


def check(q, n: int) -> None:
    """Assert what the kernels take for granted about a 4-bit tensor of n elements."""
    assert is_block_size(q.blocksize), f"blocksize {q.blocksize}: not a power of two in 32..{TILE}"
    assert q.packed.numel() == (n + 1) // 2 and q.absmax.numel() == triton.cdiv(n, q.blocksize)
    nested = q.nested_absmax is not None
    assert q.absmax.dtype == (torch.uint8 if nested else torch.float32)
    assert nested == (q.nested_code is not None) == (q.offset is not None), (
        "nested scales need all three parts"
    )


def is_block_size(blocksize: int) -> bool:
    """Whether the kernels take blocks of this size: a power of two from 32 to TILE."""
    return 32 <= blocksize <= TILE and blocksize & (blocksize - 1) == 0
