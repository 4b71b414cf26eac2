"""Several adapters in one batch: each row is answered, or trained, by its own.

    with adapters(model, ["sql", "tutor", None, "sql"]):
        logits = model(input_ids)                          # (4, T): row 2 is the base model's

Inside, every layer with an adapter stands in a `Mixed` layer, which knows the adapter of each row. Linear
layers with plain LoRA take one product with W for all rows and a segmented update beside it
(backend/segmented.py). What else an adapter may be, DoRA, trained biases, whole modules, rows of the
embedding, is taken one adapter after the other: the rows of each go through the layer with that adapter
active. So nothing is refused, and each row gets the numbers that it gets alone.

`Mixture` is the same without `with`: an engine puts it on once and chooses adapters for every step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from minilora.adapted import Adapted, TrainedCopy
from minilora.backend.copies import to_device
from minilora.backend.dropout import gain_of, threshold_of
from minilora.backend.fused_lora import Adapter
from minilora.backend.segmented import Segments, segmented_update
from minilora.linear import frozen_linear, seed_for
from minilora.lora import LoraLinear
from minilora.loss import head_loss
from minilora.model import CausalLM
from minilora.system.errors import UserError, suggestion
from minilora.targets import OUTPUT_HEAD
from minilora.wrapping import adapted_layers, adapter_names


@contextmanager
def adapters(model: nn.Module, adapter_ids: Sequence[str | None]) -> Iterator["Mixture"]:
    """Let row i of every batch inside be the adapter's `adapter_ids[i]`; None: the base model's.

    All batches inside have as many rows as there are names. Adapters are put on, removed and saved outside.
    Raises UserError for a name that the model does not have, and while an adapter is merged.
    """
    mixture = Mixture(model)
    try:
        mixture.choose(adapter_ids)
        yield mixture
    finally:
        mixture.remove()


class Mixture:
    """The adapters of the rows of a batch, known to all layers of a model until it is removed."""

    def __init__(self, model: nn.Module):
        self.model, self.known = model, adapter_names(model)
        self.names: tuple[str | None, ...] = ()  # of the segments
        self.counts: tuple[int, ...] = ()  # the batch's rows in each
        self.order: Tensor | None = None  # of the batch's rows, (Bt,), as in Segments
        self._segments: dict[int, Segments] = {}  # tokens a row -> segments of all tokens
        if any(isinstance(module, Mixed) for module in model.modules()):
            raise UserError("the model's rows have their adapters already: leave the first `with adapters`")
        outermost: dict[str, Adapted] = {}
        for path, layer in adapted_layers(model).items():
            if layer.merged is not None:
                raise UserError(f"adapter {layer.merged!r} is merged into the weights; unmerge it first")
            if not any(path.startswith(f"{outer}.") for outer in outermost):
                outermost[path] = layer
        self.were_active = {layer: layer.active for layer in adapted_layers(model).values()}
        for path, layer in outermost.items():
            model.set_submodule(path, Mixed(layer, self, is_head=path == OUTPUT_HEAD))

    def choose(self, adapter_ids: Sequence[str | None]) -> None:
        """Choose the adapter of each row of the next batches. Raises UserError for an unknown name."""
        for name in adapter_ids:
            if name is not None and name not in self.known:
                raise UserError(f"the model has no adapter called {name!r}{suggestion(name, self.known)}")
        names = list(dict.fromkeys(adapter_ids))
        places = sorted(range(len(adapter_ids)), key=lambda i: names.index(adapter_ids[i]))
        self.names, self.counts = tuple(names), tuple(map(list(adapter_ids).count, names))
        together = places == list(range(len(places)))
        self.order = None if together else torch.tensor(places)
        self._segments = {}

    def remove(self) -> None:
        """Leave the model as it was."""
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, Mixed):
                self.model.set_submodule(path, layer.base_layer)
        for layer, name in self.were_active.items():
            layer.active = name if name in layer.configs else None

    def rows_of(self, i: int) -> Tensor | slice:
        """Return which rows of the batch segment i has."""
        start = sum(self.counts[:i])
        return (
            slice(start, start + self.counts[i])
            if self.order is None
            else self.order[start:][: self.counts[i]]
        )

    def segments(self, tokens: int, device: torch.device) -> Segments:
        """Return the segments of all tokens of a batch, which lie row by row. Raises ValueError for a number
        of tokens that is no multiple of the number of rows.
        """
        rows = sum(self.counts)
        T, rest = divmod(tokens, rows)
        if rest:
            raise ValueError(f"{tokens} tokens are no whole rows: adapters were chosen for {rows} rows")
        if T not in self._segments:
            order = self.order
            if order is not None:
                order = to_device((order.unsqueeze(1) * T + torch.arange(T)).flatten(), device)
            bounds = accumulate(self.counts, lambda total, count: total + count * T, initial=0)
            self._segments[T] = Segments(order, tuple(bounds))
        return self._segments[T]


class Mixed(nn.Module):
    """A layer with adapters in which each row of the batch has its own. As `layer`, but by rows."""

    def __init__(self, layer: Adapted, mixture: Mixture, is_head: bool = False):
        super().__init__()
        self.base_layer = layer  # by PEFT's word, so that all names stay what they are without wrappers
        self.mixture, self.is_head = mixture, is_head
        self.nested = [module for module in layer.modules() if isinstance(module, Adapted)]
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def drops(self) -> bool:
        """Whether any of the rows' adapters drops elements of x."""
        configs = [self.base_layer.configs.get(name) for name in self.mixture.names]
        return self.training and any(config is not None and config.lora_dropout > 0 for config in configs)

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
        draws = draws or (seed_for([self]), 0)
        if not self._is_plain(layer):
            return self._by_segment(lambda part: layer(part, draws, product), x)
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

    def _is_plain(self, layer: LoraLinear) -> bool:
        """Whether all the rows' adapters are A and B alone."""
        configs = [(name, layer.configs[name]) for name in self.mixture.names if name in layer.configs]
        odd = any(config.use_dora or name in layer.lora_bias for name, config in configs)
        return not odd and not isinstance(layer.base_layer, Adapted)

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
        y = torch.cat(parts)
        if segments.order is not None:
            y = torch.empty_like(y).index_copy(0, segments.order, y)
        return y.view(*tokens, *y.shape[1:])


