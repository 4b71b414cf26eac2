"""Attention's mask as numbers to add to the scores: 0 where a query sees a key, -inf where it does not.

PyTorch's fused attentions add a mask. They turn a boolean one into such numbers at every call, in the dtype
of the activations, and autograd keeps them for backward: L layers would hold L copies of the same numbers.
For 32 layers and a row of 4096 tokens in 16 bits that is 1.07 GB. Made once for all layers, it is 34 MB.

A GPU's memory-efficient kernel needs rows that begin at multiples of 8 numbers. It copies a mask with other
rows in every layer. So a row is stored with room for such a multiple.
"""

import torch
from torch import Tensor


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a boolean mask (B, 1, T, S) as numbers to add, in x's dtype. None stays None."""
    if mask is None:
        return None
    *rows, S = mask.shape
    return x.new_zeros(*rows, row_numbers(S))[..., :S].masked_fill_(~mask, -torch.inf)


def row_numbers(keys: int) -> int:
    """Return how many numbers a row of the mask takes in memory."""
    return -(-keys // 8) * 8
