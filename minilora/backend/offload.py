"""Layer inputs on their way to CPU memory and back, for the recompute policy `offload`."""

import torch
from torch import Tensor


class OffloadedInputs:
    """The layer inputs of one forward pass, in pinned CPU memory.

    Copies run on a second stream, beside the computation. On the way back two inputs are on the GPU at a
    time: the running layer's, and the next one's. Taking one input starts the copy of the next.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.inputs: list[Tensor] = []  # pinned, in the order of the layers
        self.returning: dict[int, tuple[Tensor, torch.cuda.Event]] = {}  # on the GPU when the event has come

    def put(self, x: Tensor) -> int:
        """Start to copy x out. Returns its index."""
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until x is computed
        with torch.cuda.stream(self.stream):
            pinned.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not reused before the copy is done
        self.inputs.append(pinned)
        return len(self.inputs) - 1

    def take(self, index: int) -> Tensor:
        """Return an input on the GPU, and start to copy the one before it."""
        self._start_return(index)
        x, arrived = self.returning.pop(index)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        x.record_stream(stream)
        if index > 0:
            self._start_return(index - 1)
        return x

    def _start_return(self, index: int) -> None:
        if index not in self.returning:
            with torch.cuda.stream(self.stream):
                x = self.inputs[index].to(self.device, non_blocking=True)
                self.returning[index] = x, self.stream.record_event()
