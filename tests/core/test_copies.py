"""Copies and numbers for which the host does not wait."""

import torch
from support.pretended_gpu import PretendedGpu

from minilora.backend.copies import read_numbers, to_device


def test_a_copy_to_the_gpu_is_not_waited_for_and_nothing_is_copied_twice():
    x = torch.arange(5)
    with PretendedGpu() as gpu:
        device = torch.device("cuda", 0)
        there = to_device(x, device)
        assert there.device == device and to_device(there, device) is there
        assert not gpu.waits and not gpu.faults
    assert torch.equal(there, x) and to_device(x, torch.device("cpu")) is x


def test_numbers_of_the_gpu_are_read_together_and_those_of_the_host_stay_what_they_are():
    with PretendedGpu() as gpu:
        values = torch.tensor([1.5, -2.25, torch.inf]).pin_memory().to("cuda", non_blocking=True)
        assert read_numbers(values[0], 0.1, values[1], 7, values[2]) == [1.5, 0.1, -2.25, 7, torch.inf]
        assert sum(gpu.waits.values()) == 1
        assert read_numbers(0.1, True) == [0.1, True] and sum(gpu.waits.values()) == 1
