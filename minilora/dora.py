"""DoRA: the length of each row of a weight is trained apart from its direction (Liu et al. 2024,
arXiv:2402.09353, section 4).

    W' = m V / ||V||         V = W + scaling * B A          ||V||: (out,), the lengths of V's rows          m: (out,), trained
    y  = c * (x V^T) + b     c = m / ||V||                  m starts as ||W||, so with B = 0 the model is the base, to the bit

In full training, layers that turn their rows more stretch them less; in LoRA's, which has one update for
both, they do both more (section 3). With a number of its own for each length, B A has the directions to
itself. That costs `out` numbers a layer.

||V|| follows V but is a constant to the gradient (section 4.3). Of V's gradient only a factor c is left, and
of m's

    dm = sum over tokens of dy * (x V^T) / ||V|| = sum over tokens of dy * (c x V^T) / m

so that backward reads the layer's own output, which the layers gate and up share with SwiGLU, instead of
another tensor. Where m is 0 it is taken for 0: such a row, of zeros at first, as in a padded vocabulary,
stays dead. PEFT makes NaN of it.

||V|| is needed in every forward, for A and B have moved. Forming V for it takes a tensor as large as W, in
float32. But

    ||V||^2 = ||W||^2 + 2 scaling rowsum(B * (W A^T)) + scaling^2 rowsum(B * (B (A A^T)))

||W||^2 never changes, and the widest other part is W A^T, (out, r): to the matrix product, r more tokens. As
the terms are rounded in float32, with eps, ||V|| is off by some eps (||W|| + ||scaling B A||)^2 / ||V||^2 of
itself: by no more than if it were formed, unless an adapter takes nearly all of W away. Where the activations
have 16 bits, so has W A^T, like x A^T.

Under dropout x keeps what the adapter does not see, x - dropout(x), on the way through the frozen W (PEFT's
formula, rearranged):

    y = c * (dropout(x) V^T) + (x - dropout(x)) W^T + b

That is two products with W, forward and backward: DoRA is meant to be trained without dropout.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.linear import Weight, dequantized

_EPS, _TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


class Magnitude(torch.autograd.Function):
    """m / ||V|| * y, in y's place. y: (..., out), m and ||V||: (out,) float32. Keeps its output alone."""

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
    """m / ||V||, (out, 1): what merging multiplies V = W + scaling * B A with. V: (out, in) float32."""
    return (magnitude / torch.linalg.vector_norm(V, dim=1).clamp_min(_TINY)).unsqueeze(1)


class RowNorms:
    """The lengths of a layer's rows, (out,) float32, and which of them can be kept for the next time."""

    def __init__(self):
        self._kept: dict[str, tuple[tuple, tuple, Tensor]] = {}

    @torch.no_grad()
    def of_weight(self, weight: Weight) -> Tensor:
        """||W||. Computed once, until W is merged into or moved."""
        return self._weight_squares(weight).sqrt()

    @torch.no_grad()
    def of_sum(
        self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, keep: bool
    ) -> Tensor:
        """||W + scaling * B A||, with W A^T taken in a dtype.

        keep: return the same until A or B is written to, in generation from token to token. Not for training,
        where what an optimizer's kernel writes PyTorch may not notice.
        """

        def compute() -> Tensor:
            squares, narrow = self._weight_squares(weight), A.to(dtype)
            cross = (B * (dequantized(weight, narrow) @ narrow.T)).sum(1)  # (out,), of (out, r)
            update = (B * (B @ (A @ A.T))).sum(1)
            total = squares + 2 * scaling * cross + scaling**2 * update
            return torch.maximum(
                total, squares * _EPS + _TINY
            ).sqrt()  # below that it is rounding, or a row of zeros

        if keep:
            return self._keep("V", compute, weight, A, B)
        self._kept.pop("V", None)
        return compute()

    def _weight_squares(self, weight: Weight) -> Tensor:
        def compute() -> Tensor:
            W = (
                weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
            )  # not in the dtype of the files
            return torch.linalg.vector_norm(W, dim=1, dtype=torch.float32).square()

        return self._keep("W", compute, weight)

    def _keep(self, name: str, compute: Callable[[], Tensor], *sources: Weight) -> Tensor:
        """What was computed before, if it was from these very tensors, and none has been written to or moved
        since.
        """
        versions = tuple(
            (t.device, t._version if isinstance(t, Tensor) and not t.is_inference() else 0) for t in sources
        )
        before, seen, value = self._kept.get(name, ((), (), None))
        if seen != versions or any(a is not b for a, b in zip(before, sources, strict=True)):
            value = compute()
            self._kept[name] = sources, versions, value
        return value
