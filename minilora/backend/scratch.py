"""A buffer that all layers share. On a CPU, touching fresh pages costs more than the arithmetic.

On a GPU sharing is safe on one stream: there the next layer's values are written when the last layer's
product has read its own. On two streams one layer would overwrite what another still reads, so a second
stream is refused. Other tensors may move on streams of their own, as those of offloading do.
"""

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}  # the one stream of each GPU that uses its buffers


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of this shape in the buffer of this dtype and device; the next call overwrites it."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        assert _streams.setdefault(device, stream) == stream, "layers share a buffer: compute on one stream"
    count = torch.Size(shape).numel()
    buffer = _buffers.get((device, dtype))
    if buffer is None or buffer.numel() < count:
        buffer = _buffers[device, dtype] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


def release() -> None:
    """Free the buffers."""
    _buffers.clear()
    _streams.clear()
