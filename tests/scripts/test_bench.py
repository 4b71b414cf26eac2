"""What bench.py says of a time is that time."""

import time
from contextlib import nullcontext

import bench
import pytest
import torch


def test_on_a_gpu_kernels_are_timed_by_events_and_the_host_waits_once(monkeypatch):
    """A clock that only the kernel moves stands for the GPU's: what the host does takes no time there."""
    gpu, waits, took = {"now": 0.0}, [], iter([9.0, 9.0, 0.05, 0.06, 0.04])

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = gpu["now"]

        def elapsed_time(self, end):
            assert waits, "read before the GPU was there"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    kernel = lambda: gpu.update(now=gpu["now"] + next(took))  # noqa: E731
    assert bench.median_seconds(kernel, torch.device("cuda"), calls=3) == pytest.approx(50e-6)
    assert len(waits) == 1


def test_on_a_cpu_the_median_time_is_the_functions_own():
    pauses = iter([0.0, 0.0, 0.02, 0.2, 0.01])
    seconds = bench.median_seconds(lambda: time.sleep(next(pauses)), torch.device("cpu"), calls=3)
    assert 0.02 <= seconds < 0.2
