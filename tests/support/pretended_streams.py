"""Streams, events and graphs of a pretended GPU: see pretended_gpu.py."""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves


class Stream:
    """All streams run at once, so nothing is ever waited for; two streams of a device are different ones."""

    def __init__(self, gpu, device):
        self.gpu, self.device = gpu, device

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event(self.gpu)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.wait("synchronize() of a stream")


class Event:
    """An event that has always come."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.gpu.wait("synchronize() of an event")


class Graph:
    """A CUDA graph: what ran while it was recorded runs again, on the same memory, without its Python.

    While a real one is recorded, nothing runs. Here everything does, which must make no difference.
    """

    gpu = None  # that of a subclass: some annotate with torch.cuda.CUDAGraph, which must be a class

    def __init__(self):
        self.work = []

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        assert self.gpu.recording is None, "graphs are recorded one after the other"
        self.gpu.recording = self

    def capture_end(self) -> None:
        self.gpu.recording = None

    def record(self, run: Callable, result=None) -> None:
        """Note how to do something again, and the tensors where its results lie."""
        self.work.append((run, [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]))

    def replay(self) -> None:
        self.gpu.launch("a graph")
        with self.gpu.pause():
            for run, results in self.work:
                again = [t for t in tree_leaves(run()) if isinstance(t, torch.Tensor)]
                for mine, new in zip(results, again, strict=True):
                    if new.data_ptr() != mine.data_ptr():  # not a view, and not written in place
                        mine.copy_(new)
