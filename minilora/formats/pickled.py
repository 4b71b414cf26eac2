"""Pickled weights, `pytorch_model.bin` and `adapter_model.bin`: tensors come out, and nothing else.

A pickle is a program: it names Python functions and calls them. Python's `pickle` calls any of them, so a
stranger's file could delete yours. `torch.load(weights_only=True)` has an interpreter of its own for the same
bytes. It knows a fixed list of functions, which build tensors and dictionaries, and stops at any other. It
is the only loader here, and its list is not made longer.

Around it stand three checks of our own. PyTorch must be 2.10 or newer: before 2.6 a tar archive, the format
of 2016, got around `weights_only` (CVE-2025-32434), and before 2.10 a crafted file could write outside of its
memory (CVE-2026-24747). An archive must hold its entries uncompressed, as PyTorch writes them: compressed
ones can grow without end. And everything that comes out must be a tensor of plain numbers that the file
holds.

    {"model.norm.weight": tensor, ...}      read
    {"model": {"norm.weight": tensor}}      refused, as are optimizer states, counters, whole modules
    sparse, quantized, meta, complex        refused
    a view of 4 bytes with 10^12 elements   refused

Since 2020 `torch.save` writes zip archives, which are mapped: a tensor is read when it is used. Older files
are read into memory whole.
"""

import functools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.system.errors import UserError
from minilora.system.schema import shown_name

PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"

_SAFE_SINCE = (2, 10)  # of PyTorch, for files of others
_ZIP_BEGINS = b"PK\x03\x04"
_DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, on the CPU; views of the mapped file, if it is a zip archive.

    Says on stderr, once a directory, that they are pickled. Raises UserError for a file that asks for
    anything but tensors (which is then not run), holds anything else, is damaged, or needs a newer PyTorch.
    """
    if torch.__version__ < _SAFE_SINCE:
        raise UserError(
            f"{path} is pickled, and PyTorch {torch.__version__} has a known way out of its safe loader "
            "(CVE-2026-24747): install PyTorch 2.10 or newer, or take safetensors"
        )
    if not path.is_file():
        raise UserError(f"{path} is missing, or is no regular file")
    _announce(path.parent)
    content = _load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name; take safetensors")
    return {_name(path, name): _plain(path, name, value) for name, value in content.items()}


def is_mapped(path: Path) -> bool:
    """Whether PyTorch can map the file instead of reading it whole: zip archives, its format since 2020."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_BEGINS)) == _ZIP_BEGINS


class PickledFile:
    """A mapped pickled file, with those methods of safetensors' `safe_open` that `weights.py` uses."""

    def __init__(self, path: Path):
        if path.is_file() and not is_mapped(path):
            raise UserError(
                f"{path} is no zip archive, PyTorch's format since 2020, and cannot be mapped; "
                f"if it is older, convert it: python scripts/convert.py --model {path.parent} --output NEW"
            )
        self._tensors = read_pickled_tensors(path)

    def __enter__(self) -> "PickledFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}  # unmaps the file as soon as nobody holds a view

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "PickledFile.Entry":
        return self.Entry(self._tensors[name])

    class Entry:
        """The header of one tensor; an index reads a part of it."""

        def __init__(self, tensor: Tensor):
            self._tensor = tensor

        def __getitem__(self, index: slice) -> Tensor:
            return self._tensor[index]

        def get_shape(self) -> list[int]:
            return list(self._tensor.shape)

        def get_dtype(self) -> str:
            return _DTYPES[self._tensor.dtype]


@functools.cache
def _announce(directory: Path) -> None:
    """Say once that pickled files are read. stdout may carry answers, so this goes to stderr."""
    print(
        f"reading pickled weights in {directory}, with PyTorch's loader that builds tensors only; "
        f"python scripts/convert.py --model {directory} --output NEW writes safetensors",
        file=sys.stderr,
    )


def _load(path: Path) -> object:
    """What the file holds, by PyTorch's safe loader. Raises UserError if the loader refuses it."""
    try:
        mapped = is_mapped(path)
        if mapped:
            _check_uncompressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about PyTorch's own past: typed storages, TorchScript
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # damaged and hostile pickles raise every type
        # PyTorch's own text advises to switch the safe loader off. The name of a function is enough.
        if wanted := re.search(r"GLOBAL ([^\s']+)", str(error)):
            raise UserError(
                f"{path} asks for {shown_name(wanted[1])}, which builds no tensor; it was not run. "
                "Such a file may be malicious: take safetensors"
            ) from None
        raise UserError(
            f"{path} is truncated, corrupt, or no file of tensors ({type(error).__name__}); "
            "download it again, or take safetensors"
        ) from None


def _check_uncompressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    f"{path} holds compressed entries, which PyTorch never writes, and which may grow "
                    "without end; take safetensors"
                )


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise UserError(f"{path} holds an entry whose name is a {type(name).__name__}, not a text")
    return name


def _plain(path: Path, name: str, value: object) -> Tensor:
    """The value as a plain tensor. Raises UserError for anything else, or if numbers of it are missing."""
    problem = None
    if type(value) not in (Tensor, nn.Parameter):
        problem = f"a {type(value).__name__}"
    elif value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
        problem = f"a tensor of {value.dtype}, {value.layout}, on {value.device.type}"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        problem = f"a view of {tuple(value.shape)} of fewer numbers"
    if problem is not None:
        raise UserError(f"{path}: {shown_name(name)} is {problem}, where only plain tensors are read")
    return value.detach()
