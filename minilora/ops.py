"""The PyTorch definition of every element-wise and reduction kernel, and the choice between the two.

These functions say what the numbers are. They are what runs on a CPU and what a kernel in `kernels/` is
tested against. Statistics are taken in float32 whatever the dtype of the activations, as Hugging Face's
models do. On a GPU with Triton installed the kernel runs instead; MINILORA_BACKEND=torch or =triton overrides
the choice.

Legend, here and everywhere: B batch, T tokens, S keys (cached ones included), D model width, H query heads, G
key/value heads, K head size, F feed-forward width, V vocabulary, r rank.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.system.device import cpu_bfloat16_feature
from minilora.system.errors import UserError


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel. Raises UserError for an unknown MINILORA_BACKEND."""
    backend = os.environ.get("MINILORA_BACKEND", "")
    if backend not in ("", "torch", "triton"):
        raise UserError(f"MINILORA_BACKEND = {backend!r} is not known; choose torch or triton, or unset it")
    return backend == "triton" or (backend == "" and x.is_cuda and _triton_is_installed())


@lru_cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x is fastest and no less exact: x's own, but on a CPU without
    bfloat16 instructions.

    There PyTorch multiplies bfloat16 at a quarter of float32's speed, so the operands are widened, and the
    product is rounded once.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16():
        return torch.float32
    return x.dtype


@lru_cache
def _cpu_multiplies_bfloat16() -> bool:
    return cpu_bfloat16_feature() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: (..., D), weight: (D,) -> (..., D) in x's dtype. The root mean square is taken in float32. The kernel
    has no gradient for the weight, which LoRA keeps frozen; training from scratch takes the definition.
    """
    if use_triton(x) and not weight.requires_grad:
        from minilora.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number a row, where PyTorch's autograd would keep x, x / rms(x) and more in float32.

    With n = x / rms(x) and g = w dy:  dx = (g - n mean(n g)) / rms(x),  dw = the sum of n dy over the rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x.float() * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, dy = x.float() * inverse, dy.float()
        dw = (
            (normed * dy).reshape(-1, len(weight)).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        g = dy * weight.float()
        dx = g.sub_(normed * (normed * g).mean(-1, keepdim=True)).mul_(inverse)
        return dx.to(x.dtype), dw, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head by the angle of its position (arXiv:2104.09864,
    section 3.2.2).

    x: (B, heads, T, K); cos, sin: (B or 1, 1, T, K), both halves of the last dimension alike -> (B, heads, T,
    K).
    """
    left, right = x.chunk(2, dim=-1)  # (B, heads, T, K/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6). gate, up: (..., F) -> (..., F)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up, and not silu(gate), which costs next to nothing to have again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped keys and values, through PyTorch's fused kernels.

    q: (B, H, T, K); k, v: (B, G, S, K); mask: bool (B or 1, 1, T, S), True where a query sees a key -> (B, H,
    T, K). With `mask=None` every query sees the keys up to its own place, which needs T = S, or T = 1 as the
    last of S.

    The key/value heads are repeated in memory: the memory-efficient kernel, the only fused one on a T4, knows
    no groups.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, S, K)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # (B, H, S, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention`, written out (Vaswani et al. 2017, arXiv:1706.03762, equation 1): what the fused kernels
    are tested against.
    """
    B, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    q = q.view(B, G, H // G, T, K)  # head h reads key/value head h // (H/G)
    scores = torch.einsum("bghtk,bgsk->bghts", q.float(), k.float()) / K**0.5
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
        mask = mask.view(1, 1, T, S)
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # (B, G, H/G, T, S)
    y = torch.einsum("bghts,bgsk->bghtk", scores.softmax(-1), v.float())
    return y.reshape(B, H, T, K).to(v.dtype)


_CHUNK = {
    "cpu": 1 << 18,
    "cuda": 1 << 24,
}  # values at a time: on a CPU what stays in its cache, on a GPU what keeps it busy


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The symbol of the nearest code for every value, relative to the largest magnitude in its block
    (arXiv:2305.14314, eq. 1).

    x: (n,) float32, bfloat16 or float16; code: (16,) float32, in the order of the symbols -> packed: (ceil(n
    / 2),) uint8, the first of two values in the high nibble; absmax: (ceil(n / blocksize),) float32. A value
    in the middle between two codes takes the smaller one. absmax is infinite or NaN where the block holds
    such a value; its symbols then mean nothing.

    To the bit what bitsandbytes does: whole blocks are multiplied by 1 / absmax, a shorter last block is
    divided by absmax, which rounds differently; absmax is taken to be at least 1e-38, and in a shorter last
    block also stored so.
    """
    bounds, symbols = nearest_code_bounds(code)
    packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32, device=x.device)
    if use_triton(x):
        from minilora.kernels.nf4 import quantize_4bit as kernel

        kernel(x, bounds, symbols, blocksize, packed, absmax)
        return packed, absmax
    if (native := native_for(x)) and native.quantize(x, bounds, symbols, blocksize, packed, absmax):
        return packed, absmax
    _quantize_4bit_definition(x, bounds, symbols, blocksize, packed, absmax)
    return packed, absmax


