"""A section of the check, and the fence around it.

Each section runs in a process of its own. So a section that crashes, hangs, fills the memory or leaves the
card's context unusable (as an illegal address does) takes nothing from the next one. The process is a fork,
and costs no imports; for that, the parent must never touch the card.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_sections.card import Card
from gpu_sections.report import Report
from minilora.system.errors import one_line

OVERTIME = 30  # seconds that a section may take beyond its plan
FORK = multiprocessing.get_context("fork")


class Skip(Exception):
    """Why a section does not apply here, such as a package that is not installed."""


@dataclass(frozen=True)
class Check:
    """What a section is given."""

    card: Card
    report: Report
    folder: Path  # for files that a section writes
    tiny: bool  # the dry run: small shapes, few repeats, no claim about times and memory
    section: str = ""
    deadline: float = 0.0  # on the clock of time.perf_counter

    @property
    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.deadline - time.perf_counter()

    def row(self, **columns: object) -> None:
        """Add a row to the section's table."""
        self.report.tell(self.section, row=columns)

    def note(self, text: str) -> None:
        self.report.tell(self.section, note=text)

    def claim(self, text: str, holds: bool) -> None:
        self.report.tell(self.section, claim=text, holds=bool(holds))


@dataclass(frozen=True)
class Section:
    """A part of the check."""

    name: str
    seconds: int  # planned
    title: str
    run: Callable[[Check], None]


def run_fenced(section: Section, check: Check) -> None:
    """Run a section in a process of its own, until it ends or check.deadline has come, and report it."""
    tell, began = check.report.tell, time.perf_counter()
    tell(section.name, began=section.title)
    process = FORK.Process(target=_run, args=(section, check))
    process.start()
    try:
        process.join(check.left)
        if process.is_alive():
            tell(section.name, failed=f"stopped, it still ran after {time.perf_counter() - began:.0f} s")
        elif process.exitcode:
            tell(section.name, failed=f"its process ended with code {process.exitcode}")
    finally:  # Programs that the section has started end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # It may not have become a group yet.
        process.join()
    tell(section.name, ended=round(time.perf_counter() - began, 1))


def _run(section: Section, check: Check) -> None:
    """Run a section in this process, and report an error in one line, with its traceback beside it."""
    os.setsid()  # a process group of its own
    try:
        section.run(check)
    except Skip as reason:
        check.report.tell(section.name, skipped=str(reason), wanted=False)
    except Exception as error:
        line = one_line(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        check.report.tell(section.name, failed=line, traceback=traceback.format_exc())


def in_child(function: Callable, *arguments: object):
    """Return function(*arguments), computed in a fork, so that this process does not touch the card."""
    with ProcessPoolExecutor(1, FORK) as pool:
        return pool.submit(function, *arguments).result()
