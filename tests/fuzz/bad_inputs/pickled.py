"""Pickled weights: damaged ones, ones that hold more than tensors, and programs."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from fuzz.bad_inputs.commands import CONVERT, EVALUATE, MERGE, TRAIN
from fuzz.case import Case, make_case
from fuzz.edits import Edit, both, cut, edit_bytes, fifo, folder, link, remove, write, write_json

FILE, INDEX = "model/pytorch_model.bin", "model/pytorch_model.bin.index.json"


class Program:
    """Pickles as a call of os.system, which would leave a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def pickle_model(change: Callable[[dict], object] = lambda tensors: None, **how: object) -> Edit:
    """The weights of model/ as one pickled file, after `change` has edited or replaced their dictionary."""

    def edit() -> None:
        file = Path("model/model.safetensors")
        tensors = load_file(file)
        torch.save(change(tensors) or tensors, FILE, **how)
        file.unlink()

    return edit


def deflate(data: bytes) -> bytes:
    """The same archive, with a long run of zeros in its pickle, compressed."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in old.infolist():
            zeros = bytes(10**8) if entry.filename.endswith("data.pkl") else b""
            archive.writestr(entry.filename, old.read(entry) + zeros)
    return new.getvalue()


BROKEN = {  # name: edit, words of the message
    "is empty": (write(FILE, b""), "pytorch_model.bin"),
    "is text": (write(FILE, "no tensor in sight"), "pytorch_model.bin"),
    "is cut in half": (cut(FILE, 0.5), "truncated"),
    "is cut by a byte": (edit_bytes(FILE, lambda data: data[:-1]), "truncated"),
    "is compressed": (edit_bytes(FILE, deflate), "compressed"),
    "is a pipe": (fifo(FILE), "pytorch_model.bin|neither"),
    "is a folder": (folder(FILE), "pytorch_model.bin|neither"),
    "is /dev/zero": (link(FILE, "/dev/zero"), "pytorch_model.bin|neither"),
    "is absent": (remove(FILE), "neither model.safetensors"),
}
CONTENTS = {  # name: change of the dictionary, words of the message
    "is a program": (lambda tensors: {"x": Program()}, "posix.system"),
    "is a program behind tensors": (lambda tensors: tensors.update(x=Program()), "posix.system"),
    "is a list": (lambda tensors: [*tensors.values()], "list"),
    "is a module": (lambda tensors: torch.nn.Linear(2, 2), "torch.nn"),
    "holds a dictionary": (lambda tensors: {"model": tensors}, "model is a dict"),
    "holds a number": (lambda tensors: tensors.update(step=3), "step is a int"),
    "holds a view of 10^12 numbers": (lambda t: t.update(x=torch.ones(1).expand(10**6, 10**6)), "view"),
    "holds a tensor on meta": (lambda tensors: tensors.update(x=torch.ones(2, device="meta")), "meta"),
    "holds a name with an escape sequence": (lambda tensors: tensors.update({"x\x1b[2J\n": 3}), "x"),
}
INDICES = {  # name: edit of the index
    "names safetensors": write_json(INDEX, {"weight_map": {"x": "x.safetensors"}}),
    "names the folder above": write_json(INDEX, {"weight_map": {"x": "../x.bin"}}),
    "names an absent shard": write_json(INDEX, {"weight_map": {"x": "x.bin"}}),
    "is a list": write_json(INDEX, []),
    "is a pipe": fifo(INDEX),
}


def cases() -> Iterator[Case]:
    for number, (name, (edit, words)) in enumerate(BROKEN.items()):
        yield _case(name, number, words, both(pickle_model(), edit))
    for number, (name, (change, words)) in enumerate(CONTENTS.items()):
        yield _case(name, number, words, pickle_model(change))
    for number, (name, edit) in enumerate(INDICES.items()):
        yield _case(f"the index {name}", number, "index.json|x.bin", both(pickle_model(), edit))
    old = pickle_model(_use_new_zipfile_serialization=False)
    yield make_case("pickled", "from before 2020 (train)", TRAIN, "no zip archive", change=old)
    yield make_case("pickled", "safetensors alone (convert)", CONVERT, "nothing to convert")
    yield make_case("pickled", "convert", CONVERT, (), change=pickle_model(), code=0, remarks=True)


def _case(name: str, number: int, words: str, change: Edit) -> Case:
    command = (CONVERT, TRAIN, EVALUATE, MERGE)[number % 4]
    return make_case("pickled", f"{name} ({command.split()[0]})", command, words, change=change, remarks=True)
