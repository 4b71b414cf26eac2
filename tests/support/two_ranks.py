"""Trainings by two processes, as a program: two_ranks.py REPORT FOLDER ARGUMENTS OF THE TRAINER. REPORT is
written as JSON.

What torchrun does is done here: two processes with RANK and WORLD_SIZE, and the end of both where one has
failed.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import train

from support.forked_trainer import start, status


def run(folder: Path, *arguments: str, signal_to: int | None = None) -> dict:
    """Train with two ranks; in step 3 the one of `signal_to` gets a SIGTERM. How both ended, and what each
    has printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        place = dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        prepare = stop_in_step_3 if rank == signal_to else lambda: None
        ranks.append(
            start([*arguments, "--output_dir", str(folder)], folder.with_suffix(f".{rank}"), prepare, **place)
        )
    first = status(ranks[0])
    if first == 2:
        os.kill(ranks[1], signal.SIGTERM)
    ended = [first, status(ranks[1])]
    logs = [folder.with_suffix(f".{rank}") for rank in (0, 1)]
    said = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    return dict(ended=ended, said=said)


def stop_in_step_3() -> None:
    """Send this process a SIGTERM when it computes the first loss of its third step (two micro-batches a
    step).
    """
    original, calls = train.causal_lm_loss, iter(range(1000))

    def causal_lm_loss(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    train.causal_lm_loss = causal_lm_loss


def main() -> None:
    report, folder, arguments = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    result = {
        "whole": run(folder / "whole", *arguments),
        "stopped": run(folder / "stopped", *arguments, signal_to=1),
        "resumed": run(folder / "stopped", *arguments, "--resume_from_checkpoint", "latest"),
        "mistaken": run(folder / "mistaken", *arguments, "--learning_rte", "1"),
    }
    report.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
