"""The compiled library is loaded only if it is whole and private. Whatever the cache is like, the bits are the known ones."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.project import PROGRAM_ENVIRONMENT

from minilora import UserError
from minilora.backend import library, native, native_trial

C_COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = pytest.mark.skipif(os.name != "posix" or not C_COMPILER, reason="there is no C compiler")
SOURCES, FUNCTIONS = [native._SOURCE, *native._INCLUDED], ["use_openmp", "quantize_fp32"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The library, compiled without a cache."""
    path = tmp_path_factory.mktemp("compiled") / "native.so"
    library._compile([C_COMPILER], native._SOURCE, path)
    return path


@pytest.fixture
def new_process(monkeypatch):
    """A function that forgets what was loaded, as in a new process."""

    def forget():
        native._functions.cache_clear()
        native_trial.is_trusted.cache_clear()
        native._warn_once.cache_clear()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minilora" / "native"


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """Where temporary directories are made."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(library.tempfile, "tempdir", str(directory))
    return directory


@pytest.fixture
def quick_compiler(monkeypatch, compiled, tmp_path) -> Path:
    """A compiler that copies what was compiled before, as CC; a file with a line for each time that it ran."""
    log, script = tmp_path / "runs", tmp_path / "cc"
    log.touch()
    script.write_text(f"#!/bin/sh\necho run >> {log}\ncp {compiled} native.so\n")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return log


def compilations(log: Path) -> int:
    return log.read_text().count("run")


def test_a_library_is_compiled_once_and_then_loaded_from_a_directory_of_its_own(quick_compiler, cache):
    for _ in range(3):
        assert library.load_library(SOURCES, FUNCTIONS).quantize_fp32
    assert compilations(quick_compiler) == 1
    [path] = cache.iterdir()
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert cache.stat().st_mode & 0o777 == 0o700


CORRUPTIONS = """
import hashlib, os, random, shutil, sys
from pathlib import Path
from minilora.backend import native, native_trial

cache, log, foreign = map(Path, sys.argv[1:])
rng = random.Random(0)

def rename(path, data):
    path.write_bytes(data)
    stem = path.stem.rpartition("-")[0]
    path.rename(path.with_name(f"{stem}-{hashlib.sha256(data).hexdigest()}.so"))

def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << rng.randrange(8)
    path.write_bytes(data)

