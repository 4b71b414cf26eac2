"""scripts/check_gpu.py with other sections and no card: fenced_sections.py NAMES ARGUMENTS.

Each name says how a section behaves.
"""

import os
import signal
import subprocess
import sys
import time

import check_gpu
import torch
from gpu_sections.card import Card
from gpu_sections.section import Check, Section, Skip

from minilora.system.errors import run_script


def fine(check: Check) -> None:
    check.row(work="done", seconds=1.5)
    check.claim("one is one", True)


def untrue(check: Check) -> None:
    check.claim("one is two", False)


def raises(check: Check) -> None:
    check.row(work="begun")
    raise RuntimeError("the first line\nand more of it")


def does_not_apply(check: Check) -> None:
    raise Skip("something is not installed")


def crashes(check: Check) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(check: Check) -> None:
    program = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    check.note(f"processes {os.getpid()} {program.pid}")
    program.wait()


def kills_the_run(check: Check) -> None:
    check.row(work="before the kill")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1)


def no_card() -> Card:
    return Card("No Card", (9, 0), 1 << 30, torch.bfloat16)


RUNS = dict(fine=fine, untrue=untrue, raises=raises, crashes=crashes, hangs=hangs)
RUNS |= {"does not apply": does_not_apply, "kills the run": kills_the_run}
NAMES = sys.argv[1].split(",")
check_gpu.SECTIONS = [
    Section(name, 100 if name == "fine" else 1, f"how it {name}", RUNS[name]) for name in NAMES
]
check_gpu.NAMES = NAMES
check_gpu.read_card = no_card
check_gpu.OVERTIME = 2
del sys.argv[1]
run_script(check_gpu.main)
