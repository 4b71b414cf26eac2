"""Adapters of any library, in any order of verbs: a state machine that Hypothesis drives.

    class MyMachine(AdapterMachine):
        def new(self): ...                  # a base model without adapters, the same one every time
        def add(self, name): ...            # a new adapter becomes active
        ...
    TestMine = MyMachine.TestCase

The machine knows what every adapter is worth: the output that the model gave with it when it was last added,
trained or loaded. After every step the model must give that output again; after training, unmerging and
removing, with every other adapter too. So training one adapter must not move another, merging must not move
the output, unmerging must bring the base back, a removed adapter must leave nothing behind, and a file must
hold the whole of it. Steps shrink to the shortest story that fails.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from minilora.testing.battery import expect_close, expect_same

NAMES = ("first", "second", "third")
PLACES = st.integers(0, 2)


def _one_of(entries: Iterable, number: int):
    entries = list(entries)
    return entries[number % len(entries)]


class AdapterMachine(RuleBasedStateMachine):
    """Subclass it, and give the verbs of a library. `self.model` is yours to keep."""

    # How far a merge may move an output, of its largest value: a sum in another order, and W rounded twice.
    # For float32, widths of some tens and updates no larger than W: 1e-5.
    tolerance = 1e-5

    # ---- the verbs -----------------------------------------------------------------------------------------

    def new(self) -> None:
        """Make a base model without adapters; the same one every time."""
        raise NotImplementedError

    def output(self) -> Tensor:
        """Return the model's output for a fixed input, in evaluation."""
        raise NotImplementedError

    def add(self, name: str) -> None:
        """Add an adapter that changes nothing yet, and make it the active one."""
        raise NotImplementedError

    def activate(self, name: str | None) -> None:
        """Make one adapter the active one, or none."""
        raise NotImplementedError

    def step(self) -> None:
        """Train the active adapter by one step that moves the output."""
        raise NotImplementedError

    def merge(self) -> None:
        """Add the active adapter to the base weights."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take it out again."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Take an adapter off the model, which is not merged. Afterwards none is active if this one was."""
        raise NotImplementedError

    def save(self, name: str, directory: Path) -> None:
        """Write an adapter to an empty directory."""
        raise NotImplementedError

    def load(self, name: str, directory: Path) -> None:
        """Add an adapter under a new name, with what the directory holds, and make it the active one."""
        raise NotImplementedError

    # ---- what must be so -----------------------------------------------------------------------------------

    def __init__(self):
        super().__init__()
        self._outputs: dict[str, Tensor] = {}  # adapter -> the model's output with it
        self._files: dict[Path, Tensor] = {}  # directory -> the output of the adapter in it
        self._active: str | None = None
        self._merged, self._merges = False, 0
        self._folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self._folder.cleanup()
        if hasattr(self, "_random_state"):
            torch.set_rng_state(self._random_state)

    @initialize()
    def _begin(self) -> None:
        self._random_state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # the same steps draw the same A every time
        self.new()
        self._base = self.output().detach().clone()

    def _free(self) -> str:
        return next(name for name in NAMES if name not in self._outputs)

    @rule()
    @precondition(lambda self: not self._merged and len(self._outputs) < len(NAMES))
    def _add(self) -> None:
        name = self._free()
        self.add(name)
        self._active, self._outputs[name] = name, self._base

    @rule(number=PLACES | st.none())
    @precondition(lambda self: not self._merged and self._outputs)
    def _activate(self, number: int | None) -> None:
        self._active = None if number is None else _one_of(self._outputs, number)
        self.activate(self._active)

    @rule()
    @precondition(lambda self: self._active and not self._merged)
    def _step(self) -> None:
        before = self.output().detach().clone()
        self.step()
        after = self.output().detach().clone()
        assert not torch.equal(before, after), f"a step of training moved nothing in {self._active!r}"
        self._outputs[self._active] = after
        self._visit_all()

    @rule()
    @precondition(lambda self: self._active and not self._merged)
    def _merge(self) -> None:
        self.merge()
        self._merged, self._merges = True, self._merges + 1

    @rule()
    @precondition(lambda self: self._merged)
    def _unmerge(self) -> None:
        self.unmerge()
        self._merged = False
        self._visit_all()

    @rule(number=PLACES)
    @precondition(lambda self: not self._merged and self._outputs)
    def _remove(self, number: int) -> None:
        name = _one_of(self._outputs, number)
        self.remove(name)
        del self._outputs[name]
        self._active = None if self._active == name else self._active
        self._visit_all()

    @rule(number=PLACES)
    @precondition(lambda self: not self._merged and self._outputs)
    def _save(self, number: int) -> None:
        name = _one_of(self._outputs, number)
        directory = Path(self._folder.name) / str(len(self._files))
        directory.mkdir()
        self.save(name, directory)
        self._files[directory] = self._outputs[name]

    @rule(number=PLACES)
    @precondition(lambda self: not self._merged and self._files and len(self._outputs) < len(NAMES))
    def _load(self, number: int) -> None:
        name, directory = self._free(), _one_of(self._files, number)
        self.load(name, directory)
        self._active, self._outputs[name] = name, self._files[directory]

    def _visit_all(self) -> None:
        """Make each adapter the active one for a moment, and none: each gives its own output."""
        for name in (*self._outputs, None, self._active):
            self.activate(name)
            self._check_output(name)

    @invariant()
    def the_output_is_that_of_the_active_adapter(self) -> None:
        if hasattr(self, "_base"):
            self._check_output(self._active)

    def _check_output(self, name: str | None) -> None:
        expected = self._base if name is None else self._outputs[name]
        meaning = "the base model's output" if name is None else f"the output of {name!r}"
        if self._merges:
            bound = self._merges * self.tolerance * float(expected.abs().max())
            expect_close(self.output(), expected, bound, meaning)
        else:
            expect_same(self.output(), expected, meaning)
