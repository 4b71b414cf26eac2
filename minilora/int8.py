"""Frozen weights in 8 bits: a simpler quantizer than NF4, for those who have twice the memory.

w  ~  data * absmax / 127            data: int8, one a weight            absmax: float32, one a row

Codes and scales are bitsandbytes'; formats/bnb_int8.py reads and writes them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.quantization import check_finite, check_floats
from minilora.system.errors import UserError


@dataclass(frozen=True)
class Int8Tensor:
    """A matrix in 8 bits: w ~ data * absmax / 127, one absmax a row (LLM.int8's vector-wise quantization,
    arXiv:2208.07339).

    Activations are not quantized, and their outliers are not multiplied apart, as in that paper and in
    bitsandbytes' inference: this is storage for frozen weights, whose products are taken in floating point.
    """

    data: Tensor  # (..., in) int8
    absmax: Tensor  # (...,) float32
    dtype: torch.dtype  # of the tensor that was quantized, and of `dequantize()`

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """data * absmax / 127, computed in float32, in the dtype given, or out's, or the original's."""
        dtype = dtype or (self.dtype if out is None else out.dtype)
        values = self.data.float().mul_(self.absmax.unsqueeze(-1)).mul_(1 / 127)
        return values.to(dtype) if out is None else out.copy_(values)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.data.numel()

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> "Int8Tensor":
        return replace(self, data=self.data.to(device), absmax=self.absmax.to(device))


def quantize_int8(weight: Tensor) -> Int8Tensor:
    """Each row, the last dimension, divided by its largest magnitude and rounded to a multiple of 1/127.
    weight: (..., in).

    Raises UserError for infinities, NaN and other dtypes than float32, bfloat16 and float16.
    """
    check_floats(weight)
    if weight.dim() == 0:
        raise UserError("cannot quantize a single number to 8 bits: it has no rows")
    weight, width = weight.detach(), weight.shape[-1]
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    by_rows = (
        weight.reshape(-1, width).split(256),
        data.view(-1, width).split(256),
        absmax.view(-1).split(256),
    )
    for rows, result, scale in zip(*by_rows, strict=True):  # a few at a time: no second copy of the weight
        scale.copy_(rows.abs().amax(-1))
        inverse = 127.0 / scale.clamp(min=1e-36)  # a row of zeros stays zeros
        result.copy_((rows * inverse.view(-1, 1)).round_())
    check_finite(weight, absmax)
    return Int8Tensor(data, absmax, weight.dtype)
