"""Frozen linear layers, above all those whose weight is stored in 4 or 8 bits.

    forward     W = dequantize(q)      y  = x W^T + b
    backward    W = dequantize(q)      dx = dy W

A frozen weight has no gradient, so backward needs W and nothing else, and W can be had again from the packed
bytes at any time. So neither pass keeps it: an autograd function that saved W would hold the whole model
dequantized between forward and backward, which 4 bits were meant to avoid. All layers dequantize into one
scratch buffer per device and dtype, as large as the largest layer. On a CPU, touching fresh pages costs more
than the arithmetic. On a CPU with AMX W is never whole: it is dequantized in the cache (backend/amx.c).

A product is taken in the activations' dtype (see backend/choice.py), not in the one that was quantized.
"""

import torch
from torch import Tensor, nn

from minilora.backend import native
from minilora.backend.choice import form_for, product_dtype
from minilora.backend.scratch import scratch
from minilora.int8 import Int8Tensor
from minilora.quantization import QuantizedTensor, gemv_4bit

Weight = QuantizedTensor | Int8Tensor | Tensor


def dequantized(weight: Weight, like: Tensor) -> Tensor:
    """Return W in the dtype of `like`, (out, in); a quantized weight is written to the scratch buffer."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    return weight.dequantize(out=scratch(tuple(weight.shape), like.dtype, like.device))


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for a frozen W, quantized or not. Keeps no tensor but the weight as it is stored."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        rows = _widened(x, weight).reshape(-1, x.shape[-1])  # (rows, in)
        y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=rows.dtype, device=x.device)  # (..., out)
        out = y.view(len(rows), weight.shape[0])
        if _multiplies_packed(weight, rows):
            native.matmul(weight, rows.contiguous(), out, bias=None if bias is None else bias.float())
        elif bias is None:
            torch.mm(rows, dequantized(weight, rows).T, out=out)
        else:
            torch.addmm(bias.to(y.dtype), rows, dequantized(weight, rows).T, out=out)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        weight, dy_wide = ctx.weight, _widened(dy, ctx.weight)
        if not _multiplies_packed(weight, dy_wide):
            return (dy_wide @ dequantized(weight, dy_wide)).to(dy.dtype), None, None  # (..., in)
        dx = torch.empty(*dy.shape[:-1], weight.shape[1], dtype=dy.dtype, device=dy.device)  # (..., in)
        rows = dy.reshape(-1, dy.shape[-1]).contiguous()
        native.matmul(weight, rows, dx.view(len(rows), weight.shape[1]), backward=True)
        return dx, None, None


def _multiplies_packed(weight: Weight, rows: Tensor) -> bool:
    """Whether a C kernel takes the weight as it is stored: it dequantizes it in the cache, chunk by chunk."""
    is_four_bit = isinstance(weight, QuantizedTensor)
    return is_four_bit and form_for(rows, "matmul") == "c" and native.multiplies(weight.shape)


class _GradientOnly(torch.autograd.Function):
    """The gradient of _FrozenLinear behind an output of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _FrozenLinear.backward(ctx, dy)[:2]


def _widened(x: Tensor, weight: Weight) -> Tensor:
    """Return x in its product's dtype. A plain weight keeps its own, to agree with nn.Linear's bits."""
    return x if isinstance(weight, Tensor) else x.to(product_dtype(x))


def frozen_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) in a tensor that may be overwritten. (..., in) -> (..., out)"""
    if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
        return _FrozenLinear.apply(x, layer.weight, layer.bias)
    return layer(x)


def rerun_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an output with layer(x)'s gradient; its values are computed only if something is trained on
    them.

    For a second run whose output nobody reads (see recompute.py). (..., in) -> (..., out)
    """
    if isinstance(layer, nn.Linear) and any(p.requires_grad for p in layer.parameters()):
        return layer(x)
    if isinstance(layer, (nn.Linear, QuantizedLinear)):
        return _GradientOnly.apply(x, layer.weight)
    return layer.rerun_for_backward(x)


class QuantizedLinear(nn.Module):
    """x: (..., in) -> (..., out) with a quantized, frozen weight (out, in)."""

    def __init__(self, weight: QuantizedTensor | Int8Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight  # not a Parameter: nothing to train, and nn.Module must not convert its bytes
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        """Move the weight with `model.to(device)`; `model.to(dtype)` converts only the bias."""
        super()._apply(fn, recurse)
        self.weight = self.weight.to(fn(torch.empty(0, device=self.weight.device)).device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class Linear4bit(QuantizedLinear):
    """NF4 or FP4: see `minilora.quantization.quantize_4bit`."""

    def forward(self, x: Tensor) -> Tensor:
        one_vector = x.numel() == self.in_features and not torch.is_grad_enabled()  # decoding at batch 1
        if one_vector and form_for(x, "gemv") == "triton":
            y = gemv_4bit(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return super().forward(x)


class Linear8bit(QuantizedLinear):
    """Row-wise int8: see `minilora.int8.quantize_int8`."""