def nearest_code_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """code: (16,) -> the midpoints between neighbouring codes, ascending (15,), and the symbols in the order
    of the codes (16,).
    """
    symbols = code.argsort(stable=True)
    return (code[symbols[:-1]] + code[symbols[1:]]) / 2, symbols.to(torch.uint8)


def _quantize_4bit_definition(
    x: Tensor, bounds: Tensor, symbols: Tensor, blocksize: int, packed: Tensor, absmax: Tensor
) -> None:
    chunk = _CHUNK.get(x.device.type, 1 << 24)  # a multiple of every block size
    n = x.numel()
    for start in range(0, n, chunk):
        values = x[start : start + chunk].float()
        whole = values.numel() - values.numel() % blocksize
        blocks = values[:whole].view(-1, blocksize)
        first = start // blocksize
        scale = absmax[first : first + len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=scale)
        scaled = (blocks * (1.0 / scale.clamp(min=1e-38)).view(-1, 1)).view(-1)
        if whole < values.numel():
            tail = values[whole:]
            absmax[-1] = tail.abs().max().clamp(min=1e-38)
            scaled = F.pad(torch.cat([scaled, tail / absmax[-1]]), (0, n % 2))
        found = symbols[torch.bucketize(scaled, bounds, out_int32=True)]
        pair = found.view(-1, 2)
        packed[start // 2 : start // 2 + len(pair)] = (pair[:, 0] << 4) | pair[:, 1]


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    n: int,
    out: Tensor,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """out <- code[symbol] * absmax of its block, multiplied in float32 and rounded once to out's dtype.

    packed: (ceil(n / 2),) uint8; code: (16,) float32; out: (n,) contiguous float32, bfloat16 or float16;
    absmax: (blocks,) float32, or uint8 and then the scale is nested_code[absmax] * nested_absmax of its 256 +
    offset (ibid., double quantization).
    """
    if use_triton(out):
        from minilora.kernels.nf4 import dequantize_4bit as kernel

        return kernel(packed, absmax, code, blocksize, n, out, nested_absmax, nested_code, offset)
    if native := native_for(out):
        shift = 0.0 if offset is None else float(offset)
        if native.dequantize(packed, absmax, code, blocksize, n, out, nested_absmax, nested_code, shift):
            return None
    if nested_absmax is not None:
        absmax = dequantize_8bit(absmax, nested_absmax, nested_code, blocksize=256) + offset
    return _dequantize_4bit_definition(packed, absmax, code, blocksize, n, out)


def _dequantize_4bit_definition(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, n: int, out: Tensor
) -> None:
    pairs = torch.cartesian_prod(code, code)  # (256, 2): the two values of every byte, in one look-up
    chunk = _CHUNK.get(out.device.type, 1 << 24)
    buffer = torch.empty(min(chunk, n + 1) // 2, 2, dtype=torch.float32, device=out.device)
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        found = packed[start // 2 : (start + count + 1) // 2]
        values = buffer[: len(found)]  # (count / 2, 2)
        torch.index_select(pairs, 0, found.int(), out=values)
        values = values.view(-1)[:count]
        scale = absmax[start // blocksize : -(-(start + count) // blocksize)]
        whole = count - count % blocksize
        values[:whole].view(-1, blocksize).mul_(scale[: whole // blocksize].view(-1, 1))
        if whole < count:
            values[whole:].mul_(scale[-1])
        out[start : start + count] = values


def gemv_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, int],
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """W x for one x, as in decoding at batch 1, where reading W is all the cost. x: (in,) -> (out,), both in
    x's dtype.

    The kernel dequantizes on the fly, in float32, and never writes W out; the definition rounds W to x's
    dtype first. The other arguments are those of `dequantize_4bit`.
    """
    if use_triton(x):
        from minilora.kernels.nf4 import gemv_4bit as kernel

        out = torch.empty(shape[0], dtype=x.dtype, device=x.device)
        kernel(x, packed, absmax, code, blocksize, shape, out, nested_absmax, nested_code, offset)
        return out
    weight = torch.empty(shape, dtype=x.dtype, device=x.device)
    n = weight.numel()
    dequantize_4bit(packed, absmax, code, blocksize, n, weight.view(-1), nested_absmax, nested_code, offset)
    return F.linear(x, weight)


def quantize_8bit(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The place in `code` of about the nearest code for every value, relative to absmax of its block
    (arXiv:2110.02861, section 2).

    x: (n,); code: (256,) float32, ascending -> uint8 (n,), absmax float32 (blocks,). To the bit what
    bitsandbytes does: values are first rounded to one of 65,536 equal steps from -1 to 1, and a table has the
    nearest code of each step. A block of zeros is all place 0, whatever that code is: 0 times any code is 0.
    """
    n = x.numel()
    nearest = nearest_of_steps(code)
    places = torch.empty(n, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=x.device)
    # On a CPU so few at a time that PyTorch starts no threads: for small steps they cost more than they save.
    chunk = max(1, (1 << 14 if x.device.type == "cpu" else 1 << 24) // blocksize) * blocksize
    for start in range(0, n, chunk):
        values = x[start : start + chunk].float()
        blocks = F.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
        scale = absmax[start // blocksize :][: len(blocks)]
        torch.amax(blocks.abs(), dim=1, out=scale)
        scaled = (blocks * (1.0 / scale).view(-1, 1)).clamp_(-1, 1)
        scaled.nan_to_num_(nan=-1.0)  # 0 * inf, in a block of (next to) nothing
        step = ((scaled + 1) * 0.5).double() * 65535 + 0.5  # exact: 24 + 16 bits
        found = nearest[step.float().int()].masked_fill_(scale.view(-1, 1) == 0, 0)
        places[start : start + chunk] = found.view(-1)[: len(values)]
    return places, absmax


def dequantize_8bit(places: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """code[place] * absmax of its block. places: (n,) uint8 -> (n,) float32."""
    return code[places.int()] * absmax.repeat_interleave(blocksize)[: places.numel()]


def nearest_of_steps(code: Tensor) -> Tensor:
    """(65536,) uint8: the place in `code`, (256,), that is nearest to each of 65,536 equal steps from -1 to
    1.
    """
    return _nearest_of_steps(tuple(code.tolist())).to(code.device)


@lru_cache(maxsize=4)
def _nearest_of_steps(codes: tuple[float, ...]) -> Tensor:
    place = dict(dtype=torch.float32, device="cpu")  # a GPU rounds this division differently
    steps = torch.arange(65536, **place) * 2 / 65535 - 1
    code = torch.tensor(codes, **place)
    return torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)


def native_for(x: Tensor, agrees: Callable[[], bool] | None = None):
    """The module of the compiled CPU functions where they may be used for `x`, else None."""
    if x.device.type != "cpu" or os.environ.get("MINILORA_BACKEND") or not (agrees or _native_agrees)():
        return None
    from minilora.backend import native

    return native


@lru_cache
def _native_agrees() -> bool:
    """Whether compiled functions exist and give the definition's bits on a trial tensor: a compiler is not
    trusted blindly.
    """
    from minilora.backend import native

    if not native.functions():
        return False
    n = 3 * 64 + 7  # whole blocks and a tail
    place = dict(dtype=torch.float32, device="cpu")
    x = torch.linspace(-1, 1, n, **place).pow(3)
    x[64:128] = 0
    code = torch.linspace(-1, 1, 16, **place).roll(3)
    bounds, symbols = nearest_code_bounds(code)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed, absmax, out = (
            x.new_zeros(2, 100, dtype=torch.uint8),
            x.new_zeros(2, 4),
            x.new_zeros(2, n, dtype=dtype),
        )
        arguments = x.to(dtype), bounds, symbols, 64
        _quantize_4bit_definition(*arguments, packed[0], absmax[0])
        if native.quantize(*arguments, packed[1], absmax[1]) and not (
            torch.equal(*packed) and torch.equal(*absmax)
        ):
            return False
        _dequantize_4bit_definition(packed[0], absmax[0], code, 64, n, out[0])
        if native.dequantize(packed[0], absmax[0], code, 64, n, out[1], None, None, 0.0) and not torch.equal(
            *out
        ):
            return False
    return True
