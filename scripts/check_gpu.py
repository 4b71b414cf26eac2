"""Does minilora work on this card, and how fast? One command says so, in at most eight minutes.

    python scripts/check_gpu.py                          everything: its table is docs/benchmarks/<card>.md
    python scripts/check_gpu.py --only gradients,steps   these sections: their table is in the folder of --out
    python scripts/check_gpu.py --emulate t4             as on a T4: float16, 15 GiB, no flash attention
    python scripts/check_gpu.py --tiny                   a dry run with small shapes, few repeats

    --budget SECONDS    in all; default: 480
    --out FOLDER        of results.jsonl and of logs; default: outputs/check_gpu
    --table FILE        Markdown; default: docs/benchmarks/<card>.md, or in --out if not everything is run

The sections are environment, attention, gradients, kernels, steps, peer, t4, decode, trainer and tests. They
run in this order, the most telling first. Each runs in a process of its own, so one that crashes or hangs
takes nothing from the next. A section is skipped if less time is left than its plan says. Results are written
as they come: every event to results.jsonl, with the tracebacks of what failed, and the table anew after each
of them. So a run that is killed leaves what it has measured.

Exit codes: 0 every section ran and its claims hold, 1 some failed or had no time, 2 the command line is wrong
or there is no GPU.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path

from gpu_sections import attention, decode, gradients, kernel_rates, peer, programs, steps, t4
from gpu_sections.card import Card, as_t4, read_card
from gpu_sections.report import Report, failures
from gpu_sections.section import OVERTIME, Check, Section, in_child, run_fenced

from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, suggestion
from minilora.system.files import check_writable

BUDGET = 480  # seconds of a whole run
SECTIONS = (
    Section("environment", 10, "the card, and its best rates", attention.environment),
    Section(
        "attention", 20, "which kernel runs, its results, and what a new length costs", attention.attention
    ),
    Section("gradients", 35, "every recompute policy against `off`", gradients.gradients),
    Section("kernels", 40, "beside this card's copy rate", kernel_rates.kernel_rates),
    Section("steps", 110, "a training step of Mistral-7B's shape", steps.steps),
    Section("peer", 60, "the same step in transformers + PEFT + bitsandbytes", peer.usual_stack),
    Section("t4", 40, "as on a T4: float16, 15 GiB, no flash attention", t4.t4),
    Section("decode", 25, "answers of a model of Mistral-7B's shape", decode.decode),
    Section("trainer", 50, "the default run, and the same stopped and resumed", programs.trainer),
    # The last one has all the time that is left.
    Section("tests", 60, "the tests that need a GPU", programs.gpu_tests),
)
NAMES = [section.name for section in SECTIONS]
BENCHMARKS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # Asking for a GPU starts no CUDA.
    card = in_child(read_card)
    import_once()
    table = table_of(options, card)
    report = Report(options.out / "results.jsonl", table, started)
    report.begin(card=title_of(options, card), **facts(options, card))
    check = Check(card, report, options.out.absolute(), options.tiny)
    for section in options.sections:
        run_if_time_is_left(section, check, started + options.budget, options.emulate)
    failed = failures(report.events())
    print("\n" + "\n".join(failed or ["every section ran, and every claim holds"]))
    print(f"{time.perf_counter() - started:.0f} s; the table is in {table}, every event in {report.lines}")
    sys.exit(1 if failed else 0)


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--emulate", choices=["t4"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=local_path, default=Path("outputs/check_gpu"))
    parser.add_argument("--table", type=local_path)
    options = parser.parse_args()
    options.sections = sections_of(options.only or ",".join(NAMES))
    if not 0 < options.budget <= 3600:
        raise UserError(f"--budget must be above 0 and at most 3600 seconds, not {options.budget:g}")
    check_folder("--out", options.out)
    if options.table:
        check_writable("--table", options.table)
    return options


def check_folder(name: str, folder: Path) -> None:
    """Raise UserError if the folder cannot be made, or no file in it. Leaves nothing behind."""
    for path in (folder, *folder.absolute().parents):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{name} {folder}: {path} is no folder; choose another place")
    check_writable(name, folder / "results.jsonl", parents=True)


def import_once() -> None:
    """Import now what every section's process would import for itself when it first needs it."""
    for name in ("torch._dynamo", "triton"):
        with suppress(ImportError):  # Triton is for Linux only.
            import_module(name)


def sections_of(text: str) -> list[Section]:
    """Return the sections of these names, in the order of SECTIONS. Raises UserError for an unknown one."""
    wanted = text.split(",")
    for name in wanted:
        if name not in NAMES:
            raise UserError(f"--only names {name!r}, which no section is called{suggestion(name, NAMES)}")
    return [section for section in SECTIONS if section.name in wanted]


def table_of(options: argparse.Namespace, card: Card) -> Path:
    """Return the file of the table. A partial run does not replace the table of a whole one."""
    options.out.mkdir(parents=True, exist_ok=True)
    whole = not options.tiny and options.only is None
    folder = BENCHMARKS if whole and BENCHMARKS.is_dir() else options.out
    name = re.sub(r"[^a-z0-9]+", "-", title_of(options, card).lower()).strip("-")
    return options.table or folder / f"{name}.md"


def title_of(options: argparse.Namespace, card: Card) -> str:
    return card.name + " as a T4" * (options.emulate == "t4") + ", a dry run" * options.tiny


def facts(options: argparse.Namespace, card: Card) -> dict[str, str]:
    """Return what a reader of the table must know besides the card's name. No path: it is sent around."""
    chosen = {"only": options.only, "emulate": options.emulate}
    words = [f"--{name} {value}" for name, value in chosen.items() if value] + ["--tiny"] * options.tiny
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["scripts/check_gpu.py", *words]),
        "versions": f"minilora {commit()}, {attention.versions()}, {system}",
        "16-bit dtype": attention.name_of(card.dtype),
    }


def commit() -> str:
    """Return the commit of this checkout, or 'of an unknown commit'."""
    words = ["git", "-C", str(BENCHMARKS), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "of an unknown commit"


def run_if_time_is_left(section: Section, check: Check, end: float, emulate: str | None) -> None:
    """Run a section in its fence, or report that too little of the budget is left."""
    left = end - time.perf_counter()
    if left < section.seconds:
        reason = f"{left:.0f} s were left, {section.seconds} s are planned"
        check.report.tell(section.name, began=section.title)
        check.report.tell(section.name, skipped=reason, wanted=True)
        check.report.tell(section.name, ended=0.0)
        return
    allowed = left if section is SECTIONS[-1] else min(left, section.seconds + OVERTIME)
    deadline = time.perf_counter() + allowed
    run = partial(run_as_t4, section) if emulate else section.run
    run_fenced(replace(section, run=run), replace(check, section=section.name, deadline=deadline))


def run_as_t4(section: Section, check: Check) -> None:
    section.run(replace(check, card=as_t4(check.card)))


if __name__ == "__main__":
    run_script(main)
