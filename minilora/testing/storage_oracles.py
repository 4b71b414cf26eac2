"""Scales that are quantized too, and rows of int8: what their numbers mean, in float64."""

import torch
from torch import Tensor


def nested_reference(
    indices: Tensor,  # (blocks,) uint8, into code
    nested_absmax: Tensor,  # (ceil(blocks / nested_blocksize),)
    code: Tensor,  # (256,)
    offset: Tensor | float,
    nested_blocksize: int = 256,
) -> Tensor:
    """Return the scales of double quantization, code[index] * nested_absmax + offset: (blocks,) float64
    (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    scales = [
        float(code[int(index)].double()) * float(nested_absmax[block // nested_blocksize].double())
        for block, index in enumerate(indices.tolist())
    ]
    return torch.tensor(scales, dtype=torch.float64) + float(offset)


def int8_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which multiple of absmax / 127 is nearest, by row: symbols (..., in) int64, absmax (...,)
    float64, and the margin (..., in), by how much of a step the nearest beats the next (LLM.int8, Dettmers et
    al. 2022, arXiv:2208.07339, section 2.1). Rows of zeros are all 0, with a margin of 1.
    """
    wide = weight.detach().double()
    absmax = wide.abs().amax(dim=-1)
    steps = 127 * wide / absmax.masked_fill(absmax == 0, 1).unsqueeze(-1)
    symbols = steps.round()
    return symbols.long(), absmax, 1 - 2 * (steps - symbols).abs()
