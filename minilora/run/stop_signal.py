"""A signal that stops a training after its current step."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress

from minilora.system.signals import handled, silence_closed_output, terminating


class StopSignal:
    """A signal requests a stop after the current step, which is then saved.

    It is Ctrl-C, SIGTERM as schedulers send it, or SIGHUP when the terminal closes (but not under `nohup`).
    A second Ctrl-C stops at once. A second SIGTERM does not: schedulers often send it to a process and to its
    group.

    Outside of `with`, signals do what they did before. But a process that leaves it by `sys.exit`, as it does
    after the stop, is not hurried by another SIGTERM.
    """

    def __init__(self, say: Callable[[str], None]):
        self.requested, self.say = False, say
        self._handlers = ExitStack()

    def __enter__(self) -> "StopSignal":
        self._handlers.enter_context(handled(dict.fromkeys([signal.SIGINT, *terminating()], self)))
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is not SystemExit:
            self._handlers.close()

    def __call__(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):
            self.say("stopping after this step; Ctrl-C again to stop at once without saving")
        silence_closed_output()  # If the terminal has closed, the run must still save.
