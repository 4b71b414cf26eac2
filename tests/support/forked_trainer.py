"""Runs of the trainer without starting an interpreter for each, which with torch takes seconds: import once,
then fork.

The program that imports this must compute nothing itself: threads do not survive a fork.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot  # noqa: F401  the trainer imports it at its end
import torch
import torch._dynamo  # noqa: F401  and every optimizer of PyTorch this at its beginning
import train

from minilora.system.errors import run_script


def start(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], object] = lambda: None,
    script: ModuleType = train,
    **environment: object,
) -> int:
    """Run `train.py ARGUMENTS`, or another script, in a child, which calls `prepare` first and writes to `log`.
    Returns its process id.
    """
    if pid := os.fork():
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = [f"{script.__name__}.py", *arguments]
    code = 0
    try:
        prepare()
        run_script(script.main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def status(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
