"""Run Python code of a document in a process of its own, as `python -W error -c CODE` would, but sooner.

The process is a fork of one that has imported torch, which takes as long as most snippets.
"""

import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else multiprocessing.get_context()
if hasattr(os, "fork"):
    SERVER.set_forkserver_preload(["torch"])


def run_snippet(code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run the code in a folder. Returns what it left on stderr if it failed, else an empty text."""
    errors = folder / "stderr.txt"
    process = SERVER.Process(target=_run, args=(code, folder, environment, errors))
    process.start()
    process.join()
    return "" if process.exitcode == 0 else errors.read_text(encoding="utf-8") or f"exit {process.exitcode}"


def _run(code: str, folder: Path, environment: dict[str, str], errors: Path) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    stderr = errors.open("w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(stderr.fileno(), stream.fileno())
    sys.argv, sys.path[:0] = ["-c"], environment["PYTHONPATH"].split(os.pathsep)
    warnings.simplefilter("error")
    try:
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc(file=stderr)
        stderr.flush()
        os._exit(1)
