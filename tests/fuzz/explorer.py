"""Random changes of good files go through the readers, and what breaks a promise is counted and saved.

Hypothesis makes the inputs; the same seed makes the same ones. It is not asked to shrink: a round would end at
its first failure. Of the inputs that fail in the same way, the shortest is kept instead.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.judge import CONTROL_CHARACTERS, LINE_LENGTH, listing, traceback_place
from fuzz.readers import TARGETS, Target, file_name
from fuzz.runner import BYTES, SECONDS, import_scripts, make_place
from minilora.system.errors import UserError

Round = tuple[str, int, list[str]]  # the target's name, inputs tried, faults


class Hang(BaseException):
    """A reader has taken SECONDS."""


def explore(seconds: float, examples: int, first_seed: int, workers: int, failures: Path) -> Iterator[Round]:
    """Rounds of `examples` inputs for every target, until the time is over; at least one round."""
    import_scripts()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        good = make_place(Path(temporary, "place"))
        fork = multiprocessing.get_context("fork")
        shared = good, Path(temporary), failures.absolute()
        with ProcessPoolExecutor(workers, fork, _prepare_worker, shared) as pool:
            for number in itertools.count(first_seed):
                rounds = [pool.submit(_round, index, number, examples) for index in range(len(TARGETS))]
                yield from (done.result() for done in as_completed(rounds))
                if time.monotonic() >= deadline:
                    return


_failures = Path()


def _prepare_worker(good: Path, temporary: Path, failures: Path) -> None:
    """Give a worker good files of its own, and the limits that every reader has to keep."""
    global _failures
    _failures = failures
    folder = temporary / f"worker-{os.getpid()}"
    shutil.copytree(good, folder)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, _raise_hang)


def _raise_hang(*_: object) -> None:
    raise Hang


def _round(index: int, number: int, examples: int) -> Round:
    target, tried, shortest = TARGETS[index], 0, {}
    good = target.file.read_bytes() if target.good is None else target.good
    before = listing(Path())

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.mutate(good))
    def try_one(data: bytes) -> None:
        nonlocal tried
        tried += 1
        if fault := broken_promise(target, data):
            kind = re.sub(r"'.*?'|\d+", "", fault)
            if kind not in shortest or len(data) < len(shortest[kind][1]):
                shortest[kind] = fault, data

    try_one()
    target.file.write_bytes(good)
    faults = [f"{fault}  [{_save(target, data)}]" for fault, data in shortest.values()]
    left = listing(Path()).keys() - before.keys() - {str(target.file), str(target.file.parent)}
    return target.name, tried, faults + [f"leaves {', '.join(sorted(left))}"] * bool(left)


def _save(target: Target, data: bytes) -> str:
    _failures.mkdir(exist_ok=True)
    path = _failures / file_name(target, data)
    path.write_bytes(data)
    return path.name


def broken_promise(target: Target, data: bytes) -> str | None:
    """The promise that a reader breaks with this content of its file, or None."""
    target.file.parent.mkdir(exist_ok=True)
    target.file.write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = target.read()
    except UserError as error:
        return _fault_of_line(str(error))
    except Hang:
        return f"hangs: stopped after {SECONDS} s"
    except (Exception, BaseException) as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"traceback: {traceback_place(''.join(traceback.format_exception(error)))}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(result, str) and (found := CONTROL_CHARACTERS.search(result)):
        return f"the control character {found[0]!a} in its text"
    return None


def _fault_of_line(line: str) -> str | None:
    if len(line) > LINE_LENGTH:
        return f"a line of {len(line):,} characters: {line[:60]!a}"
    if found := CONTROL_CHARACTERS.search(line.replace("\n", "\0")):
        return f"the control character {found[0]!a} in {line[:60]!a}"
    return None


def replay(saved: Path) -> int:
    """Read a saved input once more, and let its traceback through. Returns an exit code."""
    import_scripts()
    target = next(target for target in TARGETS if saved.name.startswith(f"{target.name}-"))
    data = saved.read_bytes()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        os.chdir(make_place(Path(temporary, "place")))
        target.file.parent.mkdir(exist_ok=True)
        target.file.write_bytes(data)
        try:
            print(target.read())
        except UserError as error:
            print(f"error: {error}")
    return 0
