"""Several adapters in one batch: each row is answered, or trained, by its own.

    with adapters(model, ["sql", "tutor", None, "sql"]):
        logits = model(input_ids)                          # (4, T): row 2 is the base model's

Inside, every layer with an adapter stands in a `Mixed` layer (mixed_layer.py), which knows the adapter of
each row. No kind of adapter is refused, and each row gets the numbers that it gets alone.

`Mixture` is the same without `with`: an engine puts it on once and chooses adapters for every step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from minilora.adapted import Adapted, TrainedCopy
from minilora.backend.copies import to_device
from minilora.backend.dropout import draw_seed
from minilora.backend.segments import Segments
from minilora.backend.stacked import Grid, grid_of
from minilora.loss import head_loss
from minilora.mixed_layer import Mixed, OneAdapter
from minilora.model import CausalLM
from minilora.system.errors import UserError, suggestion
from minilora.targets import OUTPUT_HEAD
from minilora.wrapping import adapted_layers, adapter_names

SECOND_RUN = "rerun_for_backward"  # of layers: see recompute.py


@contextmanager
def adapters(model: nn.Module, adapter_ids: Sequence[str | None]) -> Iterator["Mixture"]:
    """Let row i of every batch inside be the adapter's `adapter_ids[i]`; None: the base model's.

    All batches inside have as many rows as there are names. Backward runs inside, too. Adapters are put on,
    removed and saved outside. Raises UserError for a name that the model does not have, while an adapter is
    merged, and for a batch of another number of rows.
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
        self._grids: dict[tuple[str, ...], Grid | None] = {}
        self._generators: dict[str, torch.Generator] = {}  # of dropout
        self._seeds: dict[tuple[str | None, int], int] = {}
        if any(isinstance(module, Mixed) for module in model.modules()):
            raise UserError("the model's rows have their adapters already: leave the first `with adapters`")
        outermost: dict[str, Adapted] = {}
        for path, layer in adapted_layers(model).items():
            if layer.merged is not None:
                raise UserError(f"adapter {layer.merged!r} is merged into the weights; unmerge it first")
            if not any(path.startswith(f"{outer}.") for outer in outermost):
                outermost[path] = layer
        self.were_active = {layer: layer.active for layer in adapted_layers(model).values()}
        for layer in self.were_active:
            layer.is_mixed = True
        layers = [module for module in model.modules() if hasattr(module, SECOND_RUN)]
        self.second_runs = {layer: vars(layer).get(SECOND_RUN) for layer in layers}
        for path, layer in outermost.items():
            model.set_submodule(path, Mixed(layer, self, is_head=path == OUTPUT_HEAD))
        decoder = getattr(model, "model", model)  # the layers see tokens, and no rows
        self._hook = decoder.register_forward_pre_hook(self._check_rows)

    def choose(self, adapter_ids: Sequence[str | None]) -> None:
        """Choose the adapter of each row of the next batches. Raises UserError for an unknown name."""
        for name in adapter_ids:
            if name is not None and name not in self.known:
                nearest = suggestion(str(name), self.known)
                raise UserError(f"the model has no adapter called {name!r}{nearest}")
        names = list(dict.fromkeys(adapter_ids))
        places = sorted(range(len(adapter_ids)), key=lambda i: names.index(adapter_ids[i]))
        self.names, self.counts = tuple(names), tuple(map(list(adapter_ids).count, names))
        together = places == list(range(len(places)))
        self.order = None if together else torch.tensor(places)
        self.adapter_ids = tuple(adapter_ids)
        self._segments, self._grids, self._generators, self._seeds = {}, {}, {}, {}
        self._random_state = torch.get_rng_state()
        self._watch_second_runs()

    def _check_rows(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Raise UserError before a batch that has not as many rows as adapters were chosen for."""
        if given and len(given[0]) != sum(self.counts):
            problem = f"adapters were chosen for {sum(self.counts)} rows, and the batch has {len(given[0])}"
            raise UserError(f"{problem}; give each row its adapter, or None")

    def _watch_second_runs(self) -> None:
        """Let layers run again for backward only while rows have the adapters of the first run."""
        chosen = self._seeds  # a new one for each choice, and none after the last

        def watched(run: Callable, *arguments, **options) -> Tensor:
            if self._seeds is not chosen:
                raise RuntimeError("backward of a mixed batch must run inside its `with adapters`")
            return run(*arguments, **options)

        for layer, own in self.second_runs.items():
            vars(layer)[SECOND_RUN] = partial(
                watched, own or partial(getattr(type(layer), SECOND_RUN), layer)
            )

    def seed(self, name: str | None, shared: int) -> int:
        """Return the seed of an adapter's dropout where layers together drew the seed `shared`.

        Every adapter draws on its own, from where PyTorch's generator was when rows chose their adapters, and
        only where it drops. So it draws the seeds that it draws alone. A second run of a layer, which repeats
        the shared seed, finds the first run's.
        """
        if (name, shared) not in self._seeds:
            if name not in self._generators:
                self._generators[name] = torch.Generator().set_state(self._random_state)
            self._seeds[name, shared] = draw_seed(self._generators[name])
        return self._seeds[name, shared]

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, Mixed):
                self.model.set_submodule(path, layer.base_layer)
        for layer, name in self.were_active.items():
            layer.active, layer.is_mixed = name, False
        self._seeds = {}
        for layer, own in self.second_runs.items():
            vars(layer).pop(SECOND_RUN, None)
            vars(layer).update({} if own is None else {SECOND_RUN: own})

    def rows_of(self, i: int) -> Tensor | slice:
        """Return which rows of the batch segment i has."""
        start = sum(self.counts[:i])
        end = start + self.counts[i]
        return slice(start, end) if self.order is None else self.order[start:end]

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

    def grid(self, names: tuple[str, ...]) -> Grid | None:
        """Return where the batch's rows lie in a stack of these adapters."""
        if names not in self._grids:
            self._grids[names] = grid_of(self.adapter_ids, names)
        return self._grids[names]


# ---- training several adapters at once ---------------------------------------------------------------------


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


def losses_of_each(
    mixture: Mixture,
    names: Sequence[str | None],
    input_ids: Tensor,
    labels: Tensor,
    document_ids: Tensor | None = None,
) -> dict[str | None, Tensor]:
    """Return adapter -> its loss of a batch that every one of them reads whole. Tensors: (Bt, T)."""
    mixture.choose([name for name in names for _ in range(len(input_ids))])
    batch = input_ids, labels, document_ids
    return causal_lm_losses(mixture.model, *(t if t is None else t.repeat(len(names), 1) for t in batch))


def _head_of(head: nn.Module, name: str | None) -> nn.Module:
    """Return the output head as one adapter has it. A copy is asked for its weight, at once."""
    if not isinstance(head, Mixed):
        return head
    layer = head.active(name)
    return layer if isinstance(layer, TrainedCopy) else OneAdapter(head, name)
