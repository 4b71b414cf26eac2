"""DoRA: the length of each row of a weight is trained apart from its direction (Liu et al. 2024,
arXiv:2402.09353, 4).

    W' = m V / ||V||       V = W + scaling * B A      ||V||: (out,), V's row lengths   m: (out,), trained
    y  = c * (x V^T) + b   c = m / ||V||              m starts as ||W||: B = 0 leaves the base exactly

The paper speaks of columns, of W as (in, out). In PyTorch's (out, in), as in PEFT, the same are rows.

In full training, layers that turn their rows more stretch them less. LoRA has one update for both, so it does
both more (section 3). DoRA gives each length its own number and leaves the directions to B A. That costs
`out` numbers a layer.

||V|| follows V but is a constant to the gradient (section 4.3). V's gradient then keeps only a factor c, and
m's is

    dm = sum over tokens of dy * (x V^T) / ||V|| = sum over tokens of dy * (c x V^T) / m

so backward reads the layer's own output, which the layers gate and up share with SwiGLU. Where m is 0, dm is
taken to be 0: a row of zeros, as in a padded vocabulary, stays dead. PEFT makes NaN of it.

Every forward needs ||V||, because A and B have moved. Forming V takes a float32 tensor as large as W. But

    ||V||^2 = ||W||^2 + 2 scaling rowsum(B * (W A^T)) + scaling^2 rowsum(B * (B (A A^T)))

||W||^2 never changes, and the widest other part is W A^T, (out, r): to the matrix product, r more tokens. The
terms are rounded in float32, so ||V|| is off by about eps (||W|| + ||scaling B A||)^2 / ||V||^2 of itself.
Forming V is no more exact, unless an adapter takes nearly all of W away. Where the activations have 16 bits,
so has W A^T, like x A^T.

Under dropout the part of x that the adapter does not see goes through the frozen W (PEFT's formula,
rearranged):

    y = c * (dropout(x) V^T) + (x - dropout(x)) W^T + b

That is two products with W, forward and backward: DoRA is meant to be trained without dropout.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.backend.choice import product_dtype
from minilora.backend.products import dequantized
from minilora.linear import Weight, frozen_linear

_EPS, _TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def adapted(
    layer: nn.Module,  # a lora.LoraLinear whose active adapter is DoRA
    x: Tensor,  # (..., in)
    mask: Tensor | None,  # of dropout, (..., in)
    gain: float,  # 1 / (1 - p)
    product: Callable[[nn.Module, Tensor], Tensor],  # frozen_linear, or rerun_linear in a second run
    low_rank_update: Callable[..., Tensor],  # lora.LowRankUpdate.apply
) -> Tensor:
    """Return the layer's output with its active DoRA adapter, (..., out).

    The magnitudes' gradient reads the values of the first product, so a second run computes those too.
    """
    name, base, weight = layer.active, layer.base_layer, layer.base_layer.weight
    (A, B), magnitude = layer.factors(name), layer.lora_magnitude_vector[name]
    scaling, bias = layer.scalings[name], base.bias
    generating = not (layer.training or torch.is_grad_enabled())
    norms = layer.row_norms.of_sum(weight, A, B, scaling, product_dtype(x), keep=generating)
    dropped = x if mask is None else x * mask  # dropout(x), without the gain
    y = frozen_linear(base, dropped)
    y = y if bias is None else y - bias.to(y.dtype)
    y = Magnitude.apply(low_rank_update(y, x, A, B, scaling, mask), magnitude, norms / gain)  # (..., out)
    if mask is not None:
        return y + product(base, torch.sub(x, dropped, alpha=gain))
    return y if bias is None else y + bias.to(y.dtype)


class Magnitude(torch.autograd.Function):
    """m / ||V|| * y, in place. y: (..., out), m and ||V||: (out,) float32. Keeps only its output."""

    @staticmethod
    def forward(ctx, y: Tensor, magnitude: Tensor, norms: Tensor) -> Tensor:
        y.mul_(magnitude / norms)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, magnitude, norms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        y, magnitude, norms = ctx.saved_tensors
        total = (dy.float() * y).reshape(-1, len(norms)).sum(0)  # (out,)
        return dy.clone().mul_(magnitude / norms), (total / magnitude).masked_fill_(magnitude == 0, 0), None


def row_factors(V: Tensor, magnitude: Tensor) -> Tensor:
    """Return m / ||V||, (out, 1). Merging multiplies V = W + scaling * B A with it. V: (out, in) float32."""
    return (magnitude / torch.linalg.vector_norm(V, dim=1).clamp_min(_TINY)).unsqueeze(1)


class RowNorms:
    """The lengths of a layer's rows, (out,) float32, cached where they cannot change."""

    def __init__(self):
        self._cache: dict[str, tuple[tuple, tuple, Tensor]] = {}  # name -> (sources, their versions, value)

    @torch.no_grad()
    def of_weight(self, weight: Weight) -> Tensor:
        """Return ||W||. Computed once, until W is merged into or moved."""
        return self._weight_squares(weight).sqrt()

    @torch.no_grad()
    def of_sum(
        self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, keep: bool
    ) -> Tensor:
        """Return ||W + scaling * B A||, with W A^T computed in `dtype`.

        keep: cache it until A or B is written to; for generation, where nothing moves from token to token.
        Not for training: PyTorch may not notice what an optimizer's kernel writes.
        """
        if keep:
            return self._cached("V", partial(self._of_sum, weight, A, B, scaling, dtype), weight, A, B)
        self._cache.pop("V", None)
        return self._of_sum(weight, A, B, scaling, dtype)

    def _of_sum(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        squares, narrow = self._weight_squares(weight), A.to(dtype)
        cross = (B * (dequantized(weight, narrow) @ narrow.T)).sum(1)  # (out,), of (out, r)
        update = (B * (B @ (A @ A.T))).sum(1)  # (out,)
        total = squares + 2 * scaling * cross + scaling**2 * update
        return torch.maximum(
            total, squares * _EPS + _TINY
        ).sqrt()  # a smaller total is rounding, or a row of zeros

    def _weight_squares(self, weight: Weight) -> Tensor:
        """Return ||W||^2, (out,)."""
        return self._cached("W", partial(_row_squares, weight), weight)

    def _cached(self, name: str, compute: Callable[[], Tensor], *sources: Weight) -> Tensor:
        """Return the cached value if it is of these very tensors and none was written to or moved since."""
        versions = tuple((t.device, _version(t)) for t in sources)
        before, seen, value = self._cache.get(name, ((), (), None))
        if seen != versions or any(a is not b for a, b in zip(before, sources, strict=True)):
            value = compute()
            self._cache[name] = sources, versions, value
        return value


def _row_squares(weight: Weight) -> Tensor:
    W = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)  # not in the files' dtype
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.float32).square()


def _version(t: Weight) -> int:
    """Return how often PyTorch saw a tensor written to; quantized weights never are."""
    return t._version if isinstance(t, Tensor) and not t.is_inference() else 0
