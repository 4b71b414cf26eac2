"""A program that a script starts ends when the script does, however that ends.

Even SIGKILL, against which the script can do nothing, must not leave its child running: a sweep that is
started again would meet the trainer of the one that was killed. So the child watches its parent, and gets
SIGTERM when the parent is gone. A trainer then saves a checkpoint.

On Linux the kernel sends that signal: prctl(PR_SET_PDEATHSIG). It does not if the parent has died before the
call, so the child compares its parent's process id afterwards. On other systems a thread compares it twice a
second. (On Windows nothing changes a process's parent, and nothing is sent.)
"""

import ctypes
import os
import signal
import sys
import threading
import time

_VARIABLE = "MINILORA_PARENT"  # in the child's environment: the process that it must not outlive
_PR_SET_PDEATHSIG = 1


def tied_environment() -> dict[str, str]:
    """The environment for a script that is to end when this process does."""
    return os.environ | {_VARIABLE: str(os.getpid())}


def end_with_parent() -> None:
    """Have SIGTERM sent to this process when the parent is gone that started it with `tied_environment`."""
    parent = os.environ.get(_VARIABLE)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _end_without(parent)
    else:
        threading.Thread(target=_watch, args=[parent], daemon=True).start()


def _end_without(parent: str) -> None:
    if str(os.getppid()) != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _watch(parent: str) -> None:
    while str(os.getppid()) == parent:
        time.sleep(0.5)
    _end_without(parent)
