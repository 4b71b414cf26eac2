"""The C forms of operations on a CPU: quantize, dequantize and multiply 4-bit weights, AdamW with 8-bit
moments.

A CPU is limited by memory here, and every PyTorch operation reads and writes the whole tensor once more. C
reads a block of weights, scales, compares, packs and forgets it while it is in a register: one pass where
PyTorch needs a dozen. The same library holds the operations of elementwise.py.

The machine's own C compiler builds `native.c` on first use, in a few seconds, never on import: library.py.
Nothing depends on it. The PyTorch definitions in `quantization.py` and `optim.py` run without a compiler, and
where the library cannot be had or does not give known bits on trial tensors. One line says so in the last two
cases.

Why not torch.compile or torch.utils.cpp_extension: one brings a whole compiler for a hundred lines, the other
a C++ build with PyTorch's headers. This is plain C with standard headers. It runs on the threads of PyTorch's
own OpenMP library, which would otherwise wait in a loop for PyTorch's next operation and keep the cores busy.
In a process that was forked, where those threads are missing, each call starts POSIX threads, some twenty
microseconds each.

The compiler must not contract a product and a sum into one rounding (-ffp-contract=off), reorder, or flush
subnormals. Where PyTorch rounds the two once, the source says fmaf.
"""

import ctypes
import hashlib
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from minilora.backend.library import load_library, warn
from minilora.backend.scratch import scratch
from minilora.system.errors import UserError

_SOURCE = Path(__file__).with_suffix(".c")
_INCLUDED = [_SOURCE.with_name(name) for name in ("elementwise.c", "gemv.c", "amx.c", "attention.c")]

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_VALUES_A_THREAD = 1 << 17  # fewer are finished before a second thread has started
_ROWS_AT_ONCE, _W_AT_ONCE = 1024, 384 * 1024  # rows of x; weights of a chunk, 768 kB of a core's cache
_NEED_AMX = {"matmul_bf16", "attention_bf16", "attention_backward_bf16"}


def quantize(
    x: Tensor, bounds: Tensor, symbols: Tensor, blocksize: int, packed: Tensor, absmax: Tensor
) -> None:
    """Fill `packed` and `absmax` with the blocks of x, (n,): see `quantization.quantize_4bit`."""
    steps = symbols.diff(prepend=symbols.new_zeros(1)).int()  # (16,)
    function = _functions()[f"quantize_{_NAMES[x.dtype]}"]
    function(
        _at(x), _at(bounds), _at(steps), blocksize, x.numel(), _at(packed), _at(absmax), _threads(x.numel())
    )


def dequantize(q, out: Tensor) -> None:
    """Fill `out`, contiguous, with the values of q, a `quantization.QuantizedTensor`."""
    n = out.numel()
    function = _functions()[f"dequantize_{_NAMES[out.dtype]}"]
    function(_at(q.packed), _at(q.absmax), _at(q.code), q.blocksize, *_nested(q), n, _at(out), _threads(n))


def _nested(q) -> tuple[int | None, int | None, float]:
    """Return what C takes of the scales' scales of q, a `quantization.QuantizedTensor`."""
    if q.nested_absmax is None:
        return None, None, 0.0
    return _at(q.nested_absmax), _at(q.nested_code), float(q.offset)


def multiplies(shape: tuple[int, ...]) -> bool:
    """Whether `matmul` takes a weight of this shape."""
    return len(shape) == 2 and all(n % 32 == 0 for n in shape)


