"""Which tensors lie on a pretended GPU, and which are pinned: see pretended_gpu.py."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

CPU = torch.device("cpu")


class Places:
    """The marks: storages on a GPU, and pinned ones. A mark ends with its storage."""

    def __init__(self):
        self._gpu: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def device(self, tensor: torch.Tensor) -> torch.device:
        """Return where the tensor is pretended to be."""
        with torch._C.DisableTorchFunction():
            real = torch._C.TensorBase.device.__get__(tensor)
            if real.type != "cpu":
                return real
            reference, device = self._gpu.get(tensor.untyped_storage()._cdata, (None, CPU))
        return real if reference is None or reference.expired() else device

    def put(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Mark the tensor's memory as the device's."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._gpu.pop(storage._cdata, None)
            if device.type == "cuda":
                self._gpu[storage._cdata] = StorageWeakRef(storage), device
        if len(self._gpu) > 20_000:
            self._gpu = {key: mark for key, mark in self._gpu.items() if not mark[0].expired()}
        return tensor

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            reference = self._pinned.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()


PLACES = Places()  # of all pretended GPUs: what is cached outlives one


class Generator(torch.Generator):
    """A generator that says that it is the GPU's, and draws on the CPU."""

    def __new__(cls, device=CPU):
        self = super().__new__(cls, CPU)
        self.place = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.place
