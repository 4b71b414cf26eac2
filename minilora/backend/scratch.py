"""A buffer that all layers share. On a CPU, touching fresh pages costs more than the arithmetic.

On a GPU sharing is safe on one stream: there the next layer's values are written when the last layer's
product has read its own. On two streams one layer would overwrite what another still reads, so a second
stream is refused. A stream that only records runs nothing: its work is launched on the first one later. Other
tensors may move on streams of their own, as those of offloading do.
"""

import math

import torch
from torch import Tensor

_MOST_VIEWS = 1000  # rows of activations have as many shapes as batches have lengths
_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_views: dict[tuple, Tensor] = {}  # of the buffers, made once: weights have a handful of shapes
_streams: dict[torch.device, torch.cuda.Stream] = {}  # the one stream of each GPU that uses its buffers


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of this shape in the buffer of this dtype and device; the next call overwrites it."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        alone = _streams.setdefault(device, stream) == stream or torch.cuda.is_current_stream_capturing()
        assert alone, "layers share a buffer: compute on one stream"
    key = device, dtype, shape
    if key not in _views:
        count = math.prod(shape)
        buffer = _buffers.get((device, dtype))
        if buffer is None or buffer.numel() < count:
            for other in [other for other in _views if other[:2] == (device, dtype)]:
                del _views[other]
            buffer = _buffers[device, dtype] = torch.empty(count, dtype=dtype, device=device)
        if len(_views) >= _MOST_VIEWS:
            _views.clear()
        _views[key] = buffer[:count].view(shape)
    return _views[key]


def buffers() -> list[Tensor]:
    """Return the buffers of today, for whoever will write to them without asking again."""
    return list(_buffers.values())


def release() -> None:
    """Free the buffers."""
    _buffers.clear()
    _views.clear()
    _streams.clear()
