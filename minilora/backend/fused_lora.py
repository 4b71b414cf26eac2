"""LoRA inside its products: all layers that share an input, frozen products and updates, in one function.

    y_i = x W_i^T + b_i + n_i B_i^T            n_i = s dropout_i(x) A_i^T

    g_i = s dy_i B_i        dx = sum over i of dy_i W_i + dropout_i(g_i A_i)
    dB_i = dy_i^T n_i       dA_i = g_i^T dropout_i(x)

The plain path in lora.py takes these one by one. What is saved here is passes over memory and, on a GPU,
launches: the updates are added while the products are written, dx is one buffer, x meets [A_q | A_k | A_v]
in one thin product, and A and B are cast to the activations' dtype once. Kept for backward are x, n, and the
cast A and B; under dropout a seed instead of masks.

Beside the operands of the frozen products only n and g must move, r numbers a token and adapter. The floor
is that of the products.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.backend import dropout
from minilora.backend.choice import fastest, product_dtype
from minilora.backend.products import multiply, multiply_back


class Adapter(NamedTuple):
    """A layer's active adapter."""

    A: Tensor  # (r, in) float32
    B: Tensor  # (out, r) float32
    scaling: float  # alpha / r, times the gain of dropout
    threshold: int  # of dropout (see dropout.py); 0: nothing is dropped


class Part(NamedTuple):
    """A layer: y = x W^T + b, and its adapter."""

    weight: object  # (out, in): a tensor or a quantized one
    bias: Tensor | None
    adapter: Adapter | None


def can_fuse(parts: Sequence[Part | None]) -> bool:
    """Whether layers can run together: all are frozen, and their adapters are alike."""
    if any(part is None for part in parts):
        return False
    kinds = {(p.adapter.scaling, p.adapter.threshold, len(p.adapter.A)) for p in parts if p.adapter}
    return len(kinds) <= 1 and not torch.is_autocast_enabled(parts[0].weight.device.type)


def fused(x: Tensor, parts: Sequence[Part], seed: int, values: bool = True) -> tuple[Tensor, ...]:
    """Return the layers' outputs, (..., out) each. x: (..., in). Layer i drops by stream i of the seed.

    values: without them outputs are zeros with the right gradients, for a second run that nobody reads.
    """
    tensors = [t for part in parts if part.adapter for t in part.adapter[:2]]
    return _FusedLora.apply(x, _Call(tuple(parts), seed, values), *tensors)


class _Call(NamedTuple):
    """What a pair of passes needs beside tensors. Tensors of all adapters stand one after the other."""

    parts: tuple[Part, ...]
    seed: int
    values: bool

    @property
    def adapted(self) -> list[int]:
        """Which parts have an adapter."""
        return [i for i, part in enumerate(self.parts) if part.adapter]

    @property
    def adapter(self) -> Adapter:
        """Return an adapter that has the scaling and the threshold of all."""
        return next(part.adapter for part in self.parts if part.adapter)

    def draws(self, i: int) -> tuple[int, int, int]:
        """Return what decides which elements part i drops."""
        return self.seed, i, self.adapter.threshold


class _FusedLora(torch.autograd.Function):
    """See the module's docstring. The inputs behind `call` are A and B of each adapter in turn."""

    @staticmethod
    def forward(ctx, x: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        plain = all(isinstance(part.weight, Tensor) for part in call.parts)
        dtype = x.dtype if plain else product_dtype(x)
        rows = _rows(x).to(dtype)
        A, *Bs = cast(tensors, dtype)
        narrow = thin_products(rows, A, call) if Bs else []  # (rows, r) each
        updates = dict(zip(call.adapted, zip(narrow, Bs, strict=True), strict=True))
        ys = [_output(x, rows, part, updates.get(i), call.values) for i, part in enumerate(call.parts)]
        ctx.call, ctx.shape, ctx.dtypes = call, x.shape, (x.dtype, dtype)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2::2]) else None, A, *narrow, *Bs)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, A, *rest = ctx.saved_tensors
        narrow, Bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        call, (x_dtype, dtype), needs = ctx.call, ctx.dtypes, ctx.needs_input_grad
        dys = [None if dy is None else _rows(dy).to(dtype) for dy in dys]
        g, gs, gradients, dx = None, [], [], None
        if Bs:
            g, gs = gradient_of_narrow(dys, Bs, call)
            dAs = [None] * len(Bs) if x is None else gradients_of_A(_rows(x).to(dtype), g, gs, call)
            dBs = gradients_of_B(dys, narrow, Bs, call)
            found = [t for pair in zip(dAs, dBs, strict=True) for t in pair]
            gradients = [t if need else None for t, need in zip(found, needs[2:], strict=True)]
        if needs[0]:
            dx = gradient_of_input(dys, g, gs, A, call)
            dx = None if dx is None else dx.to(x_dtype)
            dx = dx if dx is None or len(ctx.shape) == 2 else dx.view(ctx.shape)
        return dx, None, *gradients


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _columns(x: Tensor, k: int) -> Sequence[Tensor]:
    """Split (rows, k r) into k tensors (rows, r)."""
    return [x] if k == 1 else x.view(len(x), k, -1).unbind(1)


