"""Layer inputs on their way to CPU memory and back, for the recompute policy `offload`.

Copies run on a second stream, beside the computation. The GPU may then be several layers behind the host, and
the copies may be slower than the layers. So a tensor must not be given back before its copy is done, and not
many may wait for that. Here the computing stream waits for the copy of two layers ago, and only then is its
tensor let go. Everything on the GPU belongs to the computing stream: what was let go there may be used again
by whatever follows there. (`Tensor.record_stream` would keep a tensor until the host sees that the copy is
done. A host that runs ahead sees it late, and then the inputs of all layers stay on the GPU.)

On the way back two inputs are on the GPU at a time: the running layer's and the next one's. The host waits
for nothing.
"""

from collections import deque
from functools import lru_cache

import torch
from torch import Tensor

IN_FLIGHT = 2  # inputs on the GPU that are being copied out


class OffloadedInputs:
    """The layer inputs of one forward pass, in pinned CPU memory."""

    def __init__(self, device: torch.device):
        self.device, self.copies = device, copy_stream(device)
        self.compute = torch.cuda.current_stream(device)
        self.inputs: list[Tensor] = []  # pinned, in the order of the layers
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # on the GPU until the event has come
        self.returning: dict[int, tuple[Tensor, torch.cuda.Event]] = {}  # there from the event on

    def put(self, x: Tensor) -> int:
        """Start to copy x out. Returns its index."""
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.leaving.append((x, self._copy(pinned, x)))
        if len(self.leaving) > IN_FLIGHT:
            self._let_go()
        self.inputs.append(pinned)
        return len(self.inputs) - 1

    def take(self, index: int) -> Tensor:
        """Return an input on the GPU, and start to copy the one before it."""
        while self.leaving:
            self._let_go()
        self._start_return(index)
        x, arrived = self.returning.pop(index)
        self.compute.wait_event(arrived)
        if index > 0:
            self._start_return(index - 1)
        return x

    def __del__(self):
        """A backward may end early, with a copy still on its way."""
        for _, done in (*self.leaving, *self.returning.values()):
            self.compute.wait_event(done)

    def _let_go(self) -> None:
        _, left = self.leaving.popleft()
        self.compute.wait_event(left)

    def _start_return(self, index: int) -> None:
        if index not in self.returning:
            pinned = self.inputs[index]
            x = torch.empty_like(pinned, device=self.device)
            self.returning[index] = x, self._copy(x, pinned)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy once the computing stream has done what it was given so far. Returns the copy's end."""
        self.copies.wait_stream(self.compute)
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
            return self.copies.record_event()


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for copies. There is one: each stream would hold memory of its own."""
    return torch.cuda.Stream(device)
