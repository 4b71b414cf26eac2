"""An output that consists of one large file or of many files appears whole, in one step.

    with whole_output("--output", Path("prepared"), replaced=("train.jsonl", ...)) as part:
        ...                                     # make `part`: a file or a folder

`part` lies in a folder of its own beside the output. At the end it takes the output's name, and nobody ever
sees half of it:

    prepared.part/.lock      the process that is writing
    prepared.part/new        the new output, while it is written
    prepared.part/old        the replaced output, on systems that cannot exchange two names

If there is no output yet, a rename is this step. A folder that exists already is exchanged with the new
one. Linux does this in one step, too (renameat2). Elsewhere it takes two: the old folder goes to `old`,
then the new one takes its name. A kill can fall between them. So the next run first finishes the swap: if
there is `old` and no output, `new` is complete.

Files that the user has in such a folder stay: the new one gets hard links to them. The name `prepared.part`
never changes, so the next run finds and removes what a killed one left.
"""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from minilora.system.errors import UserError
from minilora.system.files import sync
from minilora.system.locks import LOCK_FILE, check_unlocked, locked

_NEW, _OLD = "new", "old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's C headers


@contextlib.contextmanager
def whole_output(name: str, output: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yield a path at which to make the output, a file or a folder; then give it its name in one step.

    `name` is the option that sets the path, such as "--output". In an output folder that exists already, the
    files called `replaced` are replaced and all others stay. After an exception nothing has changed. Raises
    UserError as `check_output` does.
    """
    check_output(name, output)
    output = Path(os.path.realpath(output))  # the target of a link, not the link, is replaced
    workshop = _workshop(output)
    made = [folder for folder in (workshop, *workshop.parents) if not folder.exists()]
    try:
        workshop.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {output} cannot be written: {error.strerror}") from error
    try:
        with locked(name, workshop):
            _finish_swap(output)
            _empty(workshop)
            try:
                yield workshop / _NEW
                _sync_all(workshop / _NEW)
                if output.is_dir():
                    _keep(output, workshop / _NEW, replaced)
                _swap(workshop / _NEW, output)
            finally:
                _empty(workshop)
    finally:
        for folder in made or [workshop]:
            with contextlib.suppress(OSError):  # It holds the output, or another process has begun to use it.
                folder.rmdir()


def check_output(name: str, output: Path) -> None:
    """Raise UserError if an output of `whole_output` cannot take this place. Leaves no trace."""
    real = Path(os.path.realpath(output))
    if real.is_dir():
        if real == Path.cwd() or real in Path.cwd().parents:
            raise UserError(
                f"{name} {output} holds the working directory, which cannot be replaced; choose another"
            )
        if os.path.ismount(real):
            raise UserError(f"{name} {output} is a mount point; choose a folder in it")
    workshop = _workshop(real)
    if os.path.lexists(workshop) and not _is_mine(workshop):
        raise UserError(f"{name} {output}: {workshop} is in the way; move it, or choose another {name}")
    check_unlocked(name, workshop)


def _workshop(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def _is_mine(workshop: Path) -> bool:
    """Whether this is a folder of a run like this one, and not of the user."""
    if workshop.is_symlink() or not workshop.is_dir():
        return False
    return {path.name for path in workshop.iterdir()} <= {LOCK_FILE, _NEW, _OLD}


def _empty(workshop: Path) -> None:
    for path in (workshop / _NEW, workshop / _OLD):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _keep(output: Path, new: Path, replaced: Collection[str]) -> None:
    """Give the new folder everything of the old one that is not replaced."""

    def others(folder: str, names: list[str]) -> Collection[str]:
        return set(names) & set(replaced) if Path(folder) == output else ()

    try:
        shutil.copytree(output, new, symlinks=True, ignore=others, copy_function=_link, dirs_exist_ok=True)
    except shutil.Error as error:  # a list of sources, targets and reasons
        raise UserError(f"{output} cannot be replaced: {error.args[0][0][2]}") from error


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy of it on file systems without them. Never replaces a file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _sync_all(path: Path) -> None:
    """Force a file, or a folder and everything in it, to disk."""
    for entry in (*path.rglob("*"), path):
        sync(entry)


def _swap(new: Path, output: Path) -> None:
    """Give `new` the name `output`; what had this name before is in the folder of `new` after that."""
    if not output.is_dir():
        os.replace(new, output)
    elif not _exchange(new, output):
        os.replace(output, new.with_name(_OLD))
        os.replace(new, output)
    sync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. Returns False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _finish_swap(output: Path) -> None:
    """Finish the swap of a run that was killed in the middle of it."""
    new, old = (_workshop(output) / name for name in (_NEW, _OLD))
    if old.is_dir() and new.is_dir() and not os.path.lexists(output):
        os.replace(new, output)
