"""Which layer's weights are whole at present: one unit at a time, and the next one on its way.

    units      the embedding; each decoder layer; the output head, or the embedding again if they are tied

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277, section 3.2) divides each unit's
parameters over the ranks. One all-gather makes them whole, and the memory is freed after use. It does so in
hooks before and after `forward`. Here those hooks would see half of the work: gradient checkpointing runs a
layer again by `rerun_for_backward`, inside an autograd function, and the loss reads the head's weight without
calling it. So `fully_shard` gets modules beside the model, and this file says when:

    forward            before a layer runs; the head behind the last one
    second run         before `rerun_for_backward`; the inner backward follows at once
    backward of `off`  when the gradient of the layer's output is there

Whoever opens a unit closes the one before. So no place needs to know where the use of a unit ends, and at
most two units are in memory beside the shards: one whole, one being gathered in the direction of travel.

Gathering is collective: all ranks must open the same units in the same order. passes.py sees to that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minilora.model import CausalLM
from minilora.parallel.shards import Shards


class Unit(nn.Module):
    """Weights that are gathered together.

    It is called once, after loading: at its first forward `fully_shard` prepares itself, and gathers.
    """

    def __init__(self, shards: Sequence[Shards]):
        super().__init__()
        self.parts = nn.ModuleList(shards)

    def forward(self) -> None:
        for part in self.parts:
            part.set_whole()


class Gathering:
    """Makes units whole, one after the other. `units` have been through `fully_shard`."""

    def __init__(self, units: Sequence[Unit], head: int):
        self.units, self.head = units, head  # head: the head's unit, 0 if it is tied to the embedding
        self.current: int | None = None  # the unit that is whole
        self.ahead: int | None = None  # the unit that is on its way
        self.reading = False  # whether every access to a weight gathers it
        self.gathers = 0  # how many all-gathers were asked for

    def open(self, i: int) -> None:
        """Make unit i whole, close the one before, and begin to gather the one that is probably next."""
        if i == self.current:
            return
        for other in {self.current, self.ahead} - {None, i}:
            self._close(other)
        if self.ahead != i:
            self._gather(i)
        self._wait(i)
        self.current, self.ahead = i, self._next(self.current, i)
        self._gather(self.ahead)

    def close(self) -> None:
        """Free all that is whole or on its way."""
        for i in {self.current, self.ahead} - {None}:
            self._close(i)
        self.current = self.ahead = None

    @contextmanager
    def on_reading(self) -> Iterator[None]:
        """Within, every access to a weight gathers its unit: for starts of adapters that read weights."""
        before, self.reading = self.reading, True
        try:
            yield
        finally:
            self.reading = before

    def _next(self, before: int | None, i: int) -> int:
        """Return which unit is probably opened after i. A wrong guess costs one gather, and no number.

        Forward goes up to the head, backward comes down from it. The embedding begins every pass.
        """
        count = len(self.units)
        last_layer = (self.head - 1) % count
        if i == self.head and before == last_layer and torch.is_grad_enabled():
            return last_layer
        if i == 0:
            return 1
        comes_down = before is not None and i == (before - 1) % count
        return (i - 1 if comes_down else i + 1) % count

    def _gather(self, i: int) -> None:
        self.gathers += 1
        self.units[i].unshard(async_op=True)

    def _wait(self, i: int) -> None:
        self.units[i].unshard()  # begun already: it waits

    def _close(self, i: int) -> None:
        self._wait(i)  # a gather that is under way cannot be called off
        self.units[i].reshard()


def follow(model: CausalLM, gathering: Gathering) -> None:
    """Let the model's own course open the units: by hooks on its decoder, its layers and their gradients."""
    for i, layer in enumerate(model.model.layers):
        opened = partial(_open, gathering, i + 1)
        layer.register_forward_pre_hook(opened)
        layer.register_forward_hook(partial(_open_in_backward, opened))
        layer.rerun_for_backward = partial(_rerun, opened, layer.rerun_for_backward)
    model.model.register_forward_hook(partial(_open, gathering, gathering.head))


def _open(gathering: Gathering, unit: int, *_: object) -> None:
    gathering.open(unit)


def _open_in_backward(opened: Callable, layer: nn.Module, inputs: tuple, y: Tensor) -> None:
    if y.requires_grad:  # a checkpointed layer has no graph here: it runs again
        y.register_hook(opened)


def _rerun(opened: Callable, rerun: Callable, *arguments: object, **options: object) -> Tensor:
    opened()
    return rerun(*arguments, **options)
