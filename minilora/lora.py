"""LoRA: a trainable low-rank update beside a frozen linear layer (arXiv:2106.09685, section 4.1).

    y = x W^T + b  +  scaling * dropout(x) A^T B^T              A: (r, in)   B: (out, r)   scaling = alpha / r

Only A and B are trained: r * (in + out) numbers instead of in * out. A starts random and B at zero. So the
adapted model is exactly the base model before the first step, and the first gradient reaches B alone. The
product B A, as large as W, is never formed in training: x goes through A and then B, which costs r/out + r/in
of the layer's own work. It is formed once, to merge.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2) scales by alpha / sqrt(r): under gradient descent
a step then moves the output equally far at any r; under Adam alpha / r does that (docs/lora.md shows both).
LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) leaves A as it was drawn: then no gradient reads x, and only
x A^T is kept. DoRA has its own file, dora.py.

A and B are float32 whatever the compute dtype. Late in a schedule AdamW's steps are smaller than bfloat16's
spacing and would be rounded away, and float16 gradients cannot be unscaled safely. Both are cast to the
activations' dtype for the two thin products. Decoding takes them as they are (backend/decoding.py).

`LoraLinear` wraps a layer and holds several adapters by name; one, or none, is active. `train()` and `eval()`
change nothing but dropout: merging is a separate verb.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora import dora, starts
from minilora.adapted import Adapted, LoraEmbedding, weight_under
from minilora.backend.choice import product_dtype
from minilora.backend.dropout import gain_of, kept, threshold_of
from minilora.backend.fused_lora import Adapter, Part
from minilora.config import LoraConfig
from minilora.linear import QuantizedLinear, apply_fused, frozen_linear, seed_for
from minilora.system.errors import UserError, suggestion
from minilora.targets import ranks_and_alphas
from minilora.wrapping import (
    adapted_layers,
    adapter_names,
    base_layers,
    check_new_adapter,
    match_targets,
    train_adapters,
    untie_for_merging,
    wrap_tokens,
    wrap_whole,
    wrapper,
)


class LowRankUpdate(torch.autograd.Function):
    """y + scaling * (x' A^T) B^T, added to y in place, where x' is x, or x * mask under dropout.

    With g = scaling * dy B, (..., r):   dx = g A * mask      dA = g^T x'      dB = scaling * dy^T (x' A^T)

    Written by hand, it keeps x, which its neighbours q, k, v or gate, up share; the mask, a byte a number;
    and x' A^T of r columns. It keeps neither x' nor any other activation, and where A is frozen not even x.
    """

    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
    ) -> Tensor:
        dtype = product_dtype(x)
        narrow = F.linear(masked(x, mask).to(dtype), A.to(dtype))  # (..., r)
        y.add_(F.linear(narrow, B.to(dtype)), alpha=scaling)  # (..., out)
        ctx.mark_dirty(y)
        _, needs_dx, needs_dA, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dA else None, mask if needs_dx or needs_dA else None, narrow, A, B)
        ctx.scaling, ctx.dtype = scaling, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, narrow, A, B = ctx.saved_tensors
        dtype = narrow.dtype
        dy_wide, dx, dA = dy.to(dtype), None, None
        g = (dy_wide @ B.to(dtype)) * ctx.scaling  # (..., r)
        if x is not None:
            dA = (_rows(g).T @ _rows(masked(x, mask).to(dtype))).to(A.dtype)  # (r, in)
        if ctx.needs_input_grad[1]:
            dx = g @ A.to(dtype)  # (..., in)
            dx = (dx if mask is None else dx.mul_(mask)).to(ctx.dtype)
        dB = _rows(dy_wide).T @ _rows(narrow)  # (out, r)
        return dy, dx, dA, dB.to(B.dtype) * ctx.scaling, None, None


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x * mask, or x itself where nothing is dropped."""
    return x if mask is None else x * mask


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class LoraLinear(Adapted):
    """A frozen linear layer and its adapters. x: (..., in) -> (..., out)."""

    # Parts: (r, in), (out, r), DoRA's (out,), lora_bias (out,), VeRA's (r,) and (out,); all float32.
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_bias", "vera_lambda_d", "vera_lambda_b")
    frozen_kinds = ("frozen_A", "frozen_B")  # what stands beside A and B, or VeRA's shared ones: starts.py

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.scalings: dict[str, float] = {}
        self._merged_factors = torch.ones(())  # DoRA's, (out, 1): its rows were multiplied with them
        self._displaced_bias: Tensor | None = None  # the base layer's, while an adapter is merged
        self.row_norms = dora.RowNorms()

    def add_adapter(self, name: str, config: LoraConfig, r: int | None = None, alpha: float | None = None):
        """Add an adapter: A ~ kaiming_uniform(a=sqrt(5)) = U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
        r, alpha = r or config.r, alpha or config.lora_alpha
        weight = weight_under(self.base_layer, name)
        (out_features, in_features), device = weight.shape, weight.device
        options = dict(dtype=torch.float32, device=device)
        self.configs[name], self.scalings[name] = config, config.scaling_of(r, alpha)
        if config.use_vera:
            return starts.add_vectors(self, name, r, weight)
        # Drawn on the CPU: a seed gives the same adapter on every device, and the same dropout after it.
        drawn_on = "meta" if device.type == "meta" else "cpu"
        A = torch.empty(r, in_features, dtype=torch.float32, device=drawn_on)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, r, **options))
        if config.use_dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.row_norms.of_weight(weight))
        if config.lora_bias:
            self.lora_bias[name] = nn.Parameter(torch.zeros(out_features, **options))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of the products, with all that a start or VeRA makes of them."""
        return starts.factors(self, name) if name in self.frozen_A else (self.lora_A[name], self.lora_B[name])

    @property
    def drops(self) -> bool:
        """Whether the active adapter drops elements of x."""
        return self.applied is not None and self.training and self.configs[self.active].lora_dropout > 0

    def part(self) -> Part | None:
        """Return what the fused form needs (backend/fused_lora.py). None: it knows no DoRA and no biases."""
        base, name, threshold = self.base_layer, self.applied, self._threshold
        if isinstance(base, Adapted):
            return None
        if name is None:
            return Part(base.weight, base.bias, None)
        if self.configs[name].use_dora or name in self.lora_bias:
            return None
        adapter = Adapter(*self.factors(name), self.scalings[name] * gain_of(threshold), threshold)
        return Part(base.weight, base.bias, adapter)

    def forward(
        self,
        x: Tensor,  # (..., in)
        draws: tuple[int, int] | None = None,  # of dropout: a seed and a stream
        product: Callable[[nn.Module, Tensor], Tensor] = frozen_linear,  # or rerun_linear
    ) -> Tensor:
        """Return product(base_layer, x) plus the active adapter's update, (..., out).

        Called alone, it draws a seed, and takes the fused form where there is one. `linear.apply_each` does
        both for several layers, and asks each for the plain form if it must.
        """
        if draws is None:
            draws = seed_for([self]), 0
            outputs = apply_fused(x, [self], draws[0])
            if outputs is not None:
                return outputs[0]
        name, threshold, mask = self.applied, self._threshold, None
        if name is None:
            return product(self.base_layer, x)
        if threshold:
            mask = kept(x.shape[:-1].numel(), x.shape[-1], *draws, threshold, x.device).view(x.shape)
        gain = gain_of(threshold)
        if self.configs[name].use_dora:
            return dora.adapted(self, x, mask, gain, product, LowRankUpdate.apply)
        y = product(self.base_layer, x)
        y = LowRankUpdate.apply(y, x, *self.factors(name), self.scalings[name] * gain, mask)
        if name in self.lora_bias:
            y = y + (self.lora_bias[name] * self.scalings[name]).to(y.dtype)
        return y

    @property
    def _threshold(self) -> int:
        return threshold_of(self.configs[self.active].lora_dropout) if self.drops else 0

    def delta_weight(self, name: str) -> Tensor:
        """Return scaling * B A, float32 (out, in): merging adds it to the weight."""
        A, B = self.factors(name)
        return (B @ A) * self.scalings[name]

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + scaling * B A of the active adapter, for DoRA times m / ||V||.

        Computed in float32 and rounded once to W's dtype.
        """
        if self.applied is not None:
            V, factors = self.plain_layer.weight.float() + self.delta_weight(self.active), torch.ones(())
            if self.configs[self.active].use_dora:
                factors = dora.row_factors(V, self.lora_magnitude_vector[self.active])
            self.plain_layer.weight.copy_(V * factors)
            self._displaced_bias = self.plain_layer.bias
            if self.active in self.lora_bias:
                bias = self.lora_bias[self.active] * self.scalings[self.active]
                bias = bias if self._displaced_bias is None else self._displaced_bias.float() + bias
                self.plain_layer.bias = nn.Parameter(bias.to(V.dtype), requires_grad=False)
            self.merged, self._merged_factors = self.active, factors.masked_fill(factors == 0, 1)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`. With u the rounding unit of W's dtype, |W' - W| <= u (|W + scaling * B A| + |W'|).

        DoRA's rows of magnitude 0 are lost.
        """
        if self.merged is not None:
            weight = self.plain_layer.weight
            factors = self._merged_factors.to(weight.device)  # the model may have moved since
            weight.copy_(weight.float() / factors - self.delta_weight(self.merged))
            self.plain_layer.bias = self._displaced_bias
            self.merged = None


