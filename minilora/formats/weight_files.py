"""The files that hold a model's weights: safetensors or, without these, pickled ones; single or sharded.

model.safetensors                          one file
model.safetensors.index.json + shards      the index: tensor name -> file
pytorch_model.bin, ...bin.index.json       the same, pickled: read only where no safetensors lie beside it
"""

import re
from operator import itemgetter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minilora.formats.foreign_formats import foreign_files
from minilora.formats.pickled import PICKLED_FILE, PICKLED_INDEX_FILE, PickledFile
from minilora.system.errors import UserError, summarize
from minilora.system.schema import Field, read_fields, read_object, shown, shown_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_INDEX_FIELDS = {
    "weight_map": Field(dict, "tensor name -> file name", required=True),
    "metadata": Field(dict, "such as the size of all tensors", nullable=True),
}
_SHARDS = {  # a plain name: no folder, no hidden file
    INDEX_FILE: re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII),
    PICKLED_INDEX_FILE: re.compile(r"\w[\w.-]{0,200}\.bin", re.ASCII),
}


def weight_files(directory: Path) -> dict[Path, set[str]]:
    """The weight files of a model directory, each with the tensors that its index puts there.

    Raises UserError if there are none that can be read.
    """
    for single, index in ((SINGLE_FILE, INDEX_FILE), (PICKLED_FILE, PICKLED_INDEX_FILE)):
        if (directory / index).exists():
            return _shards(directory / index)
        if (directory / single).is_file():
            return {directory / single: set()}
    raise UserError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{foreign_files(directory)}")


def open_weights(path: Path):
    """A weight file as a context with keys(), get_slice(name) and get_tensor(name).

    Raises UserError for a broken one.
    """
    if path.suffix == ".bin":
        return PickledFile(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}; download it again") from error


def index_of(path: Path) -> str:
    """The name of the index that lists a shard."""
    return PICKLED_INDEX_FILE if path.suffix == ".bin" else INDEX_FILE


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, each with its tensors. Raises UserError if one is missing."""
    shards: dict[Path, set[str]] = {}
    for name, file in sorted(_read_index(index).items(), key=itemgetter(1)):
        shards.setdefault(index.parent / file, set()).add(name)
    if absent := [path.name for path in shards if not path.is_file()]:
        raise UserError(f"{index.parent} lacks {summarize(absent)}, which {index.name} names; download again")
    return shards


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded model. No file outside its directory is named."""
    kind = "pickled" if path.name == PICKLED_INDEX_FILE else "safetensors"
    try:
        shards = read_fields(read_object(path), _INDEX_FIELDS)["weight_map"]
        for name, file in shards.items():
            if not isinstance(file, str) or not _SHARDS[path.name].fullmatch(file):
                suffix = "bin" if kind == "pickled" else kind
                raise UserError(
                    f"{shown_name(name)} must lie in a file such as model-00001-of-00002.{suffix} in the "
                    f"same directory, not in {shown(file)}"
                )
    except UserError as error:
        raise UserError(f"{path} is not a {kind} index: {error}") from error
    if not shards:
        raise UserError(f"{path} is not a {kind} index: weight_map is empty")
    return shards
