"""Adapters in three places: a few on the model's device, more in memory, all of them on disk.

    store = AdapterStore(model, on_device=2)
    store.register("sql", "runs/a")                        # read, checked, kept in memory
    store.use(["sql", None, "tutor"])                      # on the model, for the batch that comes
    with adapters(model, ["sql", None, "tutor"]): ...

A LoRA adapter is a hundredth of its model, but a thousand of them are more than a GPU holds. Few are in use
at any time, so the least recently used one makes room (S-LoRA, Sheng et al. 2023, arXiv:2311.03285, section
5). Each adapter on the device is in memory, too: an eviction only drops it, and a failed exchange can be
undone. So `in_memory` counts those on the device.

A name keeps its meaning. What is in memory is a copy, which no change of the folder reaches. Where the files
have changed since, an adapter that must be read again is refused: forget the name, and register it again.

One thread at a time may call a store.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.checks import naming
from minilora.adapters.file import AdapterFile
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PICKLED_WEIGHTS_FILE
from minilora.adapters.save_load import fitted, put_adapter, read_adapter
from minilora.lora import remove_lora, set_adapter
from minilora.model import CausalLM
from minilora.system.errors import UserError, suggestion
from minilora.targets import EMBEDDING, OUTPUT_HEAD
from minilora.wrapping import adapted_layers, base_layers, check_adapter_name

_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PICKLED_WEIGHTS_FILE)
_COUNTED = (
    *("hits", "loads_from_memory", "loads_from_disk"),
    *("evictions_from_device", "evictions_from_memory"),
)
Stamp = list[tuple[int, int]]  # (bytes, time of the last change in ns) of each file


class AdapterStore:
    """The adapters that a model may be asked for. Those that others put on the model are left alone.

    on_device: how many are on the model at most. in_memory: how many are read and checked at most, those on
    the device among them; pinned, where the device is a GPU. Raises UserError for numbers that cannot be.
    """

    def __init__(self, model: CausalLM, on_device: int = 8, in_memory: int = 32):
        for key, value, least in (("on_device", on_device, 1), ("in_memory", in_memory, on_device)):
            if value < least:
                raise UserError(f"{key} must be at least {least}, not {value}")
        self.model, self.on_device, self.in_memory = model, on_device, in_memory
        self._registered: dict[str, tuple[Path, Stamp]] = {}
        self._files: dict[str, AdapterFile] = {}  # in memory
        self._on_model: set[str] = set()  # always a part of those in memory
        self._order: list[str] = []  # of all names; the least recently used first
        self._counts: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._registered)

    def register(self, name: str, directory: str | Path) -> None:
        """Read an adapter, check it against the model, and keep it in memory. The model is not changed.

        Raises UserError for a name that is taken or cannot be, for an adapter that `load_adapter` refuses,
        and for one whose vocabulary is larger than the model's.
        """
        if name in self._registered:
            raise UserError(f"adapter {name!r} is registered already; choose another name or forget it")
        check_adapter_name(self.model, name)
        directory = Path(directory)
        stamp = _stamp(directory)
        self._files[name] = self._read(directory)
        self._registered[name] = directory, stamp
        self._order.append(name)
        self._trim_memory()

    def forget(self, name: str) -> None:
        """Take an adapter off the model and out of memory. Raises UserError for an unknown name."""
        self._check_known(name)
        if name in self._on_model:
            self._check_outside()
            remove_lora(self.model, name)
            self._on_model.remove(name)
        self._order.remove(name)
        self._files.pop(name, None)
        del self._registered[name]

    def changes(self, names: Iterable[str | None]) -> bool:
        """Return whether `use(names)` would move an adapter. Raises UserError as `use` does."""
        return not self._on_model.issuperset(self._asked(names))

    def use(self, names: Iterable[str | None]) -> None:
        """Put these adapters on the model, and note that they were used. None, the base model, is no adapter.

        If any has to move, the least recently used others make room, and no adapter is active afterwards.
        Raises UserError for an unknown name, for more than `on_device` of them, for files that were changed,
        and inside a `Mixture` if any has to move. After an error the same adapters are on the model as
        before.
        """
        asked = self._asked(names)
        missing = [name for name in asked if name not in self._on_model]
        unread = [name for name in missing if name not in self._files]
        leaving: list[str] = []
        if missing:
            self._check_outside()
            files = self._files | {name: self._read_again(name) for name in unread}
            others = [name for name in self._order if name in self._on_model and name not in asked]
            leaving = others[: max(0, len(self._on_model) + len(missing) - self.on_device)]
            self._exchange(leaving, missing, files)
            self._files = files
            self._on_model = self._on_model.difference(leaving).union(missing)
        self._order = [name for name in self._order if name not in asked] + asked
        self._counts["hits"] += len(asked) - len(missing)
        self._counts["loads_from_memory"] += len(missing) - len(unread)
        self._counts["loads_from_disk"] += len(unread)
        self._counts["evictions_from_device"] += len(leaving)
        self._trim_memory()

    def figures(self) -> dict[str, int | dict[str, int]]:
        """Return counts of `use`'s hits, loads and evictions, and the bytes of each adapter by place.

        Tensors that layers or adapters share count once an adapter.
        """
        return {name: self._counts[name] for name in _COUNTED} | {
            "bytes_on_device": {name: self._bytes_on_device(name) for name in sorted(self._on_model)},
            "bytes_in_memory": {name: _bytes(_tensors(self._files[name])) for name in sorted(self._files)},
        }

    # ---- parts of the above --------------------------------------------------------------------------------

    def _asked(self, names: Iterable[str | None]) -> list[str]:
        asked = list(dict.fromkeys(name for name in names if name is not None))
        for name in asked:
            self._check_known(name)
        if len(asked) > self.on_device:
            raise UserError(f"{len(asked)} adapters in one batch are more than on_device = {self.on_device}")
        return asked

    def _check_known(self, name: str) -> None:
        if name not in self._registered:
            raise UserError(f"no adapter is registered as {name!r}{suggestion(name, self.names)}")

    def _check_outside(self) -> None:
        if any(layer.is_mixed for layer in adapted_layers(self.model).values()):
            raise UserError(
                "rows choose their adapters at present; leave `with adapters` before any can move"
            )

    def _read(self, directory: Path) -> AdapterFile:
        """Return an adapter that the model can take, in memory of its own: safetensors maps the file."""
        adapter = read_adapter(directory)
        fitted(self.model, adapter)
        rows = base_layers(self.model)[EMBEDDING].weight.shape[0]
        for module in (EMBEDDING, OUTPUT_HEAD):
            own = adapter.own(module).get("weight")
            if own is not None and len(own) > rows:
                raise UserError(
                    f"{directory} brings a vocabulary of {len(own)} tokens, and the model has {rows}: "
                    "load the model with that many rows"
                )
        pinned = next(self.model.parameters()).is_cuda

        def copied(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if pinned else tensor.clone()

        modules = {m: {part: copied(t) for part, t in parts.items()} for m, parts in adapter.modules.items()}
        return replace(adapter, modules=modules, shared=adapter.shared and tuple(map(copied, adapter.shared)))

    def _read_again(self, name: str) -> AdapterFile:
        directory, stamp = self._registered[name]
        with naming(f"adapter {name!r}"):
            adapter = self._read(directory)
            if _stamp(directory) != stamp:
                raise UserError(
                    f"{directory} has changed since it was registered; forget the name and register it again"
                )
        return adapter

    def _exchange(self, leaving: list[str], coming: list[str], files: dict[str, AdapterFile]) -> None:
        """Take adapters off the model and put others on. After an error the model is as it was."""
        on = set(self._on_model)
        try:
            for name in leaving:
                remove_lora(self.model, name)
                on.remove(name)
            for name in coming:
                put_adapter(self.model, files[name], name)
                on.add(name)
        except BaseException:
            for name in on.intersection(coming):
                remove_lora(self.model, name)
            for name in set(leaving) - on:
                put_adapter(self.model, files[name], name)
            raise
        finally:
            set_adapter(self.model, None)

    def _trim_memory(self) -> None:
        """Drop the least recently used adapters that are not on the model, until so many may stay."""
        droppable = [name for name in self._order if name in self._files and name not in self._on_model]
        for name in droppable[: max(0, len(self._files) - self.in_memory)]:
            del self._files[name]
            self._counts["evictions_from_memory"] += 1

    def _bytes_on_device(self, name: str) -> int:
        layers = adapted_layers(self.model, name).values()
        kinds = [getattr(layer, kind) for layer in layers for kind in (*layer.kinds, *layer.frozen_kinds)]
        return _bytes(kind[name] for kind in kinds if name in kind)


def _stamp(directory: Path) -> Stamp:
    found = [path.stat() for path in map(directory.joinpath, _FILES) if path.is_file()]
    return [(status.st_size, status.st_mtime_ns) for status in found]


def _tensors(adapter: AdapterFile) -> list[Tensor]:
    return [t for parts in adapter.modules.values() for t in parts.values()] + list(adapter.shared or ())


def _bytes(tensors: Iterable[Tensor | torch.nn.Parameter]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