def matmul(
    q,  # W, (out, in), a `quantization.QuantizedTensor`
    x: Tensor,  # (rows, in), or backward (rows, out); contiguous bfloat16, as `out` is
    out: Tensor,  # (rows, out), or backward (rows, in)
    bias: Tensor | None = None,  # (out,) float32
    update: tuple[Tensor, Tensor] | None = None,  # n (rows, r) and B (out, r), or g (rows, r) and A (r, in)
    backward: bool = False,
    add: bool = False,  # backward: to what is in `out`
) -> None:
    """Fill `out` with x W^T + bias + n B^T, or x W + g A: see products.py and amx.c. On a CPU with AMX."""
    rank, narrow, stride, matrix = 0, None, 0, None
    if update is not None:
        assert update[0].dtype == update[1].dtype == torch.bfloat16 and update[0].stride(1) == 1
        rank, stride = update[0].shape[1], update[0].stride(0)
        narrow, matrix = update[0].data_ptr(), _at(update[1])
    numbers, *at_once = tile_numbers(q.shape, len(x), backward, rank)
    tiles = scratch((numbers,), torch.bfloat16, x.device)
    weight = _at(q.packed), _at(q.absmax), _at(q.code), q.blocksize, *_nested(q)
    addresses = None if bias is None else _at(bias), rank, stride, narrow, matrix, _at(out), _at(tiles)
    function, threads = _functions()["matmul_bf16"], _threads(q.shape.numel())
    function(backward, add, len(x), *q.shape, _at(x), *weight, *addresses, *at_once, threads)


