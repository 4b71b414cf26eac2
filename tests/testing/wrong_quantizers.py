"""Quantizers with one fault each, and the right one that they are made from: a few lines, NF4, blocks of 64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.quantization import four_bit_code

CODE = four_bit_code("nf4")
MIDDLES = (CODE[:-1] + CODE[1:]) / 2
BLOCK = 64


class Stored(NamedTuple):
    symbols: Tensor  # (blocks, 64)
    absmax: Tensor  # (blocks, 1)
    like: Tensor  # of the weight's shape and dtype


def blocks_of(weight: Tensor) -> Tensor:
    flat = weight.detach().float().reshape(-1)
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def nearest(scaled: Tensor) -> Tensor:
    return torch.bucketize(scaled, MIDDLES)  # of two equally near ones the smaller


def quantize(
    weight: Tensor,
    blocks: Callable[[Tensor], Tensor] = blocks_of,
    scale: Callable[[Tensor], Tensor] = lambda b: b.abs().amax(1, keepdim=True),
    choose: Callable[[Tensor], Tensor] = nearest,
) -> Stored:
    """The right one, whose three steps a fault replaces."""
    cut = blocks(weight)
    absmax = scale(cut)
    return Stored(choose(cut / absmax.clamp_min(1e-38)), absmax, torch.empty_like(weight))


def dequantize(q: Stored) -> Tensor:
    return (CODE[q.symbols] * q.absmax).reshape(-1)[: q.like.numel()].view(q.like.shape).to(q.like.dtype)


# ---- one fault each ----------------------------------------------------------------------------------------


def absmax_of_the_whole_tensor(weight):
    return quantize(weight, scale=lambda b: b.abs().max().expand(len(b), 1))


def floor_instead_of_nearest(weight):
    return quantize(weight, choose=lambda s: (torch.searchsorted(CODE, s, right=True) - 1).clamp(0, 15))


def ties_to_the_larger(weight):
    return quantize(weight, choose=lambda s: torch.bucketize(s, MIDDLES, right=True))


def nibbles_swapped(weight):
    q = quantize(weight)
    return q._replace(symbols=q.symbols.view(-1, 2).flip(1).reshape_as(q.symbols))


def signed_maximum(weight):
    return quantize(weight, scale=lambda b: b.amax(1, keepdim=True))


def scale_in_bfloat16(weight):
    q = quantize(weight)
    return q._replace(absmax=q.absmax.bfloat16().float())


def blocks_along_columns(weight):
    q = quantize(weight.transpose(0, -1))
    return q._replace(like=torch.empty_like(weight))


def dequantize_columns(q):
    turned = q.like.transpose(0, -1)
    return (CODE[q.symbols] * q.absmax).reshape(-1)[: turned.numel()].view(turned.shape).transpose(0, -1).to(q.like.dtype)  # fmt: skip


def last_block_dropped(weight):
    flat = weight.detach().clone().reshape(-1)
    flat[len(flat) - len(flat) % BLOCK :] = 0
    return quantize(flat.view(weight.shape))


def zero_block_is_nan(weight):
    q = quantize(weight)
    return q._replace(absmax=torch.where(q.absmax == 0, torch.nan, q.absmax))


def off_by_one_code(weight):
    return quantize(weight, choose=lambda s: (nearest(s) + 1).clamp(max=15))


def keeps_the_weight(weight):
    return weight


def keeps_the_weight_dequantize(weight):
    return dequantize(quantize(weight))


def sum_instead_of_maximum(weight):
    return quantize(weight, scale=lambda b: b.abs().sum(1, keepdim=True))


def writes_to_its_input(weight):
    with torch.no_grad():
        weight.clamp_(-1, 1)
    return quantize(weight)


def storage_order(weight):
    """Reads the memory behind a view, not the view."""
    flat = weight.detach().as_strided((weight.numel(),), (1,))
    return quantize(flat)._replace(like=torch.empty(weight.shape, dtype=weight.dtype))


def always_float32(q):
    return dequantize(q).float()


def flat_result(q):
    return dequantize(q).reshape(-1)


def random_rounding(weight):
    """Right on average: to one of the two neighbours, at random."""

    def choose(scaled):
        low = (torch.searchsorted(CODE, scaled, right=True) - 1).clamp(0, 14)
        share = (scaled - CODE[low]) / (CODE[low + 1] - CODE[low])
        return low + (torch.rand_like(share) < share)

    return quantize(weight, choose=choose)


def one_buffer(buffer=torch.empty(4096)):  # noqa: B008
    """Every result in the same memory."""

    def into_buffer(q):
        values = dequantize(q).reshape(-1)
        return buffer[: len(values)].copy_(values).view(q.like.shape).to(q.like.dtype)

    return into_buffer


def no_nan_check(weight):
    return quantize(weight.nan_to_num(0, 0, 0))


def absolute_floor(weight):
    """Scales below 1e-3 become 1e-3."""
    return quantize(weight, scale=lambda b: b.abs().amax(1, keepdim=True).clamp_min(1e-3))


WRONG = {  # name -> quantize, dequantize, the properties that name the fault
    "absmax of the whole tensor": (absmax_of_the_whole_tensor, dequantize, {"nearest code", "outliers stay in their block"}),
    "floor instead of nearest": (floor_instead_of_nearest, dequantize, {"nearest code", "error bound"}),
    "ties to the larger": (ties_to_the_larger, dequantize, {"ties"}),
    "nibbles swapped": (nibbles_swapped, dequantize, {"nearest code", "one value"}),
    "signed maximum": (signed_maximum, dequantize, {"nearest code", "scale"}),
    "scale in bfloat16": (scale_in_bfloat16, dequantize, {"scale"}),
    "blocks along columns": (blocks_along_columns, dequantize_columns, {"nearest code", "outliers stay in their block"}),
    "last block dropped": (last_block_dropped, dequantize, {"short last block", "one value"}),
    "zero block is NaN": (zero_block_is_nan, dequantize, {"zero block"}),
    "off by one code": (off_by_one_code, dequantize, {"nearest code", "error bound"}),
    "keeps the weight": (keeps_the_weight, keeps_the_weight_dequantize, {"no shared memory"}),
    "sum instead of maximum": (sum_instead_of_maximum, dequantize, {"scale", "nearest code"}),
    "writes to its input": (writes_to_its_input, dequantize, {"input unchanged"}),
    "reads the storage": (storage_order, dequantize, {"not contiguous"}),
    "always float32": (quantize, always_float32, {"output dtype"}),
    "flat result": (quantize, flat_result, {"shape"}),
    "random rounding": (random_rounding, dequantize, {"nearest code", "deterministic"}),
    "one buffer": (quantize, one_buffer(), {"no shared memory"}),
    "NaN becomes 0": (no_nan_check, dequantize, {"not finite"}),
    "a floor under the scale": (absolute_floor, dequantize, {"power of two", "scale"}),
}  # fmt: skip
