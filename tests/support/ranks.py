"""Trainings by several processes, as a program: ranks.py REPORT JOBS, both JSON.

JOBS: name -> {"ranks": n, "arguments": [...], "break": None or the name of a function below}. What torchrun
does is done here: processes with RANK and WORLD_SIZE, and the end of all where one has failed. REPORT: name ->
{"ended": how each rank ended, "said": what each has printed}.
"""

import itertools
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401  once, and not in every process
import train

from minilora.run import divergence
from support.forked_trainer import start

SECONDS = 20  # after the first failure, before the others are killed


def run(name: str, job: dict, folder: Path) -> dict:
    """Train with several ranks and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count, logs, pids = job["ranks"], [], []
    for rank in range(count):
        logs.append(folder / f"{name}.{rank}")
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        prepare = partial(globals()[job["break"]], rank) if job.get("break") else lambda: None
        if count == 1:
            place = {}
        pids.append(start(job["arguments"], logs[-1], prepare, **place))
    ended = wait(pids)
    return dict(ended=ended, said=[log.read_text() for log in logs])


def wait(pids: list[int]) -> list[int | None]:
    """Return how each process ended, as exit codes or minus a signal; None: it had to be killed."""
    ended: dict[int, int | None] = {}
    failed = None
    while len(ended) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
            failed = failed or (time.monotonic() if ended[pid] else None)
        elif failed and time.monotonic() > failed + SECONDS:
            for other in set(pids) - ended.keys():
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
                ended[other] = None
        else:
            time.sleep(0.02)
    return [ended[pid] for pid in pids]


# ---- what may break, in the rank that has the number --------------------------------------------------------


def kill_in_step_7(rank: int) -> None:
    """Rank 1 dies when it computes the loss of its seventh step, of two micro-batches each."""
    calls, original = iter(range(10**6)), train.causal_lm_loss

    def causal_lm_loss(*arguments):
        if rank == 1 and next(calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    train.causal_lm_loss = causal_lm_loss


def nan_in_rank_1(rank: int) -> None:
    """Of four losses that rank 1 computes, the third is nan: in the training, and when the layer is looked for."""
    if rank == 1:
        for module in (train, divergence):
            module.causal_lm_loss = partial(third_is_nan, module.causal_lm_loss, itertools.count())


def third_is_nan(loss: Callable, calls: Iterator[int], *arguments) -> torch.Tensor:
    return loss(*arguments) * (math.nan if next(calls) % 4 == 2 else 1)


def no_gather_in_rerun(rank: int) -> None:
    """The second run of a layer does not gather its weights."""
    from minilora.parallel import gathering

    gathering._rerun = lambda opened, rerun, *arguments, **options: rerun(*arguments, **options)


def no_gather_in_backward(rank: int) -> None:
    """Backward through a layer that kept everything does not gather its weights."""
    from minilora.parallel import gathering

    gathering._open_in_backward = lambda *_: None


def main(report: Path, jobs: dict[str, dict], only: Callable[[str], bool] = lambda name: True) -> None:
    results = {name: run(name, job, report.parent) for name, job in jobs.items() if only(name)}
    report.write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
