"""Mistakes that a user can mend, told in one line.

A mistake of the user's is a `UserError`: its text names the value, the place and the mend. Scripts run their
`main` through `run_script`, which prints that one line to stderr and exits with code 2, without a traceback.
So it does for a disk that is full or may not be written, and for a name that is too long. Every other
exception is a fault of this program and keeps its traceback.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
)


class UserError(ValueError):
    """A mistake the user can mend. The message says what is wrong, where, and what to do about it; in one
    line, always.
    """

    def __str__(self) -> str:
        return " ".join(
            super().__str__().splitlines()
        )  # values and names of files may hold line ends of any kind


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with names in full, and its complaints as a UserError instead of a line behind a block of
    usage.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def raise_error(error: UserError) -> None:
    """What readers of many rows do with a fault unless they are given something else to do, such as
    `list.append`.
    """
    raise error


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name`, as the tail of an error message: "; nearest: 'v_proj'", or all of the
    known ones.
    """
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {match[0]!r}" if match else f"; known: {', '.join(sorted(known))}"


def summarize(problems: list[str], most: int = 8) -> str:
    """Several problems in one line, the first `most` of them in full."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 a mistake of the user's, 130 Ctrl-C, 141 nobody reads on (|
    head).
    """
    try:
        main()
        print(
            end="", flush=True
        )  # a pipe that is closed is found out here, not after the last line of Python
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what is printed still, and for the flush at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = (
            error.filename2 or error.filename or "writing"
        )  # of a copy or a new name the second is the one that is written
        print(f"error: {place}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
