"""Do the C functions of native.py give the bits of their PyTorch definitions? Each tries once.

A compiler is not trusted blindly. One that contracts a product and a sum, flushes subnormals, or is simply
wrong, would change numbers without a word. So each function computes a few small tensors first, and the bits
of the results are compared with those of the definition, which stand here as digests.

A trial must give the same bits by every right way of computing: where sums may have any order, their terms
are whole numbers.
"""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from minilora.backend import native


@lru_cache
def is_trusted(operation: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a compiled `operation` on tensors of a dtype exists and gives the bits of its PyTorch
    definition.
    """
    name = operation if operation == "adamw_8bit" else f"{operation}_{native._NAMES.get(dtype)}"
    if name not in native._functions():
        return False
    trial, function = TRIALS[operation]
    if digest(trial(function, dtype)) != KNOWN_BITS[name]:
        native._warn_once("it gives other bits than PyTorch; set CC to another C compiler")
        return False
    return True


# Digests of what the definitions in quantization.py and optim.py compute; tests/core/test_native.py compares
# them.
KNOWN_BITS = {
    "quantize_fp32": "a06acc2fa995d97d",
    "dequantize_fp32": "c8c855a19b730416",
    "quantize_bf16": "c1405851e636d499",
    "dequantize_bf16": "0bc8628c230cb6e5",
    "quantize_fp16": "f68cc60a8cfc891f",
    "dequantize_fp16": "863573001beb814f",
    "matmul_bf16": "bcfdd7e6434cda63",
    "gemv_fp32": "eafb7cd2fbcbbc3b",
    "gemv_bf16": "0cd398e5a01b127b",
    "gemv_fp16": "43cb55a34a1d9d96",
    "adamw_8bit": "c2f8a9f6e37017df",
}


def digest(tensors: list[Tensor]) -> str:
    """Return 16 hexadecimal digits that change with any bit of the tensors."""
    parts = (t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def trial_values(n: int) -> Tensor:
    """Return (n,) float32 values in [-1, 1], the same bits on every CPU: whole numbers and one division."""
    return ((torch.arange(n, device="cpu") * 37) % 101 - 50).float() / 50


def quantize_trial(quantize: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Quantize three blocks, one of zeros, and a tail; return the packed bytes and the scales."""
    x = trial_values(3 * 64 + 7)
    x[64:128] = 0
    bounds, symbols = (
        (torch.arange(15, device="cpu") - 7).float() / 8,
        torch.arange(16, device="cpu").roll(3).byte(),
    )
    packed, absmax = torch.zeros(100, dtype=torch.uint8, device="cpu"), torch.zeros(4, device="cpu")
    quantize(x.to(dtype), bounds, symbols, 64, packed, absmax)
    return [packed, absmax]


def dequantize_trial(dequantize: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Dequantize three blocks and a tail, with float32 scales and with quantized ones; return the values."""
    n, results = 3 * 64 + 7, []
    packed = ((torch.arange(100, device="cpu") * 73) % 256).byte()
    q = SimpleNamespace(packed=packed, code=trial_values(16), blocksize=64, nested_absmax=None)
    q.absmax = trial_values(4).abs()
    nested = SimpleNamespace(
        **vars(q) | dict(absmax=torch.tensor([3, 200, 0, 77], dtype=torch.uint8, device="cpu"))
    )
    nested.nested_absmax, nested.nested_code = trial_values(1), trial_values(256)
    nested.offset = torch.tensor(0.25, device="cpu")
    for trial in (q, nested):
        results.append(torch.zeros(n, dtype=dtype, device="cpu"))
        dequantize(trial, results[-1])
    return results


def matmul_trial(matmul: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Multiply 33 rows with a W of (64, 96), forward, with a bias, and backward, twice into the same result;
    each with an update of rank 3. Return both results.

    All numbers are small and whole, so every order of summation gives the same bits.
    """
    rows, out, in_, rank = 33, 64, 96, 3
    packed = ((torch.arange(out * in_ // 2, device="cpu") * 73) % 256).byte()
    code = torch.arange(-8.0, 8.0, device="cpu")
    absmax = 1.0 + torch.arange(out * in_ // 64, device="cpu") % 3
    q = SimpleNamespace(packed=packed, code=code, blocksize=64, absmax=absmax, nested_absmax=None)
    q.shape = torch.Size((out, in_))

    def numbers(*shape: int) -> Tensor:
        return trial_whole_numbers(*shape).to(dtype)

    narrow = numbers(rows, 2 * rank)[:, rank:]  # a part of a wider one
    y, dx = (torch.zeros(rows, n, dtype=dtype, device="cpu") for n in (out, in_))
    bias = torch.arange(float(out), device="cpu")
    matmul(q, numbers(rows, in_), y, bias, (narrow, numbers(out, rank)))
    matmul(q, numbers(rows, out), dx, update=(narrow, numbers(rank, in_)), backward=True)
    matmul(q, numbers(rows, out), dx, backward=True, add=True)
    return [y, dx]


def gemv_trial(gemv: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Multiply a W of (33, 96), in blocks of 64 and of 32, with a vector; the second time with nested scales,
    a bias and an update of rank 21. Return both results.

    All numbers are small and whole, so every order of summation gives the same bits.
    """
    out, in_, rank = 33, 96, 21
    packed = ((torch.arange(out * in_ // 2, device="cpu") * 73) % 256).byte()
    code = torch.arange(-8.0, 8.0, device="cpu")
    x, n, B = (trial_whole_numbers(*shape) for shape in ((in_,), (rank,), (out, rank)))
    plain = SimpleNamespace(
        packed=packed, code=code, blocksize=64, nested_absmax=None, shape=torch.Size((out, in_))
    )
    plain.absmax = 1.0 + torch.arange(-(-out * in_ // 64), device="cpu") % 3
    nested = SimpleNamespace(**vars(plain) | dict(blocksize=32))
    nested.absmax = ((torch.arange(out * in_ // 32, device="cpu") * 73) % 256).byte()
    nested.nested_absmax, nested.nested_code = trial_whole_numbers(1) + 9, trial_whole_numbers(256)
    nested.offset = torch.tensor(3.0, device="cpu")
    ys = [torch.zeros(out, dtype=dtype, device="cpu") for _ in range(2)]
    gemv(plain, x.to(dtype), ys[0])
    gemv(nested, x.to(dtype), ys[1], torch.arange(float(out), device="cpu"), (n, B))
    return ys


def trial_whole_numbers(*shape: int) -> Tensor:
    """Return whole float32 numbers from -7 to 7."""
    return (((torch.arange(math.prod(shape), device="cpu") * 37) % 15 - 7).view(shape)).float()


def adamw_trial(adamw_8bit: Callable, _: torch.dtype) -> list[Tensor]:
    """Take three steps on tensors with whole blocks and a tail; return parameters and moments."""
    signed = trial_values(256).sort().values
    codes = signed, signed.abs().sort().values
    steps = torch.arange(65536, device="cpu") * 2 / 65535 - 1
    nearest = tuple(torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5).byte() for code in codes)
    tensors = []
    for n in (3 * 256 + 7, 2 * 256):
        indices, absmax = (
            torch.zeros(n, dtype=torch.uint8, device="cpu"),
            torch.zeros(-(-n // 256), device="cpu"),
        )
        moments = indices, absmax, indices.clone(), absmax.clone()
        tensors.append((trial_values(n), trial_values(n).roll(5), *moments))
    for t in (1, 2, 3):  # beta1, 1 - beta1, beta2, 1 - beta2, correction of v, eps, decay, step
        scalars = (
            0.9,
            1 - 0.9,
            0.999,
            1 - 0.999,
            math.sqrt(1 - 0.999**t),
            1e-8,
            1 - 1e-5,
            -1e-3 / (1 - 0.9**t),
        )
        adamw_8bit(tensors, codes, nearest, scalars)
    return [part for parts in tensors for part in parts]


TRIALS = {
    "quantize": (quantize_trial, native.quantize),
    "dequantize": (dequantize_trial, native.dequantize),
    "matmul": (matmul_trial, native.matmul),
    "gemv": (gemv_trial, native.gemv),
    "adamw_8bit": (adamw_trial, native.adamw_8bit),
}