def _pieces(A: Tensor, k: int) -> Sequence[Tensor]:
    """Split (k r, in) into k tensors (r, in)."""
    return [A] if k == 1 else A.view(k, -1, A.shape[1]).unbind()


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    """Return [A_1; A_2; ...], (k r, in), and each B, (out, r), in a dtype: one copy, one launch."""
    As, Bs = tensors[::2], tensors[1::2]
    if len(As) <= 1 and all(t.dtype == dtype for t in tensors):
        return [*As, *Bs] or [None]
    k, (r, width) = len(As), As[0].shape
    A = As[0].new_empty(k * r, width, dtype=dtype)
    cast_Bs = [torch.empty_like(B, dtype=dtype) for B in Bs]
    torch._foreach_copy_([*_pieces(A, k), *cast_Bs], [*As, *Bs])
    return [A, *cast_Bs]


def thin_products(x: Tensor, A: Tensor, call: _Call) -> list[Tensor]:
    """Return scaling * dropout(x) A^T of each adapter, (rows, r). x: (rows, in), A: (k r, in)."""
    scaling, k = call.adapter.scaling, len(call.adapted)
    if call.adapter.threshold == 0:
        n = x.new_empty(len(x), len(A))
        return _columns(torch.addmm(n, x, A.T, beta=0, alpha=scaling, out=n), k)
    product = fastest("dropped_product", x, dropout.dropped_product_definition)
    found = [product(x, a, *call.draws(i)) for i, a in zip(call.adapted, _pieces(A, k), strict=True)]
    torch._foreach_mul_(found, scaling)
    return found


def _output(
    x: Tensor, rows: Tensor, part: Part, update: tuple[Tensor, Tensor] | None, values: bool
) -> Tensor:
    """Return a part's y, (..., out), from x, (..., in), which `rows` is in the product's dtype."""
    shape = *x.shape[:-1], part.weight.shape[0]
    if not values:
        return x.new_zeros(()).expand(shape)
    y = x.new_empty(shape)
    multiply(rows, part.weight, _rows(y), part.bias, update)
    return y


def gradient_of_narrow(
    dys: Sequence[Tensor | None], Bs: Sequence[Tensor], call: _Call
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return scaling * dy B of all adapters, and of each, (rows, r). Without dropout they are the columns of
    one matrix.
    """
    rows, (k, r) = next(len(dy) for dy in dys if dy is not None), (len(Bs), Bs[0].shape[1])
    whole = Bs[0].new_empty(k, rows, r) if call.adapter.threshold else Bs[0].new_empty(rows, k * r)
    parts = whole.unbind() if call.adapter.threshold else _columns(whole, k)
    for i, B, part in zip(call.adapted, Bs, parts, strict=True):
        if dys[i] is None:
            part.zero_()
        else:
            torch.addmm(part, dys[i], B, beta=0, alpha=call.adapter.scaling, out=part)
    return whole, parts


def gradients_of_A(x: Tensor, g: Tensor, gs: Sequence[Tensor], call: _Call) -> Sequence[Tensor]:
    """Return g^T dropout(x) of each adapter, (r, in) float32. x: (rows, in)."""
    if call.adapter.threshold == 0:
        return _pieces(wide_product(g.T, x), len(gs))
    product = fastest("product_with_dropped", x, dropout.product_with_dropped_definition)
    return [product(part, x, *call.draws(i)).float() for i, part in zip(call.adapted, gs, strict=True)]


def gradients_of_B(
    dys: Sequence[Tensor | None], narrow: Sequence[Tensor], Bs: Sequence[Tensor], call: _Call
) -> list[Tensor]:
    """Return dy^T n of each adapter, (out, r) float32."""
    return [
        torch.zeros_like(B, dtype=torch.float32) if dys[i] is None else wide_product(dys[i].T, n)
        for i, n, B in zip(call.adapted, narrow, Bs, strict=True)
    ]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32 or float64. A GPU multiplies 16 bits into float32 without rounding the sums."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))


def gradient_of_input(
    dys: Sequence[Tensor | None], g: Tensor | None, gs: Sequence[Tensor], A: Tensor | None, call: _Call
) -> Tensor | None:
    """Return dx, (rows, in), in the product's dtype: one buffer that every part adds to."""
    there = [i for i, dy in enumerate(dys) if dy is not None]
    drops = bool(gs) and call.adapter.threshold > 0
    dx = None
    for i in there:
        update = (g, A) if gs and not drops and i == there[-1] else None
        dx = multiply_back(dys[i], call.parts[i].weight, dx, update)
    if dx is not None and drops:
        add = fastest("add_dropped_product", dx, dropout.add_dropped_product_definition)
        for i, part, a in zip(call.adapted, gs, _pieces(A, len(gs)), strict=True):
            add(dx, part, a, *call.draws(i))
    return dx
