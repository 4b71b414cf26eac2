"""Changes to files. They return a function without arguments, which a case calls in the folder of its files."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

Edit = Callable[[], object]
DROP = object()  # as a value: take the key out


def both(*edits: Edit) -> Edit:
    """One edit after the other."""
    return lambda: [edit() for edit in edits]


def write(path: str, content: str | bytes) -> Edit:
    """A file with this content, whatever lay there before."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def edit() -> None:
        _remove(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    return edit


def write_json(path: str, value: object) -> Edit:
    return write(path, json.dumps(value))


def set_keys(path: str, **changes: object) -> Edit:
    """Change keys of a JSON object; DROP takes one out."""
    return edit_json(path, lambda raw: {k: v for k, v in (raw | changes).items() if v is not DROP})


def edit_json(path: str, change: Callable[[object], object]) -> Edit:
    """Replace the value in a JSON file by `change(value)`. NaN and Infinity are written as Python does."""

    def edit() -> None:
        Path(path).write_text(json.dumps(change(json.loads(Path(path).read_text()))))

    return edit


def cut(path: str, share: float) -> Edit:
    """Keep only this share of a file's bytes."""
    return edit_bytes(path, lambda data: data[: int(len(data) * share)])


def edit_bytes(path: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def remove(path: str) -> Edit:
    return lambda: _remove(path)


def folder(path: str) -> Edit:
    """A directory where a file should be."""
    return both(remove(path), lambda: os.makedirs(path))


def fifo(path: str) -> Edit:
    """A pipe that nobody writes to: reading it never ends."""
    return both(remove(path), lambda: os.mkfifo(path))


def link(path: str, target: str) -> Edit:
    """A symbolic link: to /dev/zero, which never ends, or to another file."""
    return both(remove(path), lambda: os.symlink(target, path))


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


# ---- safetensors: eight bytes with the length of the header, the header in JSON, the numbers ----


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """(header, numbers) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: object, numbers: bytes, length: int | None = None) -> bytes:
    """The bytes of a file. A `length` that is given may lie about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + numbers


def edit_header(path: str, change: Callable[[dict], object]) -> Edit:
    """Replace the header by `change(header)`, or by the header that `change` edited if it returns None."""

    def edited(data: bytes) -> bytes:
        header, numbers = split_safetensors(data)
        return join_safetensors(change(header) or header, numbers)

    return edit_bytes(path, edited)


def edit_tensors(path: str, change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    """Let `change` edit the dictionary of a file's tensors, and write it again with its metadata."""

    def edited(data: bytes) -> bytes:
        tensors, header = load(data), split_safetensors(data)[0]
        change(tensors)
        return save(tensors, metadata=header.get("__metadata__"))

    return edit_bytes(path, edited)


# ---- checkpoints ----


def seal(checkpoint: str) -> Edit:
    """Write the right digests of a checkpoint's files, as whoever changed them can do."""

    def edit() -> None:
        listing = Path(checkpoint, "training_state/digests.json")
        names = json.loads(listing.read_text())
        digests = {name: hashlib.sha256(Path(checkpoint, name).read_bytes()).hexdigest() for name in names}
        listing.write_text(json.dumps(digests))

    return edit
