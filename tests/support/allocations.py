"""What PyTorch allocates on a CPU while operations run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as these live: now, and at most in each `phase`.

    Of every storage the present size: `fully_shard` frees the memory of tensors that live on.
    """

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakSet()
        self.phase, self.peaks = "", {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        given = {storage._cdata for storage in _storages((arguments, options))}
        results = operation(*arguments, **options)
        self.storages.update(s for s in _storages(results) if s._cdata not in given)
        self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))
        return results

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """Return what lies in memory. A DTensor has a size and no memory of its own: its local tensor has."""
    found = []
    for tensor in tree_leaves(tree):
        if not isinstance(tensor, torch.Tensor):
            continue
        if is_traceable_wrapper_subclass(tensor):
            found += _storages([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        elif tensor.device.type == "cpu":
            found.append(tensor.untyped_storage())
    return found
