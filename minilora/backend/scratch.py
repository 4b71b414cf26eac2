"""A buffer that all layers share. On a CPU, touching fresh pages costs more than the arithmetic."""

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of this shape in the buffer of this dtype and device; the next call overwrites it."""
    count = torch.Size(shape).numel()
    buffer = _buffers.get((device, dtype))
    if buffer is None or buffer.numel() < count:
        buffer = _buffers[device, dtype] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


def release() -> None:
    """Free the buffers."""
    _buffers.clear()
