"""Signals that end a script: it removes its temporary files first, then exits with 128 + the signal's number.

    SIGINT     Ctrl-C                                        KeyboardInterrupt    130
    SIGTERM    `kill`, a scheduler, the end of a container   Terminated           143
    SIGHUP     the terminal or the ssh connection is gone    Terminated           129

By default, the last two end a Python process without running any `finally`. Here they raise an exception in
the main thread, as Ctrl-C does. While a model trains, `run/stop_signal.py` replaces these handlers. Nothing
helps against SIGKILL: the next run removes what such a run has left.

Of torchrun's processes, only the first one writes. The others keep the default for SIGTERM: they often wait
in C++, where Python's handlers do not run.
"""

import io
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO


class Terminated(BaseException):
    """SIGTERM or SIGHUP, whose number is `signal`. No `except Exception` catches it."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


def terminating() -> list[int]:
    """SIGTERM, and SIGHUP unless it is ignored: `nohup` wants the run to outlive its terminal."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, hangup]


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within it, signals that end a process raise an exception in the main thread."""
    _received.clear()
    handlers = {}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # A shell ignores Ctrl-C for `script &`.
        handlers[signal.SIGINT] = _interrupt
    if os.environ.get("RANK", "0") == "0":
        handlers |= dict.fromkeys(terminating(), _terminate)
    with handled(handlers):
        yield


@contextmanager
def handled(handlers: dict[int, object]) -> Iterator[None]:
    """Within it, these signals have these handlers. Another thread than the main one may not set any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_received: dict[type, tuple[float, BaseException]] = {}  # the last of each kind, and when it came


def received() -> BaseException | None:
    """Return the exception of a signal that should have ended this script, if it was swallowed; else None.

    Code in C or Rust that calls Python, such as safetensors', may turn it into an error of its own. Ctrl-C
    may have been answered, as in a conversation: it counts for a second.
    """
    if Terminated in _received:
        return _received[Terminated][1]
    came, interruption = _received.get(KeyboardInterrupt, (-math.inf, None))
    return interruption if time.monotonic() - came < 1 else None


def _raise(error: BaseException) -> NoReturn:
    _received[type(error)] = (time.monotonic(), error)
    raise error


def _interrupt(number: int, frame: object) -> None:
    _raise(KeyboardInterrupt())


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # Schedulers send it several times; cleaning up goes on.
    _raise(Terminated(number))


def silence_closed_output() -> None:
    """Send output that nobody can read any more to the null device: its terminal or pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        if _is_closed(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_closed(stream: TextIO) -> bool:
    try:
        stream.flush()
        mode = os.fstat(stream.fileno()).st_mode
    except io.UnsupportedOperation:  # an object in place of the stream, without a file
        return False
    except OSError:
        return True
    return stat.S_ISCHR(mode) and not os.isatty(stream.fileno())  # a terminal that hung up
