"""Mistakes that a user can mend, told in one line.

A mistake of the user's is a `UserError`: its text names the value, the place and the mend. Scripts run their `main` through
`run_script`, which prints that one line to stderr and exits with code 2, without a traceback. So it does for a disk that is full
or may not be written, and for a name that is too long. Every other exception is a fault of this program and keeps its traceback.
"""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A mistake the user can mend. The message says what is wrong, where, and what to do about it; in one line, always."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # values and names of files may hold line ends of any kind


def raise_error(error: UserError) -> None:
    """What readers of many rows do with a fault unless they are given something else to do, such as `list.append`."""
    raise error


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name`, as the tail of an error message: "; nearest: 'v_proj'", or all of the known ones."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {match[0]!r}" if match else f"; known: {', '.join(sorted(known))}"


def describe(problems: list[str], most: int = 8) -> str:
    """Several problems in one line, the first `most` of them in full."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 a mistake of the user's, 130 interrupted with Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
