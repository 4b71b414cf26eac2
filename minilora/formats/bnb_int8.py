"""8-bit weights in bitsandbytes' format, as `load_in_8bit` saves them: checkpoints go both ways.

    weight          int8 (out, in)
    SCB             float32 (out,)    the largest magnitude of each row
    weight_format   uint8 ()          0: in rows; 1 to 3: shuffled for one kind of GPU, by old versions

    w  =  weight * SCB / 127

The entries stand side by side: `model.layers.0.mlp.up_proj.weight`, `model.layers.0.mlp.up_proj.SCB`.

LLM.int8 (arXiv:2208.07339, section 3) means more than these files. For inference bitsandbytes also rounds the
activations to 8 bits, except for columns with a value of 6.0 or more, which it multiplies in 16 bits. That is
an approximation of x W^T. minilora computes x W^T with the dequantized W, in the activations' dtype, as
bitsandbytes itself does when it trains on a CPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from minilora.int8 import Int8Tensor
from minilora.system.errors import UserError, summarize

_SCALES, _LAYOUT = "SCB", "weight_format"


def to_bitsandbytes_int8(q: Int8Tensor, name: str = "weight") -> dict[str, Tensor]:
    """The entries that bitsandbytes writes for a Linear8bitLt's weight called `name`."""
    layer = name.removesuffix("weight")
    layout = torch.zeros((), dtype=torch.uint8, device="cpu")
    return {name: q.data, layer + _SCALES: q.absmax, layer + _LAYOUT: layout}


def group_int8_entries(names: Iterable[str]) -> dict[str, list[str]]:
    """Name of each weight in 8 bits -> the names of its entries, its own first."""
    names = set(names)
    layers = sorted(name.removesuffix(_SCALES) for name in names if name.endswith("." + _SCALES))
    suffixes = ("weight", _SCALES, _LAYOUT)
    return {
        f"{layer}weight": [layer + suffix for suffix in suffixes if layer + suffix in names]
        for layer in layers
        if f"{layer}weight" in names
    }


def from_bitsandbytes_int8(entries: dict[str, Tensor], name: str, dtype: torch.dtype) -> Int8Tensor:
    """The tensor that bitsandbytes stored as `name` and its SCB. dtype: of `dequantize()`; no entry tells it.

    Raises UserError, with the problems by name, if entries contradict one another.
    """
    layer = name.removesuffix("weight")
    data, scales, layout = entries[name], entries[layer + _SCALES], entries.get(layer + _LAYOUT)
    problems = []
    if data.dtype != torch.int8 or data.dim() != 2:
        problems.append(f"{name} is {tuple(data.shape)} {data.dtype}, not a matrix of torch.int8")
    elif (scales.numel(), scales.dtype) != (len(data), torch.float32):
        problems.append(
            f"{layer}{_SCALES} has {scales.numel()} values of {scales.dtype}, "
            f"not one of torch.float32 for each of {len(data)} rows"
        )
    elif not scales.isfinite().all():
        problems.append(f"{layer}{_SCALES} holds infinities or NaN")
    if layout is not None and not (layout.numel() == 1 and layout.item() == 0):
        problems.append(
            f"{layer}{_LAYOUT} is not 0: the weight is shuffled for one kind of GPU; "
            "save it again with bitsandbytes 0.45 or newer"
        )
    if problems:
        raise UserError(f"{name} cannot be read: {summarize(problems)}")
    return Int8Tensor(data.contiguous(), scales.reshape(-1), dtype)