# ---- the verbs: add, switch, merge, unmerge, remove --------------------------------------------------------


def add_lora(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    original: Callable[[str], Tensor] | None = None,  # a layer's weight, (out, in), before it was quantized
) -> None:
    """Freeze the model, wrap the layers of `config.target_modules`, make the adapter active and trainable.

    `target_modules` is a list of leaf names (`q_proj`) or full names, or a string: `all-linear` (every linear
    layer but the output head) or a regular expression that matches whole names. `targets.py` has the rules of
    all fields. Only LoftQ asks for `original`. Raises UserError for a name that no layer has, for an adapter
    name in use, and for a start that cannot be.
    """
    starts.check(config)
    check_new_adapter(model, name)
    targets = match_targets(model, config)
    with adding(model, name):
        wrap_whole(model, targets, config, name)  # the copies are inside
        wrap_targets(model, targets, config, name)
        wrap_tokens(model, config, name)
        starts.start(lora_layers(model, name), config, name, original)


@contextmanager
def adding(model: nn.Module, name: str) -> Iterator[None]:
    """Freeze the model while an adapter is put on it, then make that one active. After an error the model is
    as it was.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    except BaseException:  # memory that ran out, too
        _take_off(model, name)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    set_adapter(model, name)


def wrap_targets(model: nn.Module, targets: Sequence[str], config: LoraConfig, name: str) -> None:
    """Add A and B to the layers of these names, each of its rank."""
    layers = base_layers(model)
    for path, (r, alpha) in ranks_and_alphas(targets, config).items():
        if is_embedding := isinstance(layers[path], nn.Embedding):
            LoraEmbedding.check(config)
        layer = wrapper(model, path, LoraEmbedding if is_embedding else LoraLinear)
        layer.add_adapter(name, config, r, alpha)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Return full name -> wrapped linear layer, of all or of those that have `adapter`."""
    return {n: m for n, m in adapted_layers(model, adapter).items() if isinstance(m, LoraLinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return full name -> parameter, of those that an optimizer should see."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active and trainable, or none: the base model alone."""
    if name is not None:
        _check_adapter(model, name)
    layers = adapted_layers(model).values()
    for layer in layers:
        if layer.merged not in (None, name):
            raise UserError(
                f"adapter {layer.merged!r} is merged into the weights; unmerge it before {name!r}"
            )
    for layer in layers:
        layer.active = name if name in layer.configs else None
    train_adapters(model, [name])


def merge_lora(model: nn.Module) -> None:
    """Add the active adapter to the base weights, so that it costs nothing; `unmerge_lora` undoes it.

    A head that shares the embedding's weight gets its own first if only one of them changes, and stays so.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if isinstance(layer.base_layer, QuantizedLinear) and isinstance(layer, LoraLinear):
            raise UserError(
                f"{name} is quantized: rounding would lose most of the adapter; merge into plain weights"
            )
    untie_for_merging(model)
    for layer in reversed(layers.values()):  # the inner ones first
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Subtract a merged adapter from the base weights (`LoraLinear.unmerge` says which rounding remains)."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all of them. Unmerge first: a merged one stays in the weights.

    Layers without an adapter left become plain layers again, so parameter names are again the checkpoint's.
    """
    for adapter in adapter_names(model) if name is None else [name]:
        _check_adapter(model, adapter)
        _take_off(model, adapter)


def _take_off(model: nn.Module, name: str) -> None:
    for path, layer in reversed(adapted_layers(model).items()):  # the inner ones first
        if name in layer.configs:
            layer.remove_adapter(name)
        if not layer.configs:
            model.set_submodule(path, layer.base_layer)


def _check_adapter(model: nn.Module, name: str) -> None:
    if name not in adapter_names(model):
        raise UserError(f"the model has no adapter called {name!r}{suggestion(name, adapter_names(model))}")
