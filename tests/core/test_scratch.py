"""The buffer that all layers share."""

import pytest
import torch
from support.pretended_gpu import PretendedGpu

from minilora.backend import scratch


@pytest.fixture(autouse=True)
def no_buffers():
    scratch.release()
    yield
    scratch.release()


def test_layers_of_one_dtype_and_device_share_memory_and_others_do_not():
    cpu = torch.device("cpu")
    large = scratch.scratch((8, 4), torch.float32, cpu)
    small = scratch.scratch((3, 5), torch.float32, cpu)
    assert small.shape == (3, 5) and small.data_ptr() == large.data_ptr()
    assert scratch.scratch((8, 4), torch.float16, cpu).data_ptr() != large.data_ptr()


def test_a_second_stream_is_refused_on_each_gpu_for_itself():
    with PretendedGpu(count=2):
        one, other = torch.device("cuda", 0), torch.device("cuda", 1)
        with torch.cuda.stream(torch.cuda.Stream(one)):  # any stream, but one
            for _ in range(2):
                scratch.scratch((4,), torch.float32, one)
        scratch.scratch((4,), torch.float32, other)
        with pytest.raises(AssertionError, match="one stream"):
            scratch.scratch((4,), torch.float32, one)
        scratch.release()
        scratch.scratch((4,), torch.float32, one)
