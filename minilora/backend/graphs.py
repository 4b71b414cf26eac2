"""A function's work on a GPU, recorded once and launched as one: a CUDA graph.

Each launch costs the host some time. A token of a 7B model takes hundreds of them, and the GPU waits for
nearly all. A graph is one launch. It repeats the same kernels on the same memory, and runs none of
the function's Python.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minilora.backend import scratch, tables
from minilora.backend.library import warn
from minilora.system.errors import one_line

_problem = ""  # why graphs cannot be recorded here, once that is known


def recorded(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a function that does on a GPU what `function` does there; or `function`, where that fails.

    It must have run before: kernels are compiled and buffers are made at the first call. It may not wait for
    the GPU, and all that it reads and writes must stay where it is. Recording runs its Python once, and
    launches nothing.
    """
    global _problem
    if _problem:
        return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):  # PyTorch does not record on the default stream.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
    except Exception as error:  # whatever a driver or an operation may raise
        _problem = f"{type(error).__name__}: {one_line(str(error))}"
        warn(f"answers are slower here, without CUDA graphs: {_problem}")
        return function
    current.wait_stream(stream)
    return partial(_replay, graph, [*scratch.buffers(), *tables.tables()])


def _replay(graph: torch.cuda.CUDAGraph, used: list[Tensor]) -> None:
    """Repeat the work. used: the buffers that layers shared then, and the tables that kernels read. Others
    may have taken their place, but while somebody holds them, their memory is nobody else's.
    """
    graph.replay()
