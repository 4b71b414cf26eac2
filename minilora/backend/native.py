"""4-bit quantize and dequantize, and AdamW with 8-bit moments, on a CPU, in C: one pass over memory where
PyTorch needs a dozen.

A CPU is limited by memory here, and every PyTorch operation reads and writes the whole tensor once more. In C
a block of weights is read, scaled, compared, packed and forgotten while it is in a register. The source,
`native.c`, is compiled by the machine's own C compiler on first use (a second or two), never on import, and
kept in a per-user cache. Nothing depends on it: where there is no compiler, where the build fails, and where
the library does not give the bits of the definition in `ops.py` on a trial tensor, the definition itself
runs. MINILORA_BACKEND=torch does without it too.

Why not torch.compile or torch.utils.cpp_extension: one brings a whole compiler for a hundred lines, the other
a C++ build with PyTorch's headers; this is plain C with no headers but the standard ones. Threads are POSIX
threads started per call, some ten microseconds each: no second OpenMP beside PyTorch's, nothing to go wrong
after a fork.

What the compiler may not do: contract a product and a sum into one rounding (-ffp-contract=off), reorder, or
flush subnormals. Where PyTorch rounds the two once, the source says fmaf.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".c")

_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
_NATIVE = (
    ("-march=native", "-mprefer-vector-width=512"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)  # the first that compiles
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_VALUES_A_THREAD = 1 << 17  # fewer are done before a second thread has started


def quantize(
    x: Tensor, bounds: Tensor, symbols: Tensor, blocksize: int, packed: Tensor, absmax: Tensor
) -> bool:
    """`ops.quantize_4bit` on CPU tensors, into `packed` and `absmax`; False if it cannot be done here."""
    function = _function("quantize", x.dtype)
    if function is None:
        return False
    steps = symbols.diff(prepend=symbols.new_zeros(1)).int()  # (16,)
    function(
        _at(x), _at(bounds), _at(steps), blocksize, x.numel(), _at(packed), _at(absmax), _threads(x.numel())
    )
    return True


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    n: int,
    out: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: float,
) -> bool:
    """`ops.dequantize_4bit` on CPU tensors, into `out`; False if it cannot be done here."""
    function = _function("dequantize", out.dtype)
    if function is None:
        return False
    nested = (None, None) if nested_absmax is None else (_at(nested_absmax), _at(nested_code))
    function(_at(packed), _at(absmax), _at(code), blocksize, n, _at(out), *nested, offset, _threads(n))
    return True


def adamw_8bit(
    tensors: list[tuple[Tensor, ...]],
    codes: tuple[Tensor, Tensor],
    nearest: tuple[Tensor, Tensor],
    scalars: tuple[float, ...],
) -> bool:
    """`adamw.adamw_8bit` on CPU tensors, all of them in one call; False if it cannot be done here."""
    function = functions().get("adamw_8bit")
    if function is None:
        return False
    addresses = torch.tensor(
        [[*map(_at, parts), len(parts[0])] for parts in tensors], dtype=torch.int64, device="cpu"
    )
    blocks = sum(len(parts[3]) for parts in tensors)
    function(_at(addresses), blocks, *map(_at, codes), *map(_at, nearest), *scalars, _threads(256 * blocks))
    return True


def _at(x: Tensor) -> int:
    assert x.is_contiguous() and x.device.type == "cpu"
    return x.data_ptr()


def _threads(n: int) -> int:
    return max(1, min(torch.get_num_threads(), n // _VALUES_A_THREAD))


def _function(operation: str, dtype: torch.dtype):
    return functions().get(f"{operation}_{_NAMES[dtype]}")


@lru_cache(maxsize=1)
def functions() -> dict:
    """Name -> C function, empty where there is none. Built, loaded and tried out on the first call."""
    if os.name != "posix":
        return {}
    try:
        library = ctypes.CDLL(str(_library()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return {}
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "quantize": [pointer] * 3 + [count] * 2 + [pointer] * 2 + [ctypes.c_int],
        "dequantize": [pointer] * 3 + [count] * 2 + [pointer] * 3 + [ctypes.c_float, ctypes.c_int],
    }
    found = {}
    for operation, types in arguments.items():
        for name in _NAMES.values():
            if hasattr(library, f"{operation}_{name}"):
                found[f"{operation}_{name}"] = function = getattr(library, f"{operation}_{name}")
                function.argtypes, function.restype = types, None
    found["adamw_8bit"] = function = library.adamw_8bit
    function.argtypes = [pointer, count] + [pointer] * 4 + [ctypes.c_float] * 8 + [ctypes.c_int]
    function.restype = None
    return found


def _library() -> Path:
    """The compiled library, from the cache or built now. Raises one of four errors if there can be none."""
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [c for c in map(shutil.which, ("cc", "gcc", "clang")) if c][:1]
    )
    if not compiler:
        raise RuntimeError("no C compiler")
    key = hashlib.sha256(repr((_SOURCE.read_text(), _FLAGS, _NATIVE, compiler, _cpu())).encode()).hexdigest()[
        :16
    ]
    directory = _cache()
    path = directory / f"native-{key}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=directory) as build:
            for native in _NATIVE:
                command = [*compiler, *_FLAGS, *native, str(_SOURCE), "-lm", "-o", "native.so"]
                if subprocess.run(command, cwd=build, capture_output=True, timeout=60).returncode == 0:
                    break
            os.replace(Path(build) / "native.so", path)  # whole or not at all, whoever else builds it now
    return path


def _cache() -> Path:
    """A directory that is this user's alone: code is loaded from it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "minilora"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{directory} can be written by others")
    return directory


def _cpu() -> tuple[str, ...]:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return (
        sys.platform,
        platform.machine(),
        *re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE)[:2],
    )