# ---- training several adapters at once ---------------------------------------------------------------------


def train_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Make several adapters trainable, as `set_adapter` makes one."""
    for layer in adapted_layers(model).values():
        for name, config in layer.configs.items():
            for kind, parameter in layer.parts(name).items():
                frozen = (kind == "lora_A" and config.lora_fa) or not layer.is_trained(name)
                parameter.requires_grad_(name in names and not frozen)


def causal_lm_losses(
    model: CausalLM, input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None
) -> dict[str | None, Tensor]:
    """Return adapter -> the loss of its rows, as `causal_lm_loss` of them alone; inside `with adapters`.

    Their sum is what to differentiate: no adapter has a gradient from another's rows.
    """
    head, hidden = model.lm_head, model.model(input_ids, document_ids=document_ids)
    mixture = next((m.mixture for m in model.modules() if isinstance(m, Mixed)), None)
    if mixture is None:
        raise UserError("no row has an adapter: choose them by `with adapters(model, [...])`")
    losses = {}
    for i, name in enumerate(mixture.names):
        rows = mixture.rows_of(i)
        losses[name] = head_loss(_head_of(head, name), hidden[rows], labels[rows])
    return losses


def _head_of(head: nn.Module, name: str | None) -> nn.Module:
    """Return the output head as one adapter has it. A copy is asked for its weight, at once."""
    if not isinstance(head, Mixed):
        return head
    layer = head.active(name)
    return layer if isinstance(layer, TrainedCopy) else OneAdapter(head, name)


class OneAdapter(nn.Module):
    """A Mixed layer for rows of one adapter: in any number, and again in backward."""

    def __init__(self, mixed: Mixed, name: str | None):
        super().__init__()
        self.mixed, self.name = mixed, name

    @property
    def weight(self) -> Tensor:
        return self.mixed.active(self.name).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed.active(self.name)(x)
