"""A LoRA layer under test, and the cases that it is tried on."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.testing.lora_oracles import lora_reference

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r)


def alpha_over_r(r: int, alpha: float) -> float:
    """LoRA's own scaling; rsLoRA's divides by the root of r."""
    return alpha / r


@dataclass(frozen=True)
class LayerMaker:
    """How to make a layer and what is promised of it; `check_lora_layer` explains the fields."""

    make: Callable[[nn.Linear, int, float, float], nn.Module]
    factors: Callable[[nn.Module], Factors]
    merge: Callable[[nn.Module], Any] | None
    unmerge: Callable[[nn.Module], Any] | None
    switch: Callable[[nn.Module, bool], Any] | None
    scaling: Callable[[int, float], float]
    A_std: Callable[[int, int], float] | None
    dtypes: tuple[torch.dtype, ...]

    def cases(self, **fixed: Any) -> st.SearchStrategy["LayerCase"]:
        """Layers of any widths and ranks. `fixed`: fields that all of them share."""
        drawn = dict(
            in_features=st.integers(1, 8) | st.sampled_from([33, 48]),
            out_features=st.integers(1, 8) | st.sampled_from([33, 48]),
            r=st.integers(1, 9),
            lora_alpha=st.sampled_from([1.0, 2.0, 16.0, 0.5, 3.0]),
            bias=st.booleans(),
            leading=st.sampled_from([(1,), (2,), (2, 3)]),
            seed=st.integers(0, 99),
        )
        rest = {name: strategy for name, strategy in drawn.items() if name not in fixed}
        return st.builds(LayerCase, **rest, **{name: st.just(value) for name, value in fixed.items()})


@dataclass(frozen=True, repr=False)
class LayerCase:
    """The sizes of one layer and the seed of its numbers. `case.layer(make_layer)` makes it again."""

    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    bias: bool
    leading: tuple[int, ...]  # of x, before `in`
    seed: int
    lora_dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    def __repr__(self) -> str:
        shown = (each for each in fields(self) if getattr(self, each.name) != each.default)
        return f"LayerCase({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in shown)})"

    def simplest(self, fails: Callable[["LayerCase"], bool]) -> "LayerCase":
        """Return this case without what it does not need in order to fail."""
        case = self
        for plainer in (dict(bias=False), dict(leading=(1,)), dict(lora_alpha=1.0), dict(seed=0)):
            if (shorter := replace(case, **plainer)) != case and fails(shorter):
                case = shorter
        return case

    def layer(self, make_layer: Callable[[nn.Linear, int, float, float], nn.Module]) -> "Built":
        """Return the layer of this case, with its numbers and a batch."""
        return self.build(LayerMaker(make_layer, find_factors, None, None, None, alpha_over_r, None, ()))

    def build(self, maker: LayerMaker, fresh: bool = False, zero_base: bool = False) -> "Built":
        """Return the layer with random W, b, A and B, in evaluation. fresh: A and B stay as they started.
        zero_base: W and b are 0.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        base = nn.Linear(self.in_features, self.out_features, bias=self.bias)
        for parameter in base.parameters():
            parameter.data.copy_(random(*parameter.shape) * (not zero_base))
        base = base.to(self.dtype)
        weight, bias = (None if p is None else p.detach().clone() for p in (base.weight, base.bias))
        layer = maker.make(base, self.r, self.lora_alpha, self.lora_dropout)
        A, B = maker.factors(layer)
        if not fresh:
            with torch.no_grad():
                A.copy_(random(*A.shape))
                B.copy_(random(*B.shape))
        x = random(*self.leading, self.in_features).to(self.dtype)
        dy = random(*self.leading, self.out_features).to(self.dtype)
        return Built(self, maker, base, layer.eval(), weight, bias, A, B, x, dy)


@dataclass(frozen=True)
class Built:
    """A layer, its numbers before anything was done to it, and a batch."""

    case: LayerCase
    maker: LayerMaker
    base: nn.Linear
    layer: nn.Module
    weight: Tensor  # (out, in), a copy
    bias: Tensor | None  # (out,), a copy
    A: Tensor  # (r, in), the layer's own
    B: Tensor  # (out, r), the layer's own
    x: Tensor  # (*leading, in)
    dy: Tensor  # (*leading, out)

    @property
    def scaling(self) -> float:
        return self.maker.scaling(self.case.r, self.case.lora_alpha)

    def base_output(self, x: Tensor) -> Tensor:
        """Return the base layer's output, by PyTorch: (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def update(self, x: Tensor) -> Tensor:
        """Return (x A^T) B^T without scaling: (..., out) float64."""
        return x.detach().double() @ self.A.detach().double().T @ self.B.detach().double().T

    def expected(self, x: Tensor) -> Tensor:
        """Return x W^T + b + s (x A^T) B^T: (..., out) float64."""
        return lora_reference(x, self.weight, self.A.detach(), self.B.detach(), self.scaling, self.bias)

    def bound(self, x: Tensor) -> Tensor:
        """Return how far an output may be off by rounding alone: (..., out) float64.

        A sum of n products in float32 is off by at most n units of 2^-24 of the sum of their magnitudes, in
        any order; three sums and some single roundings make n = in + r + 8, and W may be merged, which
        doubles it. In 16 bits x, A, B, x A^T, both parts and their sum are rounded besides, twice at most: 16
        halves of the dtype's eps.
        """
        A, B, W = (t.detach().double().abs() for t in (self.A, self.B, self.weight))
        bias = 0 if self.bias is None else self.bias.double().abs()
        size = lora_reference(x.double().abs(), W, A, B, abs(self.scaling)) + bias
        units = (self.case.in_features + self.case.r + 8) * 2**-23
        limits = torch.finfo(self.case.dtype)
        return size * (units + (16 * limits.eps / 2 if limits.bits == 16 else 0)) + limits.tiny

    def measured_scaling(self) -> float:
        """Return the factor of (x A^T) B^T in the layer's output, by least squares."""
        x = self.x.detach()
        update, y = self.update(x), self.layer(x).detach()
        rest = y.double() - self.base_output(x).double()
        return float((rest * update).sum() / update.square().sum())


def find_factors(layer: nn.Module) -> Factors:
    """Return `lora_A` (r, in) and `lora_B` (out, r): tensors, linear layers, or the only one of several.

    Raises AttributeError for a layer that has neither.
    """

    def tensor_of(part: Any) -> Tensor:
        if isinstance(part, (nn.ModuleDict, nn.ParameterDict)):
            (part,) = part.values()
        return part.weight if isinstance(part, nn.Linear) else part

    return tensor_of(layer.lora_A), tensor_of(layer.lora_B)
