"""Frozen linear layers whose weight is stored in 4 or 8 bits.

    forward     W = dequantize(q)      y  = x W^T + b
    backward    W = dequantize(q)      dx = dy W

A frozen weight has no gradient of its own, so the backward pass needs W and nothing else, and W can be had
again from the packed bytes at any time. So neither pass keeps it: an autograd function that saved W would
hold the whole model dequantized between forward and backward, which is what 4 bits were to avoid. Nor is
memory asked for anew each time. All layers dequantize into one scratch buffer per device and dtype, as large
as the largest layer: on a CPU, touching fresh pages costs more than the arithmetic.

The dtype of the computing is the activations' own (see `ops.product_dtype`); the dtype that a file was
quantized from says nothing about it.
"""

import torch
from torch import Tensor, nn

from minilora import ops
from minilora.int8 import Int8Tensor
from minilora.quantization import QuantizedTensor, gemv_4bit

Weight = QuantizedTensor | Int8Tensor | Tensor

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape in the buffer that all layers of a device and dtype share. Its contents live
    until the next call.
    """
    count = shape[0] * shape[1]
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < count:
        buffer = _scratch[device, dtype] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for a frozen W, quantized or not, of which nothing is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        wide = _widened(x, weight)
        y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=wide.dtype, device=x.device)  # (..., out)
        rows, W = wide.reshape(-1, wide.shape[-1]), dequantized(weight, wide)
        if bias is None:
            torch.mm(rows, W.T, out=y.view(len(rows), -1))
        else:
            torch.addmm(bias.to(wide.dtype), rows, W.T, out=y.view(len(rows), -1))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        wide = _widened(dy, ctx.weight)
        return (wide @ dequantized(ctx.weight, wide)).to(dy.dtype), None, None  # (..., in)


class _ReplayedLinear(torch.autograd.Function):
    """_FrozenLinear's gradient behind an output of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _FrozenLinear.backward(ctx, dy)[:2]


def frozen_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), which may be overwritten. (..., in) -> (..., out)"""
    if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
        return _FrozenLinear.apply(x, layer.weight, layer.bias)
    return layer(x)


def rerun_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) for the sake of its gradient: where the weight is frozen, the values are not computed. (...,
    in) -> (..., out)
    """
    if isinstance(layer, nn.Linear) and any(p.requires_grad for p in layer.parameters()):
        return layer(x)
    if isinstance(layer, (nn.Linear, QuantizedLinear)):
        return _ReplayedLinear.apply(x, layer.weight)
    return layer.replay(x)


def _widened(x: Tensor, weight: Weight) -> Tensor:
    """x in the dtype of its product with W. A weight that is not quantized has a dtype, and a plain layer's
    bits to agree with.
    """
    return x if isinstance(weight, Tensor) else x.to(ops.product_dtype(x))


def dequantized(weight: Weight, like: Tensor) -> Tensor:
    """W in the dtype of `like`, (out, in); a quantized one in the scratch buffer."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    return weight.dequantize(like.dtype, out=scratch(tuple(weight.shape), like.dtype, like.device))


class QuantizedLinear(nn.Module):
    """x: (..., in) -> (..., out) with a quantized, frozen weight (out, in)."""

    def __init__(self, weight: QuantizedTensor | Int8Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight  # not a Parameter: nothing to train, and nn.Module must not convert its bytes to another dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        """Follow `model.to(device)`; of `model.to(dtype)` only the bias takes notice."""
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
        if (
            x.numel() == self.in_features and not torch.is_grad_enabled() and ops.use_triton(x)
        ):  # decoding at batch 1
            y = gemv_4bit(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return super().forward(x)


class Linear8bit(QuantizedLinear):
    """Row-wise int8: see `minilora.int8`."""


def describe_weights(model: nn.Module) -> str:
    """How the linear layers of the decoder are stored, for people: 'nf4 with double quantization, 4.13 bits a
    weight, 3.3 GiB'.
    """
    quantized = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not quantized:
        return str(next(model.parameters()).dtype).removeprefix("torch.")
    bytes_ = sum(weight.nbytes for weight in quantized)
    bits = 8 * bytes_ / sum(weight.shape.numel() for weight in quantized)
    kind = "int8, a scale a row"
    if isinstance(quantized[0], QuantizedTensor):
        kind = quantized[0].quant_type + (
            " with double quantization" if quantized[0].nested_absmax is not None else ""
        )
    return f"{kind}, {bits:.2f} bits a weight, {bytes_ / 2**20:,.1f} MiB"


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model has, those of quantized weights included."""
    quantized = sum(m.weight.shape.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    return quantized + sum(p.numel() for p in model.parameters())
