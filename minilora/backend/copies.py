"""Numbers on their way to a GPU and back, so that the host waits for it as rarely as can be.

A GPU works through its list of orders while the host writes the next ones. Whenever the host reads a number
from it, the list runs empty. So a training step reads once, all of its numbers together. A copy to the GPU
is an order like any other, but only out of pinned memory, which the system never moves. PyTorch keeps such
memory until its copy is done.
"""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return x on a device. The host does not wait for a copy from its own memory to a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def read_numbers(*values: Tensor | float) -> list[float]:
    """Return single numbers, those on a GPU and those of the host, as Python's: the host waits once."""
    found = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(found).tolist() if found else ())
    return [next(read) if isinstance(value, Tensor) else value for value in values]
