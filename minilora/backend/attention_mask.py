"""The mask over a cache as numbers to add to the scores: 0 where a query sees a key, -inf where it does not.

PyTorch's fused attentions add a mask. They turn a boolean one into such numbers at every call, in the dtype
of the activations. Made once for all layers, it costs one pass over T S numbers. Without a cache no mask is
needed: see documents.py.

A GPU's memory-efficient kernel needs rows that begin at multiples of 8 numbers. It copies a mask with other
rows in every layer. So a row is stored with room for such a multiple.
"""

import torch
from torch import Tensor


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a boolean mask (Bt, 1, T, S) as numbers to add, in x's dtype. None stays None."""
    if mask is None:
        return None
    *rows, S = mask.shape
    return x.new_zeros(*rows, row_numbers(S))[..., :S].masked_fill_(~mask, -torch.inf)


def row_numbers(keys: int) -> int:
    """Return how many numbers a row of the mask takes in memory."""
    return -(-keys // 8) * 8
