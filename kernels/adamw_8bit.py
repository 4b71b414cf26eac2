"""AdamW with 8-bit moments: dequantize both, update them, step, quantize them again, in one pass
(arXiv:2110.02861, section 2).

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

A block of 256 elements is a program: its moments exist in float32 only there, in registers.

Bytes an element: 16. p is read and written, g read, and two indices are read and written; the scales add
4 * 4 / 256. AdamW with float32 moments moves 28.

Floor: an adapter of 21 million numbers (rank 8 on all layers of a 7B model) moves 0.34 GB, 0.1 ms at 3.35
TB/s and 1.1 ms at a T4's 320 GB/s.

An adapter is hundreds of tensors of some ten thousand elements, and a launch for each would cost more than
its work. So the kernel gets a table of addresses, one row a tensor, and a grid of (blocks of the longest,
tensors); programs past the end of a shorter tensor return at once.

To find the nearest of 256 codes, a value x / absmax in [-1, 1] is rounded to one of 65,536 steps, and a table
has the index that is nearest to each step. So does the definition (`minilora.quantization.quantize_dynamic`),
and it is one load, where a binary search in the code is a chain of eight. The two tables, 64 kB each, stay in
the L2 cache.

Every result is rounded where the definition rounds it: FMAs are written out, `enable_fp_fusion=False` makes
no others, quotients and roots are the correctly rounded ones. So moments and parameters are to the bit the
definition's on a CPU that has FMA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # elements that share an absmax


@triton.jit
def dequantize(indices_ptr, absmax_ptr, code_ptr, block, element, inside):
    """code[index] * absmax: (BLOCK,) float32."""
    index = tl.load(indices_ptr + element, mask=inside, other=0).to(tl.int32)
    return tl.load(code_ptr + index) * tl.load(absmax_ptr + block)


@triton.jit
def quantize(x, indices_ptr, absmax_ptr, nearest_ptr, block, element, inside):
    """Store absmax of x, (BLOCK,), which is 0 outside, and the index of the code nearest to x / absmax."""
    # The bits of positive floats are ordered like the floats, with NaN above all: so a NaN is not lost, as it
    # would be in tl.max.
    absmax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    scaled = x * tl.div_rn(1.0, absmax)
    scaled = tl.where(scaled >= -1.0, scaled, -1.0)  # NaN too
    scaled = tl.where(scaled <= 1.0, scaled, 1.0)
    step = tl.fma((scaled + 1.0) * 0.5, 65535.0, 0.5).to(tl.int32)
    index = tl.where(absmax == 0.0, 0, tl.load(nearest_ptr + step))
    tl.store(indices_ptr + element, index.to(tl.uint8), mask=inside)
    tl.store(absmax_ptr + block, absmax)


@triton.jit
def adamw_8bit_kernel(
    tensors_ptr,  # (tensors, 7) int64: addresses of p, g, indices and absmax of m, those of v; elements
    code_m_ptr,  # (256,) float32
    code_v_ptr,  # (256,) float32
    nearest_m_ptr,  # (65536,) uint8
    nearest_v_ptr,  # (65536,) uint8
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    correction2,  # sqrt(1 - beta2^t)
    eps,
    decay,  # 1 - lr weight_decay
    rate,  # -lr / (1 - beta1^t)
    BLOCK: tl.constexpr,
):
    """One block of one tensor."""
    block = tl.program_id(0).to(tl.int64)
    row = tensors_ptr + tl.program_id(1) * 7
    n = tl.load(row + 6)
    if block * BLOCK >= n:
        return
    p_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    indices_m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    absmax_m_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    indices_v_ptr = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    absmax_v_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < n
    g = tl.load(g_ptr + element, mask=inside, other=0.0)
    p = tl.load(p_ptr + element, mask=inside, other=0.0)
    m = dequantize(indices_m_ptr, absmax_m_ptr, code_m_ptr, block, element, inside)
    v = dequantize(indices_v_ptr, absmax_v_ptr, code_v_ptr, block, element, inside)
    m = tl.where(inside, tl.fma(g, rest1, m * beta1), 0.0)
    v = tl.where(inside, tl.fma(rest2 * g, g, v * beta2), 0.0)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + eps
    tl.store(p_ptr + element, p * decay + tl.div_rn(rate * m, denominator), mask=inside)
    quantize(m, indices_m_ptr, absmax_m_ptr, nearest_m_ptr, block, element, inside)
    quantize(v, indices_v_ptr, absmax_v_ptr, nearest_v_ptr, block, element, inside)


def adamw_8bit(
    tensors: list[
        tuple[Tensor, ...]
    ],  # each: p, g of n float32; of m and of v, n indices uint8, absmax (ceil(n / 256),) float32
    codes: tuple[Tensor, Tensor],  # (256,) float32 each: of m and of v
    nearest: tuple[Tensor, Tensor],  # (65536,) uint8 each
    scalars: tuple[
        float, ...
    ],  # beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, 1 - lr wd, -lr / (1 - beta1^t)
) -> None:
    """One step on all tensors, which are contiguous and on one device, in one launch."""
    rows = [[*(part.data_ptr() for part in parts), parts[0].numel()] for parts in tensors]
    table, device = torch.tensor(rows, dtype=torch.int64, device="cpu"), codes[0].device
    if device.type == "cuda":  # from pinned memory, so that the host does not wait for the copy
        table = table.pin_memory().to(device, non_blocking=True)
    grid = (max(parts[3].numel() for parts in tensors), len(tensors))
    with torch.cuda.device_of(codes[0]):
        adamw_8bit_kernel[grid](table, *codes, *nearest, *scalars, BLOCK=BLOCK, enable_fp_fusion=False)
