"""This user's cache, ~/.cache/minilora (or in XDG_CACHE_HOME): remote folders, and the compiled C library.

A library is code, so it matters who can write it. Whoever may write to a directory may rename anything in it:
a private directory inside an open one can be moved away, and another one put into its place. So a path is
only as private as the weakest of its parts, from the root down:

    each part belongs to this user or to root;
    nobody else may write to it, except where the sticky bit forbids to rename the files of others (/tmp);
    where a part is a symbolic link, the same holds for the link and for each part of its target.

The cache itself belongs to minilora: it is made with mode 0700, and one that others may write loses that
permission. Every other directory is the user's own business and is never changed.
"""

import os
import stat
from pathlib import Path

from minilora.system.errors import UserError


def private_cache() -> Path:
    """Make the cache if it is missing, keep others from writing to it, and return it. Raises UserError."""
    cache = _cache_home() / "minilora"
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.mkdir(mode=0o700, exist_ok=True)
        status = cache.lstat()
        if os.name == "posix" and status.st_uid == os.getuid() and _others_may_write(status):
            cache.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    except OSError as error:
        reason = f"{cache} cannot be a cache ({error.strerror})"
        raise UserError(f"{reason}; set XDG_CACHE_HOME to a directory that you can write") from error
    return cache


def _cache_home() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    except (RuntimeError, OSError) as error:  # a user without a home; a current directory that was deleted
        raise UserError(
            "this user has no home directory for a cache; set HOME or XDG_CACHE_HOME to a directory that you "
            "can write"
        ) from error


def check_private(directory: Path) -> None:
    """Raise UserError if another user could write to a directory, or replace it.

    Raises OSError if a part of its path does not exist or cannot be looked at.
    """
    directory = directory.absolute()
    directory.stat()  # symbolic links in a circle end here, with an OSError
    for part in (*reversed(directory.parents), directory):
        status = part.lstat()
        if status.st_uid not in (0, os.getuid()):
            raise UserError(f"{part} belongs to another user; set XDG_CACHE_HOME to a directory of your own")
        if stat.S_ISLNK(status.st_mode):
            return check_private(part.parent / os.readlink(part) / directory.relative_to(part))
        if _others_may_write(status) and (part == directory or not status.st_mode & stat.S_ISVTX):
            raise UserError(f"other users may write to {part}; take that from them: chmod go-w {part}")


def _others_may_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not stat.S_ISLNK(status.st_mode)
