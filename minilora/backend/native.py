"""The C forms of operations on a CPU: quantize, dequantize and multiply 4-bit weights, AdamW with 8-bit
moments.

A CPU is limited by memory here, and every PyTorch operation reads and writes the whole tensor once more. C
reads a block of weights, scales, compares, packs and forgets it while it is in a register: one pass where
PyTorch needs a dozen. The same library holds the operations of elementwise.py.

The machine's own C compiler builds `native.c` on first use, in a few seconds, never on import: library.py.
Nothing depends on it. The PyTorch definitions in `quantization.py` and `optim.py` run without a compiler, and
where the library cannot be had or does not give known bits on trial tensors (native_trial.py). One line says
so in the last two cases.

Why not torch.compile or torch.utils.cpp_extension: one brings a whole compiler for a hundred lines, the other
a C++ build with PyTorch's headers. This is plain C with standard headers. It runs on the threads of PyTorch's
own OpenMP library, which would otherwise wait in a loop for PyTorch's next operation and keep the cores busy.
In a process that was forked, where those threads are missing, each call starts POSIX threads, some twenty
microseconds each.

The compiler must not contract a product and a sum into one rounding (-ffp-contract=off), reorder, or flush
subnormals. Where PyTorch rounds the two once, the source says fmaf.
"""

import ctypes
import math
import os
from functools import lru_cache
from pathlib import Path

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
