"""LoRA inside its products: all layers that share an input, frozen products and updates, in one function.

    y_i = x W_i^T + b_i + n_i B_i^T            n_i = s dropout_i(x) A_i^T

    g_i = s dy_i B_i        dx = sum over i of dy_i W_i + dropout_i(g_i A_i)
    dB_i = dy_i^T n_i       dA_i = g_i^T dropout_i(x)

The plain path in lora.py takes these one by one. What is saved here is passes over memory and, on a GPU,
launches: the updates are added while the products are written, dx is one buffer, x meets [A_q | A_k | A_v]
in one thin product, and A and B are cast to the activations' dtype once. Kept for backward are x, n, and the
cast A and B; under dropout a seed instead of masks.

The price is r / 64 of an instruction's work here and there. The floor is that of the frozen products.
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
        return self.parts[self.adapted[0]].adapter

    def columns(self, n: Tensor) -> tuple[Tensor, ...]:
        """Split (rows, r of all) into (rows, r) of each adapter."""
        return n.tensor_split(len(self.adapted), 1)

    def draws(self, i: int) -> tuple[int, int, int]:
        """Return what decides which elements part i drops."""
        return self.seed, i, self.adapter.threshold


class _FusedLora(torch.autograd.Function):
    """See the module's docstring. The inputs behind `call` are A and B of each adapter in turn."""

    @staticmethod
    def forward(ctx, x: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        plain = all(isinstance(part.weight, Tensor) for part in call.parts)
        dtype = x.dtype if plain else product_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        A, *Bs = cast(tensors, dtype)
        narrow, updates = None, {}
        if Bs:
            narrow = thin_products(rows, A, call)  # (rows, r of all)
            updates = dict(zip(call.adapted, zip(call.columns(narrow), Bs, strict=True), strict=True))
        ys = [_output(x, rows, part, updates.get(i), call.values) for i, part in enumerate(call.parts)]
        ctx.call, ctx.shape, ctx.dtypes = call, x.shape, (x.dtype, dtype)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2::2]) else None, A, narrow, *Bs)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, A, narrow, *Bs = ctx.saved_tensors
        call, (x_dtype, dtype), needs = ctx.call, ctx.dtypes, ctx.needs_input_grad
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]).to(dtype) for dy in dys]
        gradients = [None] * (len(needs) - 2)
        g = None
        if Bs:
            g = gradients_of_narrow(dys, Bs, call, narrow)
            gradients = parameter_gradients(x, dys, g, narrow, Bs, call, needs[2:])
        dx = None
        if needs[0]:
            dx = gradient_of_input(dys, g, A, call)
            dx = None if dx is None else dx.to(x_dtype).view(ctx.shape)
        return dx, None, *gradients


def _output(
    x: Tensor, rows: Tensor, part: Part, update: tuple[Tensor, Tensor] | None, values: bool
) -> Tensor:
    """Return a part's y, (..., out), from x, (..., in), as rows in the product's dtype."""
    out_features = part.weight.shape[0]
    if not values:
        return x.new_zeros(()).expand(*x.shape[:-1], out_features)
    y = x.new_empty(*x.shape[:-1], out_features)
    multiply(rows, part.weight, y.view(-1, out_features), part.bias, update)
    return y


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    """Return [A_1; A_2; ...], (r of all, in), and each B, in a dtype: one copy, one launch."""
    As, Bs = tensors[::2], list(tensors[1::2])
    if len(As) <= 1 and all(t.dtype == dtype for t in tensors):
        return [*As, *Bs] or [None]
    ranks, width = sum(map(len, As)), As[0].shape[1]
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=As[0].device)
    cast_As, cast_Bs = _slots(flat, ranks, width, Bs)
    torch._foreach_copy_([*cast_As, *cast_Bs], [*As, *Bs])
    return [flat[: ranks * width].view(ranks, width), *cast_Bs]


def thin_products(x: Tensor, A: Tensor, call: _Call) -> Tensor:
    """Return n, (rows, r of all): scaling * dropout(x) A^T."""
    scaling, threshold = call.adapter.scaling, call.adapter.threshold
    n = x.new_empty(len(x), len(A))
    if threshold == 0:
        return torch.addmm(n, x, A.T, beta=0, alpha=scaling, out=n)
    product = fastest("dropped_product", x, dropout.dropped_product_definition)
    for i, part, a in zip(call.adapted, call.columns(n), A.tensor_split(len(call.adapted)), strict=True):
        torch.mul(product(x, a, *call.draws(i)), scaling, out=part)
    return n


def gradients_of_narrow(dys: list[Tensor | None], Bs: list[Tensor], call: _Call, narrow: Tensor) -> Tensor:
    """Return g, (rows, r of all): scaling * dy B."""
    g = torch.empty_like(narrow)
    for i, B, part in zip(call.adapted, Bs, call.columns(g), strict=True):
        if dys[i] is None:
            part.zero_()
        else:
            torch.addmm(part, dys[i], B, beta=0, alpha=call.adapter.scaling, out=part)
    return g


def parameter_gradients(
    x: Tensor | None,
    dys: list[Tensor | None],
    g: Tensor,
    narrow: Tensor,
    Bs: list[Tensor],
    call: _Call,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return float32 gradients of A and B of each adapter in turn; None where none is needed."""
    ranks, width = g.shape[1], 0 if x is None else x.shape[-1]
    flat = g.new_empty(ranks * width + sum(B.numel() for B in Bs))
    dAs, dBs = _slots(flat, ranks, width, Bs)
    for i, n, dB in zip(call.adapted, call.columns(narrow), dBs, strict=True):
        dB.zero_() if dys[i] is None else torch.mm(dys[i].T, n, out=dB)
    if x is not None and call.adapter.threshold == 0:
        torch.mm(g.T, x.reshape(-1, width).to(g.dtype), out=flat[: ranks * width].view(ranks, width))
    elif x is not None:
        rows = x.reshape(-1, width).to(g.dtype)
        product = fastest("product_with_dropped", rows, dropout.product_with_dropped_definition)
        for i, part, dA in zip(call.adapted, call.columns(g), dAs, strict=True):
            dA.copy_(product(part, rows, *call.draws(i)))
    dAs, dBs = _slots(flat.float(), ranks, width, Bs)  # one launch for all
    found = [t for pair in zip(dAs, dBs, strict=True) for t in pair]
    return [t if need else None for t, need in zip(found, needs, strict=True)]


def _slots(
    flat: Tensor, ranks: int, width: int, Bs: Sequence[Tensor]
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Return the places of each A, (r, width), and of each B in one block of memory."""
    A, rest = flat[: ranks * width].view(ranks, width), flat[ranks * width :]
    parts = rest.split([B.numel() for B in Bs])
    return A.tensor_split(len(Bs)), [part.view_as(B) for part, B in zip(parts, Bs, strict=True)]


def gradient_of_input(
    dys: list[Tensor | None], g: Tensor | None, A: Tensor | None, call: _Call
) -> Tensor | None:
    """Return dx, (rows, in), in the product's dtype: one buffer that every part adds to."""
    there = [i for i, dy in enumerate(dys) if dy is not None]
    inside = g is not None and call.adapter.threshold == 0
    dx = None
    for i in there:
        dx = multiply_back(dys[i], call.parts[i].weight, dx, (g, A) if inside and i == there[-1] else None)
    if dx is not None and g is not None and not inside:
        add = fastest("add_dropped_product", dx, dropout.add_dropped_product_definition)
        for i, part, a in zip(call.adapted, call.columns(g), A.tensor_split(len(call.adapted)), strict=True):
            add(dx, part, a, *call.draws(i))
    return dx
