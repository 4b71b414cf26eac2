"""What a second run needs to repeat a first one bit for bit: random numbers, autocasting, arguments."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class State:
    """The random numbers and the autocasting that the first run saw, for the second one."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.gpus = sorted({t.get_device() for t in tensors if t.is_cuda})
        self.cpu_random = torch.get_rng_state()
        # PyTorch keeps the state of a GPU's generator on the host: reading it waits for nothing.
        self.gpu_random = [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]
        devices = ["cpu"] + ["cuda"] * bool(self.gpus)
        self.autocast = {d: (torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices}
        self.autocast_cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.gpus))
            torch.set_rng_state(self.cpu_random)
            for gpu, state in zip(self.gpus, self.gpu_random, strict=True):
                torch.cuda.set_rng_state(state, gpu)
            for device, (dtype, enabled) in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype, enabled, self.autocast_cache))
            yield


class Pattern(NamedTuple):
    """A nested value without its tensors."""

    leaves: list  # _TENSOR stands where a tensor was
    spec: TreeSpec


_TENSOR = object()


def take_tensors(value: Any) -> tuple[list[Tensor], Pattern]:
    """Return the tensors in a nested value, and the rest of it."""
    leaves, spec = tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Pattern([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def put_tensors(pattern: Pattern, tensors: Iterable[Tensor]) -> Any:
    """Return the nested value that `take_tensors` took apart, with other tensors."""
    rest = iter(tensors)
    return tree_unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in pattern.leaves], pattern.spec)
