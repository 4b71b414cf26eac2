"""Offloaded inputs on a machine of two streams, in which every operation knows what has happened before it."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend import offload


class Stream:
    """Runs operations in order. `clock` counts, of every stream, the operations that are done before the next."""

    def __init__(self, machine: "Machine"):
        self.machine, self.clock = machine, {}
        machine.streams.append(self)

    def run(self, *tensors: "Tensor") -> None:
        for tensor in tensors:
            assert tensor.last is None or tensor.last.before(self.clock), "used before it was there"
        self.clock[self] = self.clock.get(self, 0) + 1
        for tensor in tensors:
            tensor.last = Event(self)

    def wait_event(self, event: "Event") -> None:
        self.clock = {s: max(self.clock.get(s, 0), event.clock.get(s, 0)) for s in self.machine.streams}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(Event(other))

    def record_event(self) -> "Event":
        return Event(self)


class Event:
    """The operations that a stream had been given at some moment."""

    def __init__(self, stream: Stream):
        self.stream, self.clock = stream, dict(stream.clock)

    def before(self, clock: dict) -> bool:
        return all(clock.get(stream, 0) >= count for stream, count in self.clock.items())


class Tensor:
    """Memory, on the GPU or not. On the GPU it may be used again by the computing stream as soon as it is freed."""

    shape, dtype = (2, 3), "float16"

    def __init__(self, machine: "Machine", on_gpu: bool, value: int | None = None):
        self.machine, self.on_gpu, self.value, self.last = machine, on_gpu, value, None
        if on_gpu:
            machine.on_gpu.add(self)

    def copy_(self, source: "Tensor", non_blocking: bool) -> None:
        assert non_blocking
        self.machine.current.run(self, source)
        self.value = source.value

    def __del__(self):
        if self.on_gpu and self.last is not None and not self.last.before(self.machine.compute.clock):
            self.machine.races.append(f"freed while it is copied: {self.value}")


class Machine:
    def __init__(self):
        self.streams, self.on_gpu, self.races = [], weakref.WeakSet(), []
        self.compute = self.current = Stream(self)

    @contextmanager
    def stream(self, stream: Stream):
        self.current = stream
        yield
        self.current = self.compute

    def as_torch(self) -> SimpleNamespace:
        """What offload.py uses of PyTorch."""
        cuda = SimpleNamespace(
            Stream=lambda device: Stream(self), current_stream=lambda device: self.current, stream=self.stream
        )
        new = dict(
            empty=lambda shape, dtype, pin_memory: Tensor(self, on_gpu=False),
            empty_like=lambda x, device: Tensor(self, on_gpu=True),
        )
        return SimpleNamespace(cuda=cuda, **new)

    def computed(self, value: int) -> Tensor:
        x = Tensor(self, on_gpu=True, value=value)
        self.compute.run(x)
        return x


@pytest.fixture(scope="module")
def machines():
    """Machines, one after the other, in place of PyTorch."""
    offload.copy_stream.cache_clear()
    original = offload.torch

    def make() -> Machine:
        machine = Machine()
        offload.torch = machine.as_torch()
        offload.copy_stream.cache_clear()
        return machine

    yield make
    offload.torch = original
    offload.copy_stream.cache_clear()


def forward(machine: Machine, layers: int) -> offload.OffloadedInputs:
    inputs = offload.OffloadedInputs("cuda:0")
    for layer in range(layers):
        assert inputs.put(machine.computed(layer)) == layer
        machine.compute.run()  # the layer itself
        assert len(machine.on_gpu) <= offload.IN_FLIGHT
    return inputs


@given(layers=st.integers(1, 9), passes=st.integers(1, 3))
def test_every_input_comes_back_and_no_memory_is_used_while_it_is_copied(machines, layers, passes):
    machine = machines()
    for _ in range(passes):
        inputs = forward(machine, layers)
        for layer in reversed(range(layers)):
            x = inputs.take(layer)
            machine.compute.run(x)  # the layer again, and its backward
            assert x.value == layer and len(machine.on_gpu) <= 2  # and the next one's
            del x
        assert not inputs.leaving and not machine.on_gpu
    assert not machine.races
    assert len(machine.streams) == 2  # one for all passes


@given(layers=st.integers(2, 9), taken=st.integers(0, 8))
def test_a_backward_that_ends_early_frees_no_memory_that_is_still_copied(machines, layers, taken):
    machine = machines()
    inputs = forward(machine, layers)
    for layer in reversed(range(max(1, layers - taken), layers)):
        machine.compute.run(inputs.take(layer))
    del inputs  # with the input of the next layer on its way, or the last ones still leaving
    assert not machine.races and not machine.on_gpu


def test_the_machine_of_these_tests_sees_a_race(machines):
    machine = machines()
    inputs = offload.OffloadedInputs("cuda:0")
    inputs.put(machine.computed(0))
    inputs.leaving.clear()  # lets go without waiting
    assert machine.races == ["freed while it is copied: 0"]
    x = Tensor(machine, on_gpu=True)
    inputs.copies.run(x)
    with pytest.raises(AssertionError, match="used before it was there"):
        machine.compute.run(x)
