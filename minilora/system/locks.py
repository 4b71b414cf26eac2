"""One process at a time writes a directory.

Two trainers in one output_dir would both end well and leave a mixture of two runs. So a process locks the
directory before it changes anything there, with flock on a file `.lock` that holds its process id. The system
releases the lock when the process ends, however it ends: a file that a killed run left locks nothing. At a
normal end the file is removed.

A file system without flock has no lock, and neither has Windows: there, two runs at once are not noticed. On
NFS the process id may be one of another machine.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from minilora.system.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
# Not through a link: in a directory that others made it could lead to any file, which would be overwritten.
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def locked(name: str, directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. Raises UserError, naming the process, if another one holds it.

    `name` is the option that sets the directory.
    """
    path = directory / LOCK_FILE
    descriptor = _acquire(path)
    if descriptor is None:
        raise _in_use(name, directory)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        # First the file, then the lock: nobody may lock a file that is about to be removed.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def check_unlocked(name: str, directory: Path) -> None:
    """Raise UserError if another process holds the directory's lock. Leaves no trace."""
    try:
        descriptor = os.open(directory / LOCK_FILE, _FLAGS)
    except OSError:
        return  # There is none, or `locked` will tell.
    try:
        if not _try_lock(descriptor):
            raise _in_use(name, directory)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """The descriptor of the locked file, or None if another process holds the lock."""
    while True:
        descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        if _is_still(descriptor, path):
            return descriptor
        os.close(descriptor)  # Its holder has removed it after it was opened here: the next one counts.


def _try_lock(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # This file system has no locks.
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the path leads to the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _in_use(name: str, directory: Path) -> UserError:
    for _ in range(20):  # A process writes its number just after it has got the lock.
        with contextlib.suppress(OSError, ValueError):
            holder = int((directory / LOCK_FILE).read_bytes()[:20])
            return UserError(
                f"{name} {directory} is used by process {holder}, which is still running; "
                f"wait for it, stop it, or choose another {name}"
            )
        time.sleep(0.05)
    return UserError(f"{name} {directory} was used by another process just now; try again")
