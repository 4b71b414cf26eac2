"""Runs of the trainer that are killed with SIGKILL, as a program: killed_runs.py REPORT FOLDER ARGUMENTS OF
THE TRAINER.

Three runs of the same training: one left alone, one killed after random times, one killed before random
operations on files. The killed ones are resumed each time, and at last until they end. REPORT is written as
JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minilora.run.checkpoints import list_checkpoints, read_checkpoint
from support.forked_trainer import start, status
from support.killing import Killer

KILLS = 20


def killed_run(folder: Path, arguments: list[str], attempt: Callable[[Callable[..., int]], int]) -> dict:
    """Kill a run KILLS times, resuming it each time, then let it end. `attempt(begin)` begins to run and
    returns how that ended.
    """
    log = folder.with_suffix(".log")
    arguments = [*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    kills = while_saving = 0
    while kills < KILLS:
        ended = attempt(lambda *prepare: start(arguments, log, *prepare))
        assert ended in (0, -signal.SIGKILL), (
            log.read_text()
        )  # 0: at its end before it was killed; the next one goes on from there
        kills += ended != 0
        while_saving += ended != 0 and any(folder.glob("checkpoint-*.*"))  # one was being written or deleted
        for checkpoint in list_checkpoints(folder):
            read_checkpoint(checkpoint)  # whole at any time
    assert status(start(arguments, log)) == 0, log.read_text()
    return dict(kills=kills, while_saving=while_saving)


def main() -> None:
    report, folder, arguments = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    began = time.monotonic()
    assert status(start([*arguments, "--output_dir", str(folder / "whole")], folder / "whole.log")) == 0, (
        folder / "whole.log"
    )
    seconds = time.monotonic() - began
    chance = random.Random(0)

    def after_a_time(begin) -> int:
        pid = begin()
        time.sleep(chance.uniform(0.05, 0.25) * seconds)
        os.kill(pid, signal.SIGKILL)
        return status(pid)

    def before_an_operation(begin) -> int:
        count = chance.randint(1, 80)
        return status(begin(lambda: Killer(count)))

    result = {name: killed_run(folder / name, arguments, attempt) for name, attempt in (
        ("times", after_a_time), ("operations", before_an_operation))}  # fmt: skip
    report.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
