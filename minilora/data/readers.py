"""From a dataset's name to its records: data files of the common formats, on this machine or elsewhere.

    data.jsonl, .json, .csv, .tsv, .parquet, .txt       a file, or data.jsonl.gz, compressed
    https://host/data.jsonl                             a file on a web server
    s3://bucket/data.csv, hf://datasets/owner/name/f    a file in a storage that fsspec knows
    owner/name, owner/name/folder                       a dataset on the Hugging Face hub, downloaded once,
                                                        then read from the cache

Of a hub dataset, the training files are read, or all files if none is named so; and one format only, the
first it has of .jsonl, .parquet, .csv, .tsv, .json, .txt.

A record is a dict of columns. Its location, "data.jsonl, line 3", comes with it, for error messages. What a
pipe or a device would hold, /dev/zero for example, is not read: only files are.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from minilora.data.file_formats import FORMATS, decompressed
from minilora.system.errors import UserError, raise_error
from minilora.system.redaction import Address, is_address
from minilora.system.remote import error_kind, read_file

Record = tuple[str, dict]  # its location, its columns
# The formats of a hub dataset, the least likely to hold anything but rows first.
_HUB_FORMATS = [".jsonl", ".parquet", ".csv", ".tsv", ".json", ".txt"]
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
    if os.path.isdir(dataset):  # the methods of Path raise for a name that is too long
        raise UserError(f"dataset {dataset} is a directory; name a {', '.join(FORMATS)} file in it")
    if os.path.isfile(dataset):
        return [(dataset, dataset)]
    if os.path.exists(dataset):
        raise UserError(
            f"dataset {dataset} is no file, but a pipe or a device; write its contents into a file"
        )
    if _suffix(dataset)[0] not in FORMATS and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", dataset):
        return _find_hub_files(dataset)
    raise UserError(f"dataset {dataset} does not exist")


def _find_hub_files(dataset: str) -> list[tuple[str, str]]:
    """Return names and local paths of the files of a hub dataset, downloaded if the cache lacks them."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    owner, name, *folders = dataset.split("/")
    repo_id, folder = f"{owner}/{name}", "/".join(folders)
    try:
        chosen = _choose_files(_list_hub_files(repo_id), repo_id, folder)
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
        cached = Path(snapshot)
        return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]


def _choose_files(names: list[str], repo_id: str, folder: str) -> list[str]:
    """Return the training files of a hub dataset, all of one format.

    `folder` narrows them to the files in it, or to files whose name begins with it: "data/test" is the folder
    data/test and the files data/test-0.jsonl, data/test.jsonl.
    """
    names = [name for name in sorted(names) if _suffix(name)[0] in FORMATS and not _NOT_DATA.fullmatch(name)]
    if folder:
        names = [name for name in names if re.fullmatch(rf"{re.escape(folder)}(/.*|[-.][^/]*)", name)]
    names = [name for name in names if re.search(r"(^|[/_.-])train", name)] or names
    if not names:
        where = f" in {folder}" if folder else ""
        raise UserError(f"dataset {repo_id}: no {', '.join(FORMATS)} file is there{where}")
    _refuse_several_folders(names, repo_id)
    first = min(map(_suffix, names), key=lambda suffix: (_HUB_FORMATS.index(suffix[0]), suffix[1]))
    return [name for name in names if _suffix(name) == first]


def _refuse_several_folders(names: list[str], repo_id: str) -> None:
    """Raise UserError, with a choice to make, if the files lie in several folders: each is a dataset then."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    if len(folders) == 1:
        return
    listed = ", ".join(folder or "no folder" for folder in folders)
    example = next(folder for folder in folders if folder)
    advice = f"choose one, as in {repo_id}/{example}"
    if outside := [name for name in names if "/" not in name]:
        advice += f"; or a file outside of the folders, as in hf://datasets/{repo_id}/{outside[0]}"
    raise UserError(f"dataset {repo_id} holds several, in {listed}; {advice}")


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
