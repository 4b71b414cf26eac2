"""From a dataset's name to its records: data files of the common formats, on this machine or elsewhere.

    data.jsonl, .json, .csv, .tsv, .parquet, .txt       a file, or data.jsonl.gz, compressed
    https://host/data.jsonl                             a file on a web server
    s3://bucket/data.csv, hf://datasets/owner/name/f    a file in a storage that fsspec knows
    owner/name, owner/name/folder, owner/name[test]     a dataset on the Hugging Face hub, downloaded once,
                                                        then read from the cache
    folder, folder[test]                                the same on this machine: a copy of one from the hub,
                                                        or what `datasets.save_to_disk` wrote

Of a dataset of many files one split is read (`splits.py`), and one format only, the first it has of .jsonl,
.parquet, .csv, .tsv, .json, .txt, .arrow.

A record is a dict of columns. Its location, "data.jsonl, line 3", comes with it, for error messages. What a
pipe or a device would hold, /dev/zero for example, is not read: only files are.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from minilora.data.file_formats import FORMATS, decompressed
from minilora.data.splits import choose_split, parse_name
from minilora.system.errors import UserError, raise_error
from minilora.system.redaction import Address, is_address
from minilora.system.remote import error_kind, read_file

Record = tuple[str, dict]  # its location, its columns
# The formats of a hub dataset, the least likely to hold anything but rows first.
_HUB_FORMATS = [".jsonl", ".parquet", ".csv", ".tsv", ".json", ".txt", ".arrow"]
CARD = "README.md"  # of a dataset; its YAML may name the files of each split
MOST_FILES = 10_000
# JSON files that the datasets library writes beside its data.
_NOT_DATA = re.compile(r"(.*/)?(dataset_(infos?|dict)|state)\.json")


def read_records(dataset: str | Path, on_error: Callable[[UserError], None] = raise_error) -> list[Record]:
    """Return all records of a file, an address or a hub dataset; see `each_record`."""
    return list(each_record(dataset, on_error))


def each_record(dataset: str | Path, on_error: Callable[[UserError], None] = raise_error) -> Iterator[Record]:
    """Yield the records of a file, an address or a hub dataset.

    Raises UserError with the file and the line. For single wrong records, `on_error` is called, and the
    record is left out if it returns.
    """
    dataset, is_empty = dataset if isinstance(dataset, str) else str(dataset), True
    for name, path in _find_files(dataset):
        try:
            for location, record in _read_file(name, path):
                is_empty = False
                if isinstance(record, UserError):
                    on_error(record)
                elif not isinstance(record, dict):
                    found = type(record).__name__
                    on_error(UserError(f"{location}: expected an object with columns, found {found}"))
                else:
                    yield location, record
        except MemoryError as error:
            raise UserError(f"dataset {name} needs more memory than there is; split the file") from error
    if is_empty:
        raise UserError(f"dataset {dataset} is empty")


# ---- from a dataset to its files ----


def _find_files(dataset: str) -> list[tuple[str, str]]:
    """Return the name of each file, for messages, and its path or address."""
    if is_address(dataset):
        return [(str(Address(dataset)), dataset)]
    if os.path.isfile(dataset):  # the methods of Path raise for a name that is too long
        return [(dataset, dataset)]
    place, split = parse_name(dataset)
    if os.path.isdir(place):
        return _find_local_files(Path(place), split)
    if os.path.exists(dataset):
        raise UserError(
            f"dataset {dataset} is no file, but a pipe or a device; write its contents into a file"
        )
    if _suffix(place)[0] not in FORMATS and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", place):
        return _find_hub_files(place, split)
    raise UserError(f"dataset {dataset} does not exist")


def _find_local_files(folder: Path, split: str | None) -> list[tuple[str, str]]:
    """Return names and paths of the files of a dataset that lies in a folder."""
    names = [name for name in _files_in(folder) if not any(part.startswith(".") for part in name.split("/"))]
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return [
        (str(folder / name), str(folder / name))
        for name in _choose_files(names, str(folder), "", split, text)
    ]


def _files_in(folder: Path) -> list[str]:
    """Return the names of all files in a folder, at most MOST_FILES of them."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [*islice(files, MOST_FILES + 1)]
    if len(names) > MOST_FILES:
        raise UserError(f"dataset {folder} holds more than {MOST_FILES:,} files; name one of them")
    return names


def _find_hub_files(dataset: str, split: str | None) -> list[tuple[str, str]]:
    """Return names and local paths of the files of a hub dataset, downloaded if the cache lacks them."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    owner, name, *folders = dataset.split("/")
    repo_id, folder = f"{owner}/{name}", "/".join(folders)
    try:
        names, card = _list_hub_files(repo_id), ""
        if CARD in names:
            path = huggingface_hub.hf_hub_download(repo_id, CARD, repo_type="dataset")
            card = Path(path).read_text(encoding="utf-8", errors="replace")
        chosen = _choose_files(names, repo_id, folder, split, card)
        paths = [huggingface_hub.hf_hub_download(repo_id, file, repo_type="dataset") for file in chosen]
    except errors.RepositoryNotFoundError as error:  # the hub's answer for gated datasets too
        raise UserError(
            f"{repo_id!r} is neither a file here nor a dataset at {constants.ENDPOINT}: correct the name; if "
            "it is private or gated, ask for access on its page and log in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(
            f"dataset {dataset} does not exist, and it is not a hub id either, which is owner/name"
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"dataset {repo_id} cannot be fetched from {constants.ENDPOINT}: {error_kind(error)}"
        ) from error
    return [(f"{repo_id}/{file}", path) for file, path in zip(chosen, paths, strict=True)]


def _list_hub_files(repo_id: str) -> list[str]:
    """Return the names of all files of a hub dataset; without a network, those in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().list_repo_files(repo_id, repo_type="dataset")
    except errors.OfflineModeIsEnabled:
        snapshot = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", local_files_only=True)
        return _files_in(Path(snapshot))


def _choose_files(names: list[str], dataset: str, folder: str, split: str | None, card: str) -> list[str]:
    """Return the files of one split of a dataset, all of one format."""
    names = [name for name in names if _suffix(name)[0] in FORMATS and not _NOT_DATA.fullmatch(name)]
    if names := choose_split(names, dataset, folder, split, card):
        first = min(map(_suffix, names), key=lambda suffix: (_HUB_FORMATS.index(suffix[0]), suffix[1]))
        return [name for name in names if _suffix(name) == first]
    where = f" in {folder}" if folder else ""
    raise UserError(f"dataset {dataset}: no {', '.join(FORMATS)} file is there{where}")


def _suffix(name: str) -> tuple[str, bool]:
    """Return the suffix of the format, and whether the file is compressed: data.csv.gz is (".csv", True)."""
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem).suffix, True) if path.suffix == ".gz" else (path.suffix, False)


def _read_file(name: str, path: str) -> Iterator[tuple[str, object]]:
    """Yield location and record, or location and error, of a file."""
    suffix, is_compressed = _suffix(name)
    if suffix not in FORMATS:
        supported = ", ".join(FORMATS)
        raise UserError(f"dataset {name} ends in {suffix!r}; supported: {supported}, each also with .gz")
    with io.BytesIO(read_file(path)) if is_address(path) else open(path, "rb") as file:
        yield from FORMATS[suffix](name, decompressed(name, file) if is_compressed else file)
