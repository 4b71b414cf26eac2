"""A layer of a mixed batch: each row goes through it with its own adapter (see mixed.py).

Linear layers with plain LoRA take one product with W for all rows, and a segmented update beside it
(backend/segmented.py). A token of a small layer on a CPU takes a stacked one (backend/stacked.py). All else
is taken one adapter after the other: the rows of each go through the layer with that adapter active.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapted import Adapted
from minilora.backend.choice import fusing
from minilora.backend.dropout import gain_of, threshold_of
from minilora.backend.fused_lora import Adapter
from minilora.backend.segmented import segmented_update
from minilora.backend.stacked import MOST_ROWS, Grid, Stack, add_stacked, stack_of
from minilora.linear import frozen_linear, seed_for
from minilora.lora import LoraLinear


class Mixed(nn.Module):
    """A layer with adapters in which each row of the batch has its own. As `layer`, but by rows."""

    def __init__(self, layer: Adapted, mixture, is_head: bool = False):
        super().__init__()
        self.base_layer = layer  # by PEFT's word, so that all names stay what they are without wrappers
        self.mixture, self.is_head = mixture, is_head
        self.nested = [module for module in layer.modules() if isinstance(module, Adapted)]
        self.stack: Stack | None = None
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def drops(self) -> bool:
        """Whether any of the rows' adapters drops elements of x."""
        return any(map(self._drops, self.mixture.names))

    def part(self) -> None:
        """The fused form knows one adapter only."""

    def forward(
        self,
        x: Tensor,  # (N, in) of all tokens, or (Bt, T, ...)
        draws: tuple[int, int] | None = None,
        product: Callable[[nn.Module, Tensor], Tensor] = frozen_linear,
    ) -> Tensor:
        """Return each row's output by its own adapter. Raises ValueError at a head for some tokens only."""
        layer = self.base_layer
        if self.is_head and x.dim() == 2:
            raise ValueError("whose rows are these? The loss of a mixed batch is `mixed.causal_lm_losses`")
        if not isinstance(layer, LoraLinear):
            return self._by_segment(layer, x)
        if self._is_token(x) and (found := self._stacked(layer)):
            y = product(layer.base_layer, x)
            add_stacked(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *found)
            return y
        shared, stream = draws or (seed_for([self]), 0)
        draws = [(self.seed(name, shared), stream) for name in self.mixture.names]
        if not self._is_plain(layer):
            each = iter(draws)
            return self._by_segment(lambda part: layer(part, next(each), product), x)
        adapters = [self._adapter(layer, name) for name in self.mixture.names]
        y = product(layer.base_layer, x)
        return segmented_update(y, x, adapters, self.mixture.segments(x.shape[:-1].numel(), x.device), draws)

    def after_sum(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As RMSNorm's."""
        x = x if y is None else x + y
        return x, self(x)

    def active(self, name: str | None) -> Adapted:
        """Return the layer with one adapter, for a call that follows at once."""
        for module in self.nested:
            module.active = name if name in module.configs else None
        return self.base_layer

    def _drops(self, name: str | None) -> bool:
        config = self.base_layer.configs.get(name)
        return self.training and config is not None and config.lora_dropout > 0

    def seed(self, name: str | None, shared: int) -> int:
        """Return the seed of an adapter's dropout; 0 where it drops nothing."""
        return self.mixture.seed(name, shared) if self._drops(name) else 0

    def _is_plain(self, layer: LoraLinear) -> bool:
        """Whether all the rows' adapters are A and B alone."""
        configs = [(name, layer.configs[name]) for name in self.mixture.names if name in layer.configs]
        odd = any(config.use_dora or name in layer.lora_bias for name, config in configs)
        return not odd and not isinstance(layer.base_layer, Adapted)

    def _is_token(self, x: Tensor) -> bool:
        """Whether x is a token of decoding on a CPU, of a few rows with several adapters."""
        rows, names = x.shape[:-1].numel(), self.mixture.names
        few = rows == sum(self.mixture.counts) <= MOST_ROWS and len(names) > 1
        return few and x.is_cpu and fusing(x) and not (torch.is_grad_enabled() or self.training)

    def _stacked(self, layer: LoraLinear) -> tuple[Stack, Grid] | None:
        """Return a stack with the rows' adapters, and which rows are whose. An adapter that left the batch
        stays in the stack: it may come back.
        """
        names = [name for name in self.mixture.names if name in layer.configs]
        if self.stack is None or not self.stack.is_fresh or not set(names) <= set(self.stack.names):
            if not names or not self._is_plain(layer) or any(name in layer.frozen_A for name in names):
                return None
            names = list(dict.fromkeys([*(self.stack.names if self.stack else ()), *names]))
            self.stack = stack_of(names, [self._adapter(layer, name) for name in names])
        grid = self.stack and self.mixture.grid(self.stack.names)
        return (self.stack, grid) if grid else None

    def _adapter(self, layer: LoraLinear, name: str | None) -> Adapter | None:
        if name not in layer.configs:
            return None
        threshold = threshold_of(layer.configs[name].lora_dropout) if self.training else 0
        return Adapter(*layer.factors(name), layer.scalings[name] * gain_of(threshold), threshold)

    def _by_segment(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return function(rows) of every segment with its adapter active, in the order of x."""
        tokens = x.shape[:1] if x.dim() == 2 and x.is_floating_point() else x.shape[:2]
        rows = x.reshape(tokens.numel(), *x.shape[len(tokens) :])
        segments, parts = self.mixture.segments(len(rows), x.device), []
        for i, name in enumerate(self.mixture.names):
            self.active(name)
            parts.append(function(segments.rows(rows, i)))
        if self.is_head:  # an adapter's vocabulary may be smaller: its rows say nothing of the other tokens
            widest = max(part.shape[-1] for part in parts)
            parts = [F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts]
        y = torch.cat(parts)
        if segments.order is not None:
            y = torch.empty_like(y).index_copy(0, segments.order, y)
        return y.view(*tokens, *y.shape[1:])


class OneAdapter(nn.Module):
    """A Mixed layer for rows of one adapter: in any number, and again in backward."""

    def __init__(self, mixed: Mixed, name: str | None):
        super().__init__()
        self.mixed, self.name = mixed, name

    @property
    def weight(self) -> Tensor:
        return self.mixed.active(self.name).weight

    def forward(self, x: Tensor) -> Tensor:
        layer, shared = self.mixed.active(self.name), seed_for([self.mixed])
        draws = [(self.mixed.seed(self.name, shared), 0)] if isinstance(layer, LoraLinear) else []
        return layer(x, *draws)
