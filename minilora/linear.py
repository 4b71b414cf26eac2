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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.backend.choice import decoding, fusing
from minilora.backend.decoding import decode
from minilora.backend.dropout import draw_seed
from minilora.backend.fused_lora import Part, can_fuse, fused
from minilora.backend.products import multiply, multiply_back
from minilora.int8 import Int8Tensor
from minilora.quantization import QuantizedTensor

Weight = QuantizedTensor | Int8Tensor | Tensor


def apply_each(x: Tensor, *layers: nn.Module, values: bool = True) -> Sequence[Tensor]:
    """Return layer(x) of layers that share their input; adapted ones do it together, in one function.

    x: (..., in) -> (..., out) each. values: without them the outputs have the right gradients and arbitrary
    values, for a second run whose output nobody reads (see recompute.py).
    """
    seed = seed_for(layers)
    outputs = apply_fused(x, layers, seed, values)
    if outputs is not None:
        return outputs
    product = frozen_linear if values else rerun_linear
    return [
        layer(x, (seed, i), product) if hasattr(layer, "part") else layer(x) if values else product(layer, x)
        for i, layer in enumerate(layers)
    ]


def seed_for(layers: Sequence[nn.Module]) -> int:
    """Return a new seed for layers that share their input, 0 where nothing is dropped."""
    return draw_seed() if any(getattr(layer, "drops", False) for layer in layers) else 0


def apply_fused(
    x: Tensor, layers: Sequence[nn.Module], seed: int, values: bool = True
) -> Sequence[Tensor] | None:
    """Return what `apply_each` returns, from one function. None: these layers need the plain path."""
    one_token = decoding(x)
    parts = [_part_of(layer) for layer in layers] if one_token or fusing(x) else [None]
    if not can_fuse(parts):
        return None
    if not one_token:
        return fused(x, parts, seed, values)
    return None if any(p.adapter and p.adapter.threshold for p in parts) else decode(x, parts)


def _part_of(layer: nn.Module) -> Part | None:
    """Return what `fused` needs of a layer. None: it trains its weight, is watched, or is somebody's own."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return None
    if hasattr(layer, "part"):
        return layer.part()
    is_ours = type(layer) is nn.Linear or isinstance(layer, QuantizedLinear)
    if not is_ours or any(p.requires_grad for p in layer.parameters()):
        return None
    return Part(layer.weight, layer.bias, None)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for a frozen W, quantized or not. Keeps no tensor but the weight as it is stored."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # (..., out): no view, so that it may be written to
        multiply(x.reshape(-1, x.shape[-1]), weight, y.view(-1, weight.shape[0]), bias)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        dx = multiply_back(dy.reshape(-1, dy.shape[-1]), ctx.weight)
        return dx.to(dy.dtype).view(*dy.shape[:-1], ctx.weight.shape[1]), None, None  # (..., in)


class _GradientOnly(torch.autograd.Function):
    """The gradient of _FrozenLinear behind an output of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _FrozenLinear.backward(ctx, dy)[:2]


def frozen_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) in a tensor that may be overwritten. (..., in) -> (..., out)"""
    if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
        return _FrozenLinear.apply(x, layer.weight, layer.bias)
    return layer(x)


def rerun_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an output with layer(x)'s gradient; its values are computed only if something is trained on
    them.

    (..., in) -> (..., out)
    """
    is_frozen = not any(p.requires_grad for p in layer.parameters())
    if is_frozen and isinstance(layer, (nn.Linear, QuantizedLinear)):
        return _GradientOnly.apply(x, layer.weight)
    return layer(x)


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
        return decode(x, [Part(self.weight, self.bias, None)])[0] if decoding(x) else super().forward(x)


class Linear8bit(QuantizedLinear):
    """Row-wise int8: see `minilora.int8.quantize_int8`."""
