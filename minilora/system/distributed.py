"""Several processes train one adapter: data parallelism, as DistributedDataParallel does it (Li et al. 2020,
arXiv:2006.15704).

    torchrun --nproc-per-node 2 scripts/train.py ...

Each process, called by its rank, holds the whole model and takes every n-th micro-batch of an optimizer step.
With N supervised tokens in the step, the gradient is the sum of all token losses' gradients over N, whoever
computed them:

    g = sum over ranks of ( sum over the rank's micro-batches of grad(loss) / N )

so one all-reduce a step makes the ranks' gradients equal; equal optimizers with equal states then take equal
steps, and adapters stay equal without being sent. It is the step that one process takes with as many times
the gradient accumulation.

DistributedDataParallel itself overlaps its messages with the backward pass, bucket by bucket. A LoRA adapter
has 27 MB of gradients where the model has 14 GB, so one message at the end costs next to nothing. There are
no hooks, no wrapped model with other names, and no `no_sync` around all micro-batches but the last. A rank
may have fewer micro-batches than the others, or none.

Started without torchrun, none of this is set up and each method is the identity.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.system.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # where messages are: NCCL sends from GPUs, gloo from memory

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part: neighbours, which are of like length, go to different ranks, so that nobody waits
        for long.
        """
        return items[self.rank :: self.count]

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter], *numbers: Tensor | float) -> list[float]:
        """Sum gradients over all ranks, in place, and some float32 numbers with them, in one message. Returns
        the numbers.
        """
        if self.count == 1:
            return [float(number) for number in numbers]
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        tail = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in numbers])
        message = torch.cat([g.to(self.device).flatten() for g in gradients] + [tail])
        dist.all_reduce(message)
        *sums, tail = message.split([p.numel() for p in parameters] + [len(numbers)])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.device, copy=True)
        return tail.tolist()

    def mean(self, value: float, weight: float) -> float:
        """The weighted mean over all ranks. A rank of weight 0 has no part in it."""
        if self.count == 1:
            return value
        sums = torch.tensor(
            [value * weight if weight else 0.0, weight], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, on the CPU, in the order of ranks. Names and shapes are the same on all."""
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
        """Go on when every rank has come here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def leave(self) -> None:
        """The last common act: from here on every rank is on its own."""
        if self.count > 1:
            dist.destroy_process_group()

    @contextmanager
    def only_main_prints(self) -> Iterator[None]:
        """Rank 0 alone prints. A mistake that all ranks find is told by it; its end then ends the others."""
        if self.main:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                yield
            except UserError as error:
                time.sleep(5)
                raise UserError(
                    f"rank {self.rank}: {error}"
                ) from error  # rank 0 goes on: it has not found it


def join_processes() -> Processes:
    """Meet the processes that torchrun started beside this one, if it did, and take the GPU of one's own."""
    count, rank, local_rank = (
        int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    )
    if count <= 1:
        return Processes()
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        local = os.environ.get("LOCAL_WORLD_SIZE", "so many")
        raise UserError(f"torchrun started {local} processes on {gpus} GPUs; use --nproc-per-node {gpus}")
    if gpus:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return Processes(rank, count, device)
