"""Fuzz: the table of bad inputs over every script, and random changes of good files over every reader.

    make fuzz                                    the whole table, and ten minutes of random changes
    python -m fuzz --seconds 60 --seed 7         the table, and a minute of random changes
    python -m fuzz --only "config.json: r = "    the cases whose kind and name contain this text, in full
    python -m fuzz --replay failures/config.json-1f3c...    one saved input again, with its traceback

Prints inputs and violations by kind. Exits with 1 if there was a violation. Inputs that random changes made,
and that broke a promise, are saved in --failures.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

from fuzz.bad_inputs import TABLE
from fuzz.explorer import explore, replay
from fuzz.judge import Verdict, write_report
from fuzz.runner import SECONDS, run_cases


def main() -> None:
    options = parse_options()
    if options.replay:
        sys.exit(replay(options.replay))
    began = time.monotonic()
    verdicts, mutations = drive_scripts(options), [] if options.only else mutate(options)
    if options.report:
        write_report(verdicts, mutations, options.report)
    inputs = Counter(verdict.kind for verdict in verdicts)
    violations = Counter(verdict.kind for verdict in verdicts if verdict.faults)
    for found in mutations:
        inputs[found["name"]] += found["inputs"]
        violations[found["name"]] += len(found["faults"])
    print_figures(inputs, violations, time.monotonic() - began)
    sys.exit(1 if violations.total() else 0)


def drive_scripts(options: argparse.Namespace) -> list[Verdict]:
    """Run the cases of the table; show those that end as they should not, or all that were asked for."""
    cases = [case for case in TABLE if options.only in case.id][:: options.stride]
    verdicts = []
    for verdict in run_cases(cases, options.workers, options.limit):
        verdicts.append(verdict)
        if verdict.faults or options.only:
            show(verdict)
    return verdicts


def mutate(options: argparse.Namespace) -> list[dict]:
    """Change files at random; show what broke a promise. Returns name, inputs and faults of each round."""
    effort = options.seconds, options.examples, options.seed, options.workers, options.failures
    rounds = []
    for name, inputs, faults in explore(*effort):
        rounds.append({"name": name, "inputs": inputs, "faults": faults})
        for fault in faults:
            print(f"VIOLATION  {name}: {fault}", flush=True)
    return rounds


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="only cases of the table whose kind and name contain this text")
    add("--stride", type=int, default=1, help="every n-th case of the table only")
    add("--limit", type=float, default=SECONDS, help="seconds that a case may take (default: %(default)s)")
    add("--seconds", type=float, default=0, help="of random changes; 0: one round")
    add("--examples", type=int, default=100, help="of each kind in one round of random changes")
    add("--seed", type=int, default=0, help="of the first round")
    add("--workers", type=int, default=os.cpu_count())
    add("--report", type=Path, help="JSON file for the verdict of every case")
    add("--failures", type=Path, default=Path("fuzz-failures"), help="folder for the inputs that failed")
    add("--replay", type=Path, help="a file of that folder")
    return parser.parse_args()


def show(verdict: Verdict) -> None:
    head = "VIOLATION" if verdict.faults else "as it should be"
    print(
        f"{head}  {verdict.kind}: {verdict.name}  ({verdict.seconds:.1f} s, {verdict.peak / 2**30:.2f} GiB)"
    )
    for fault in verdict.faults:
        print(f"    {fault}")
    print(f"    | {verdict.line[:200]!a}", flush=True)


def print_figures(inputs: Counter, violations: Counter, seconds: float) -> None:
    print(f"\n{'kind':<28}{'inputs':>10}{'violations':>12}")
    for kind, count in inputs.items():
        print(f"{kind:<28}{count:>10,}{violations[kind]:>12,}")
    print(f"{'all':<28}{inputs.total():>10,}{violations.total():>12,}   in {seconds:.0f} s")


if __name__ == "__main__":
    main()
