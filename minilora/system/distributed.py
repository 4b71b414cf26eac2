"""Data parallelism: several processes train one adapter.

    torchrun --nproc-per-node 2 scripts/train.py ...

Each process holds the whole model, or a part of it (minilora/parallel), and is identified by its rank. Of
the micro-batches of an optimizer step, rank r of n takes number r, r + n, r + 2n and so on. If the step has N
supervised tokens, its gradient is the sum of the gradients of all token losses, divided by N, whichever rank
computed them:

    g = sum over ranks of ( sum over the rank's micro-batches of grad(loss) / N )

One all-reduce per step gives every rank this sum. Equal optimizers in equal states then take equal steps, so
the adapters stay equal and are never sent. It is the same step that one process takes with n times the
gradient accumulation.

DistributedDataParallel (Li et al. 2020, arXiv:2006.15704) overlaps communication with the backward pass,
bucket by bucket. A LoRA adapter has 27 MB of gradients where the model has 14 GB, so one message at the end
of the step costs next to nothing. This needs no hooks, no wrapped model with other parameter names, and no
`no_sync` around all micro-batches but the last. A rank may have fewer micro-batches than the others, or none.

Without torchrun there is one process, nothing is set up, and every method returns its input.
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.system.errors import UserError

Item = TypeVar("Item")

START_SECONDS = 300  # how long a process waits for the others to start
_PATIENCE = timedelta(days=1)  # and later on: NCCL's own 10 minutes are too short for an upload by another
_MOST_PROCESSES = 100_000
_LOST = "gloo.*(peer|Broken pipe|[Tt]imed out)|DistBackendError|remote process exited"  # of gloo and NCCL
_MEND = "start the processes with torchrun, or unset WORLD_SIZE to train in one"


@dataclass(frozen=True)
class Processes:
    """This process's rank among the processes that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # of messages: NCCL needs them on the GPU, gloo on the CPU

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's items: every n-th one.

        Neighbours have similar lengths and go to different ranks, so no rank waits long for another.
        """
        return items[self.rank :: self.count]

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter], *numbers: Tensor | float) -> list:
        """The sums of float32 `numbers` over all ranks; sums gradients in place with the same message.

        A rank without micro-batches contributes zeros for its missing gradients. One process gets its numbers
        back as they are: a GPU's stay there.
        """
        if self.count == 1:
            return list(numbers)
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        float32 = dict(dtype=torch.float32, device=self.device)
        # A GPU is told a number of the host by an order to fill; it would be waited for at a copy.
        tail = [n.to(**float32) if isinstance(n, Tensor) else torch.full((), n, **float32) for n in numbers]
        message = torch.cat([g.to(self.device).flatten() for g in gradients] + [torch.stack(tail)])
        dist.all_reduce(message)
        *sums, tail = message.split([p.numel() for p in parameters] + [len(numbers)])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.device, copy=True)
        return tail.tolist()

    def mean(self, value: float, weight: float) -> float:
        """The weighted mean of `value` over all ranks. A rank with weight 0 does not count, even with NaN."""
        if self.count == 1:
            return value
        weighted = value * weight if weight else 0.0
        sums = torch.tensor([weighted, weight], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """All ranks' tensors, on the CPU, in rank order. Every rank must have the same names and shapes."""
        if self.count == 1:
            return [tensors]
        gathered: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor, device=self.device) for _ in gathered]
            dist.all_gather(parts, tensor.to(self.device))
            for rank, part in enumerate(parts):
                gathered[rank][name] = part.cpu()
        return gathered

    def wait_for_all(self) -> None:
        """Return when every rank has called this.

        A collective operation on a GPU returns at once: it only orders what the GPU does. A barrier waits.
        """
        if self.count > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def leave(self) -> None:
        """End communication: from here on, every rank works alone."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def only_main_prints(self) -> Iterator[None]:
        """Silence every rank but 0, and let rank 0 report the mistakes that all ranks find.

        Rank 0 then exits, and torchrun ends the other ranks while they wait. A rank that is still running
        after 5 seconds has found a mistake that rank 0 has not, and reports it itself. A rank that was killed
        is such a mistake, too: the others hear that its connection is closed.
        """
        if self.main:
            with lost_ranks_are_mistakes():
                yield
            return
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as null, redirect_stdout(null):
            try:
                with lost_ranks_are_mistakes():
                    yield
            except UserError as error:
                time.sleep(5)
                raise UserError(f"rank {self.rank}: {error}") from error


@contextmanager
def lost_ranks_are_mistakes() -> Iterator[None]:
    """Raise UserError, one line, where communication fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        words = f"{type(error).__name__}: {error}"
        if isinstance(error, UserError) or not re.search(_LOST, words):
            raise
        raise UserError(
            "another process of this training has ended; mend what it says, or look whether the system "
            "killed it (memory?), and go on with --resume_from_checkpoint latest"
        ) from error


# ---- the start ---------------------------------------------------------------------------------------------


def join_processes() -> Processes:
    """Connect the processes that torchrun started, each on its own GPU. Without torchrun there is one.

    Raises UserError for a variable that torchrun would not set so, and if the other processes do not come.
    """
    count = _number("WORLD_SIZE", 1, _MOST_PROCESSES) if os.environ.get("WORLD_SIZE") else 1
    if count == 1:
        return Processes()
    rank, local_rank = (_number(name, 0, count - 1) for name in ("RANK", "LOCAL_RANK"))
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        local_count = os.environ.get("LOCAL_WORLD_SIZE", "more")
        raise UserError(
            f"torchrun started {local_count} processes on {gpus} GPUs; use --nproc-per-node {gpus}"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    store = dist.PrefixStore("minilora", _meet(rank, count))
    place = dict(store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        if gpus:
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, **place)
        else:
            dist.init_process_group("gloo", **place)
    except RuntimeError as error:  # GLOO_SOCKET_IFNAME names no interface, for example
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {rank} cannot talk to the others: {reason}; check the network") from error
    return Processes(rank, count, device)


def _number(name: str, least: int, most: int) -> int:
    """The whole number in an environment variable. Raises UserError for any other value, and for none."""
    text = _text(name)
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise UserError(f"{name} is {text!r}, which is no whole number from {least} to {most}; {_MEND}")


def _text(name: str) -> str:
    """The value of an environment variable. Raises UserError if it is missing or empty."""
    if text := os.environ.get(name):
        return text
    raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set; {_MEND}")


def _meet(rank: int, count: int) -> dist.Store:
    """Wait until all processes have come to MASTER_ADDR:MASTER_PORT. Return the store that they share.

    PyTorch would wait for 30 minutes, or for ever if another program answers there, and then print frames of
    C++. So it waits in a thread of its own, and this one gives up earlier. Only the start is limited so:
    later on, a process may wait long for another that evaluates or uploads.
    """
    port, address = _number("MASTER_PORT", 1, 65535), _text("MASTER_ADDR")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:  # UnicodeError: longer than a name can be
        raise UserError(f"MASTER_ADDR = {address!r} is the name of no computer; {_MEND}") from error
    store: Future[dist.Store] = Future()

    def meet() -> None:
        try:
            store.set_result(next(dist.rendezvous("env://"))[0])
        except Exception as error:
            store.set_exception(error)

    Thread(target=meet, daemon=True).start()
    try:
        return store.result(START_SECONDS)
    except TimeoutError:
        problem = f"the {count} processes have not all come within {START_SECONDS} seconds"
    except (RuntimeError, ValueError) as error:  # the port is taken, for example
        problem = str(error).splitlines()[0]
    raise UserError(f"rank {rank} waits at {address}, port {port}: {problem}; {_MEND}")
