"""What PyTorch allocates on a CPU while operations run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as these live: now, and at most in each `phase`."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now, self.phase, self.peaks = 0, "", {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        known = {
            t.untyped_storage()._cdata
            for t in tree_leaves((arguments, options))
            if isinstance(t, torch.Tensor)
        }
        results = operation(*arguments, **options)
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage._cdata not in known | self.sizes.keys():
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))
        return results

    def freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)