def corruptions(path):
    size = path.stat().st_size
    for length in (0, 1, 63, 64, 4096, size // 2, size - 1, *(rng.randrange(size) for _ in range(8))):
        yield f"truncated to {length}", lambda: os.truncate(path, length)
    for position in (0, 4, 18, 32, *(rng.randrange(size) for _ in range(20))):
        yield f"flipped at {position}", lambda: flip(path, position)
    yield "longer", lambda: path.write_bytes(path.read_bytes() + b"0")
    yield "huge", lambda: os.truncate(path, 1 << 40)
    yield "text", lambda: path.write_text("no library")
    yield "a FIFO", lambda: (path.unlink(), os.mkfifo(path))
    yield "a link to itself", lambda: (path.unlink(), path.symlink_to(path.name))
    yield "a link to nothing", lambda: (path.unlink(), path.symlink_to("nothing"))
    yield "a link to a whole one", lambda: path.symlink_to(path.rename(path.with_suffix(".other")))
    yield "text with its digest", lambda: rename(path, b"no library")
    yield "a library without the functions", lambda: rename(path, foreign.read_bytes())
    yield "gone", lambda: path.unlink()

def uses():
    native._functions.cache_clear(), native_trial.is_trusted.cache_clear()
    assert native_trial.is_trusted("quantize") and native_trial.is_trusted("dequantize") and native_trial.is_trusted("adamw_8bit")
    return log.read_text().count("run")

before = uses()
[good] = cache.iterdir()
for name, corrupt in corruptions(good):
    print(name, flush=True)
    good.rename(good.with_suffix(".loaded"))  # this process still runs the code in it
    shutil.copy(good.with_suffix(".loaded"), good)
    corrupt()
    assert uses() == before + 1, "compiled once more"
    assert uses() == before + 1, "and kept"
    before += 1
    for path in set(cache.iterdir()) - {good}:
        path.unlink()
good.unlink()
good.mkdir()
assert uses() == before + 2
print("every", "end")
"""


def test_whatever_lies_in_the_cache_a_process_ends_normally_and_gives_the_known_bits(
    quick_compiler, cache, tmp_path
):
    """In a process of its own, which a truncated library would end with a bus error, and a FIFO stop for ever."""
    (tmp_path / "empty.c").write_text("int nothing;")
    foreign = tmp_path / "foreign.so"
    library._compile([C_COMPILER], tmp_path / "empty.c", foreign)
    environment = PROGRAM_ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": os.environ["CC"]}
    run = subprocess.run(
        [sys.executable, "-c", CORRUPTIONS, str(cache), str(quick_compiler), str(foreign)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.endswith("every end\n"), run.stdout + run.stderr
    # Only a directory cannot be replaced, and this is the one thing that is said.
    assert run.stderr.count("\n") == 1 and "Is a directory" in run.stderr
    assert run.stderr.startswith("warning: each process compiles the C library again")


@given(data=st.binary(max_size=50), position=st.integers(0, 60), bit=st.integers(0, 7), cut=st.booleans())
def test_a_file_is_whole_if_no_bit_of_it_is_changed_or_missing(tmp_path_factory, data, position, bit, cut):
    path = tmp_path_factory.mktemp("file") / f"native-0-{hashlib.sha256(data).hexdigest()}.so"
    path.write_bytes(data)
    assert library._is_whole(path)
    if data:
        position %= len(data)
        changed = data[:position] + (
            b"" if cut else bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
        )
        path.write_bytes(changed)
        assert not library._is_whole(path)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root gives files away")
def test_a_library_of_another_user_is_not_loaded(quick_compiler, cache):
    library.load_library(SOURCES, FUNCTIONS)
    [path] = cache.iterdir()
    os.chown(path, 54321, -1)
    library.load_library(SOURCES, FUNCTIONS)
    assert compilations(quick_compiler) == 2 and path.stat().st_uid == os.getuid()


# ---- no cache ------------------------------------------------------------------------------------------------


def without_a_home(monkeypatch, cache):
    import pwd

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    return "set HOME or XDG_CACHE_HOME"


def on_a_full_disk(monkeypatch, cache):
    def full(source, target):
        if Path(target).parent == cache:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        os.rename(source, target)

    monkeypatch.setattr(library.os, "replace", full)
    return "No space left on device"


def in_an_open_directory(monkeypatch, cache):
    cache.parents[1].mkdir()
    cache.parents[1].chmod(0o775)
    return f"chmod go-w {cache.parents[1]}"


def where_the_library_directory_is_open(monkeypatch, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o770)
    return f"chmod go-w {cache}"


def below_a_file(monkeypatch, cache):
    cache.parents[1].touch()
    return "set XDG_CACHE_HOME to a directory that you can write"


def where_a_file_has_its_name(monkeypatch, cache):
    cache.parent.mkdir(parents=True)
    cache.touch()
    return "set XDG_CACHE_HOME to a directory that you can write"


@pytest.mark.parametrize(
    "broken",
    [
        without_a_home,
        on_a_full_disk,
        in_an_open_directory,
        where_the_library_directory_is_open,
        below_a_file,
        where_a_file_has_its_name,
    ],
)
def test_without_a_cache_each_process_compiles_in_a_temporary_directory_and_says_so_in_one_line(
    broken, quick_compiler, cache, temporary, monkeypatch, new_process, capsys
):
    mend = broken(monkeypatch, cache)
    before = compilations(quick_compiler)
    assert all(native_trial.is_trusted(operation) for operation in ("quantize", "dequantize", "adamw_8bit"))
    assert compilations(quick_compiler) > before and not list(temporary.iterdir())
    said = capsys.readouterr().err
    assert said.startswith("warning: each process compiles the C library again") and said.count("\n") == 1
    assert mend in said


def test_a_group_writable_cache_of_this_user_is_closed_and_used(quick_compiler, cache, capsys):
    """An old `fetch_folder` has made it with umask 002."""
    cache.parent.mkdir(parents=True)
    cache.parent.chmod(0o775)
    for _ in range(2):
        library.load_library(SOURCES, FUNCTIONS)
    assert compilations(quick_compiler) == 1 and capsys.readouterr().err == ""
    assert cache.parent.stat().st_mode & 0o777 == 0o755


def test_nothing_is_loaded_from_a_temporary_directory_that_others_may_write(
    quick_compiler, cache, temporary, monkeypatch, new_process, capsys
):
    below_a_file(monkeypatch, cache)
    temporary.chmod(0o777)
    assert not native_trial.is_trusted("quantize") and compilations(quick_compiler) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"chmod go-w {temporary}" in said


# ---- no compiler ---------------------------------------------------------------------------------------------


def test_a_machine_without_a_compiler_hears_nothing(cache, monkeypatch, new_process, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert library.load_library(SOURCES, FUNCTIONS) is None
    assert not native_trial.is_trusted("quantize") and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "compiler, said",
    [
        ("/no/such/compiler", "'/no/such/compiler' fails: No such file or directory"),
        ("/", "'/' fails: Permission denied"),
        ("sh -c", "'sh' fails: "),
        ("false", "'false' fails: exit code 1"),
        ("true", "'true' fails: it makes no library"),
        ("sh -c 'cat; exit 3'", "'sh' fails: exit code 3"),  # it reads what the user types, if it can
        ("sh -c 'echo text > native.so'", "a compiled library does not load"),
        (f"{C_COMPILER} -fno-such-option", "no-such-option"),
        ("cc '", "No closing quotation"),
    ],
)
def test_a_compiler_that_fails_is_one_line_a_process_and_the_definitions_run(
    compiler, said, cache, temporary, monkeypatch, new_process, capsys
):
    monkeypatch.setenv("CC", compiler)
    for operation in ("quantize", "dequantize", "adamw_8bit"):
        assert not native_trial.is_trusted(operation)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and re.search("set CC to|set it to|or CC to", err)
    assert err.startswith("warning: training is slower on this CPU")
    assert not list(temporary.iterdir()) and not list(cache.glob("*"))


def test_the_library_of_a_compiler_that_failed_is_not_loaded(cache, compiled, monkeypatch):
    """It was killed while it wrote, say."""
    monkeypatch.setenv("CC", f"sh -c 'cp {compiled} native.so; exit 1'")
    with pytest.raises(UserError, match="'sh' fails: exit code 1"):
        library.load_library(SOURCES, FUNCTIONS)


def test_a_compiler_that_does_not_end_is_stopped(cache, monkeypatch):
    monkeypatch.setenv("CC", "sh -c 'exec sleep 300'")
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    with pytest.raises(UserError, match="'sh' fails: not finished after 0.2 seconds"):
        library.load_library(SOURCES, FUNCTIONS)


def test_a_process_that_may_open_no_more_files_is_not_told_to_change_its_compiler(
    cache, monkeypatch, new_process, capsys
):
    def run(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setenv("CC", C_COMPILER)
    monkeypatch.setattr(library.subprocess, "run", run)
    assert not native_trial.is_trusted("quantize")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Too many open files" in said and "CC" not in said


def test_a_new_library_without_the_functions_is_not_used_nor_kept(cache, tmp_path):
    (tmp_path / "empty.c").write_text("int nothing;")
    with pytest.raises(UserError, match="no function use_openmp"):
        library.load_library([tmp_path / "empty.c"], FUNCTIONS)
    assert not list(cache.iterdir())