def tile_numbers(shape: tuple[int, int], rows: int, backward: bool, rank: int = 0) -> tuple[int, int, int]:
    """Return the bfloat16 numbers that `matmul` keeps beside its operands; and the rows of x and, for each
    thread, the features of W, that are among them at a time.
    """
    features, summed = reversed(shape) if backward else shape
    summed += -(-rank // 32) * 32
    threads = _threads(math.prod(shape))
    chunk = 32 * max(1, min(_W_AT_ONCE // summed // 32, -(-features // threads // 32)))
    rows_at_once = min(-(-rows // 32) * 32, _ROWS_AT_ONCE)
    return summed * (rows_at_once + threads * chunk), rows_at_once, chunk


def gemv(
    q,  # W, (out, in), a `quantization.QuantizedTensor`
    x: Tensor,  # (in,) float32, bfloat16 or float16, contiguous, as `out` is
    out: Tensor,  # (out,)
    bias: Tensor | None = None,  # (out,) float32
    update: tuple[Tensor, Tensor] | None = None,  # n (r,) and B (out, r), float32
) -> None:
    """Fill `out` with W x + bias + B n, summed in float32: see decoding.py and gemv.c."""
    rank, narrow, matrix = 0, None, None
    if update is not None:
        assert update[0].dtype == update[1].dtype == torch.float32
        rank, narrow, matrix = len(update[0]), *map(_at, update)
    weight = _at(q.packed), _at(q.absmax), _at(q.code), q.blocksize, *_nested(q)
    parted = _at(scratch((q.shape[1],), torch.float32, x.device))
    function, threads = _functions()[f"gemv_{_NAMES[x.dtype]}"], _threads(q.shape.numel())
    addresses = None if bias is None else _at(bias), rank, narrow, matrix, parted, _at(out)
    function(*q.shape, _at(x), *weight, *addresses, threads)


def takes_vector(shape: tuple[int, ...]) -> bool:
    """Whether `gemv` takes a weight of this shape: any pair of numbers lies in one byte, of one row."""
    return len(shape) == 2 and shape[1] % 32 == 0


def adamw_8bit(
    tensors: list[tuple[Tensor, ...]],
    codes: tuple[Tensor, Tensor],
    nearest: tuple[Tensor, Tensor],
    scalars: tuple[float, ...],
) -> None:
    """Take one step on all tensors in one call: see `optim.adamw_8bit`."""
    table = [[*(part.data_ptr() for part in parts), parts[0].numel()] for parts in tensors]
    addresses = torch.tensor(table, dtype=torch.int64, device="cpu")
    blocks = sum(parts[3].numel() for parts in tensors)
    threads = _threads(256 * blocks)
    _functions()["adamw_8bit"](
        _at(addresses), blocks, *map(_at, codes), *map(_at, nearest), *scalars, threads
    )


def call(name: str, n: int, *arguments) -> None:
    """Call a C function whose last argument is a number of threads, with as many as n values are worth."""
    _functions()[name](*arguments, _threads(n))


def _at(x: Tensor) -> int:
    assert x.is_contiguous() and x.is_cpu
    return x.data_ptr()


def _threads(n: int) -> int:
    return max(1, min(torch.get_num_threads(), n // _VALUES_A_THREAD))


# ---- loaded on first use -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _functions() -> dict:
    """Return C functions by name, {} where there are none. The first call builds and loads the library."""
    if os.name != "posix":
        return {}
    arguments = _arguments()
    try:
        library = load_library([_SOURCE, *_INCLUDED], ["use_openmp", *arguments.keys() - _NEED_AMX])
    except (UserError, OSError) as error:
        _warn_once(str(error))
        return {}
    if library is None:
        return {}
    has_amx = all(hasattr(library, name) for name in (*_NEED_AMX, "amx_permission"))
    missing = set() if has_amx and library.amx_permission() == 0 else _NEED_AMX
    functions = {name: getattr(library, name) for name in arguments.keys() - missing}
    for name, function in functions.items():
        function.argtypes, function.restype = arguments[name], None
    library.use_openmp.argtypes, library.use_openmp.restype = [ctypes.c_void_p], None
    library.use_openmp(_gomp_parallel())
    os.register_at_fork(after_in_child=lambda: library.use_openmp(None))
    return functions


def _arguments() -> dict[str, list]:
    """Return the types of the arguments of each C function, by name."""
    pointer, count, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    quantized = [*[pointer] * 3, count, pointer, pointer, number]
    arguments = {
        "attention_bf16": [*[pointer] * 4, *[count] * 6, *[pointer] * 4, integer],
        "attention_backward_bf16": [*[pointer] * 7, *[count] * 6, *[pointer] * 6, integer],
        "adamw_8bit": [pointer, count, *[pointer] * 4, *[number] * 8, integer],
        "matmul_bf16": [*[integer] * 2, *[count] * 3, pointer, *quantized, pointer, *[count] * 2]
        + [*[pointer] * 4, *[count] * 2, integer],
    }
    arguments |= _elementwise_arguments()
    for dtype in _NAMES.values():
        arguments[f"quantize_{dtype}"] = [*[pointer] * 3, count, count, pointer, pointer, integer]
        arguments[f"dequantize_{dtype}"] = [*quantized, count, pointer, integer]
        arguments[f"gemv_{dtype}"] = [
            count,
            count,
            pointer,
            *quantized,
            pointer,
            count,
            *[pointer] * 4,
            integer,
        ]
    return arguments


def _elementwise_arguments() -> dict[str, list]:
    """Return them for elementwise.c. All but cross_entropy start with the number of a dtype."""
    pointer, count, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    draws = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
    return {
        "add_norm": [integer, count, count, *[pointer] * 3, number, *[pointer] * 3, integer],
        "add_norm_backward": [integer, count, count, *[pointer] * 6, integer],
        "rope": [integer, *[count] * 3, *[pointer] * 6, count, number, pointer, pointer, integer],
        "swiglu": [integer, count, *[pointer] * 3, integer],
        "swiglu_backward": [integer, count, *[pointer] * 5, integer],
        "cross_entropy": [count, count, *[pointer] * 3, integer],
        "dropout": [integer, count, count, pointer, *draws, pointer, integer],
        "add_dropped": [integer, count, count, pointer, pointer, *draws, integer],
    }


@lru_cache
def _warn_once(reason: str) -> None:
    """Say once that PyTorch's definitions run instead of the C library, and why."""
    warn(f"training is slower on this CPU, without the C library: {reason}")


def _gomp_parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP library that PyTorch loaded, or None."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        try:
            loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


# ---- a compiler is not trusted blindly: known bits on trial tensors ----------------------------------------


@lru_cache
def is_trusted(operation: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a compiled `operation` on tensors of a dtype exists and gives the bits of its PyTorch
    definition.
    """
    name = operation if operation == "adamw_8bit" else f"{operation}_{_NAMES.get(dtype)}"
    if name not in _functions():
        return False
    trial, function = TRIALS[operation]
    if digest(trial(function, dtype)) != KNOWN_BITS[name]:
        _warn_once("it gives other bits than PyTorch; set CC to another C compiler")
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
    "quantize": (quantize_trial, quantize),
    "dequantize": (dequantize_trial, dequantize),
    "matmul": (matmul_trial, matmul),
    "gemv": (gemv_trial, gemv),
    "adamw_8bit": (adamw_trial, adamw_8bit),
}
