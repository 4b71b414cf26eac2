"""The C library as a file: compiled on first use, kept in this user's cache, loaded if whole and private.

To load a library is to run its code, and a truncated one ends the process with a bus error, which no `try`
can catch. So two questions come before it:

    Can nobody else have written it?    It lies in a directory of its own, `native` in the cache, mode 0700,
                                        and no part of the path may be writable by others: system/cache.py.
    Is it the file that was compiled?   Its name ends with the SHA-256 digest of its bytes.

A library that fails either of them, does not load, or lacks a function is compiled again, once. A new library
is loaded before it gets its name in the cache, so only libraries that load are kept. Where the cache cannot
be used (no home directory, a full disk, a directory that others may write), the library is compiled in a
temporary directory that is removed at once: a loaded library needs no file. The next process compiles again,
and one line says so.

A machine without a C compiler is nothing unusual, so nothing is said there.
"""

import ctypes
import errno
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minilora.system.cache import check_private, private_cache
from minilora.system.errors import UserError

_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
_WIDE = ("-march=native", "-mprefer-vector-width=512")
_NATIVE = (_WIDE, ("-march=native",), ("-mcpu=native",), ())  # the first that compiles
_LARGEST = 1 << 24  # bytes of a file in the cache that are read; a library has some 50,000
_SECONDS = 60  # for one run of the compiler, which takes two


@dataclass(frozen=True)
class _Recipe:
    """How a library is made, and what must be in it."""

    compiler: list[str]
    sources: Sequence[Path]  # the first one includes the others
    functions: Sequence[str]

    @property
    def name(self) -> str:
        """Return the beginning of the library's name, which changes with sources, compiler and CPU."""
        texts = [path.read_text(encoding="utf-8") for path in self.sources]
        parts = repr((texts, _FLAGS, _NATIVE, self.compiler, _cpu()))
        return f"native-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def load_library(sources: Sequence[Path], functions: Sequence[str]) -> ctypes.CDLL | None:
    """Return the library of sources[0], which includes the others; None where there is no C compiler.

    Raises UserError or OSError where there is a compiler, but no library with all of the functions.
    """
    recipe = _Recipe(_compiler(), sources, functions)
    if not recipe.compiler:
        return None
    try:
        cache = _cache()
        return _cached(cache, recipe) or _new(cache, recipe)
    except UserError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error}; set XDG_CACHE_HOME to a directory that you can write"
    with tempfile.TemporaryDirectory(prefix="minilora-", ignore_cleanup_errors=True) as directory:
        check_private(Path(directory))
        library = _new(Path(directory), recipe)
    warn(f"each process compiles the C library again, because it cannot be kept: {reason}")
    return library


def warn(text: str) -> None:
    """Print a line about something that is slower than it could be."""
    print("warning:", " ".join(text.split()), file=sys.stderr)


def _compiler() -> list[str]:
    """Return the words that start a C compiler: from the variable CC, else the first one found, or []."""
    text = os.environ.get("CC", "")
    try:
        words = shlex.split(text)
    except ValueError as error:  # an open quote
        raise UserError(
            f"CC = {text!r} is no command ({error}); set it to a C compiler, or unset it"
        ) from error
    return words or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]


def _cache() -> Path:
    """Return the directory of cached libraries. Raises OSError or UserError if it cannot be trusted."""
    directory = private_cache() / "native"
    directory.mkdir(mode=0o700, exist_ok=True)
    check_private(directory)
    return directory


def _cached(cache: Path, recipe: _Recipe) -> ctypes.CDLL | None:
    """Return the first library in the cache that is whole and loads, or None."""
    for path in sorted(cache.glob(f"{recipe.name}-*.so")):
        if _is_whole(path):
            with suppress(UserError):  # a library of another machine that has the same home directory
                return _load(path, recipe.functions)
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file in the cache is a regular one, not too large, and has the digest that its name says."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:  # a FIFO would be read for ever
        return False
    is_ours = status.st_uid in (0, os.getuid())
    return is_ours and path.stem.rpartition("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()


def _new(cache: Path, recipe: _Recipe) -> ctypes.CDLL:
    """Compile a library, load it, and only then put it into the cache. Raises UserError or OSError."""
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as build:
        built = Path(build) / "native.so"
        _compile(recipe.compiler, recipe.sources[0], built)
        library = _load(built, recipe.functions)
        digest = hashlib.sha256(built.read_bytes()).hexdigest()
        os.replace(built, cache / f"{recipe.name}-{digest}.so")  # at once: other processes may do the same
    return library


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    """Compile a source file with the first flags that the compiler knows. Raises UserError or OSError."""
    for native in _NATIVE:
        command = [*compiler, *_FLAGS, *native, str(source), "-lm", "-o", built.name]
        problem = _run(command, built.parent)
        if not problem and built.is_file():
            return
    raise _failure(compiler, problem or "it makes no library")


def _run(command: list[str], directory: Path) -> str:
    """Run a compiler in a directory. Return "" if it succeeds, else its first line or its exit code."""
    try:
        run = subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _failure(command, f"not finished after {_SECONDS} seconds") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
            raise  # no other compiler would start either
        raise _failure(command, error.strerror) from error
    if run.returncode == 0:
        return ""
    said = run.stderr.decode(errors="replace").strip() or f"exit code {run.returncode}"
    return said.splitlines()[0][:200]


def _failure(command: list[str], reason: str) -> UserError:
    return UserError(f"the C compiler {command[0]!r} fails: {reason}; set CC to one that works, or unset it")


def _load(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    """Load a library. Raises UserError if it does not load, or lacks one of the functions."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"a compiled library does not load ({error}); set XDG_CACHE_HOME to a directory from which "
            "programs may run, or CC to the compiler of this machine"
        ) from error
    for name in functions:
        if not hasattr(library, name):
            raise UserError(f"the library {path} has no function {name}")
    return library


def _cpu() -> tuple[str, ...]:
    """Return what -march=native depends on: unlike machines may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return (
        sys.platform,
        platform.machine(),
        *re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE)[:2],
    )
