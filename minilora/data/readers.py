"""From a dataset's name to its records: data files of the common formats, on this machine or elsewhere.

    data.jsonl, .json, .csv, .tsv, .parquet, .txt       a file, or data.jsonl.gz, compressed
    https://host/data.jsonl                             a file on a web server
    s3://bucket/data.csv, hf://datasets/owner/name/f    a file in a storage that fsspec knows
    owner/name, owner/name/folder                       a dataset on the Hugging Face hub, downloaded once,
                                                        then read from the cache

Of a hub dataset, the training files are read, or all files if none is named so; and one format only, the
first it has of .jsonl, .parquet, .csv, .tsv, .json, .txt.

A record is a dict of columns. Its location, "data.jsonl, line 3", comes with it, for error messages.
"""

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from minilora.system.errors import UserError, raise_error
from minilora.system.files import parse_json
from minilora.system.redaction import Address, is_address
from minilora.system.remote import error_kind, read_file

Record = tuple[str, dict]  # its location, its columns
# The formats of a hub dataset, the least likely to hold anything but rows first.
_HUB_FORMATS = [".jsonl", ".parquet", ".csv", ".tsv", ".json", ".txt"]
# JSON files that the datasets library writes beside its data.
_NOT_DATA = re.compile(r"(.*/)?(dataset_(infos?|dict)|state)\.json")


def read_records(dataset: str | Path, on_error: Callable[[UserError], None] = raise_error) -> list[Record]:
    """Return all records of a file, an address or a hub dataset.

    Raises UserError with the file and the line. For single wrong records, `on_error` is called, and the
    record is left out if it returns.
    """
    dataset, errors = dataset if isinstance(dataset, str) else str(dataset), []
    records = [record for name, path in _find_files(dataset) for record in _read_file(name, path, errors)]
    for error in errors:
        on_error(error)
    if not records and not errors:
        raise UserError(f"dataset {dataset} is empty")
    return records


# ---- from a dataset to its files ----


def _find_files(dataset: str) -> list[tuple[str, str]]:
    """Return the name of each file, for messages, and its path or address."""
    if is_address(dataset):
        return [(str(Address(dataset)), dataset)]
    if os.path.isdir(dataset):  # the methods of Path raise for a name that is too long
        raise UserError(f"dataset {dataset} is a directory; name a {', '.join(_FORMATS)} file in it")
    if os.path.exists(dataset):
        return [(dataset, dataset)]
    if _suffix(dataset)[0] not in _FORMATS and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", dataset):
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
    names = [name for name in sorted(names) if _suffix(name)[0] in _FORMATS and not _NOT_DATA.fullmatch(name)]
    if folder:
        names = [name for name in names if re.fullmatch(rf"{re.escape(folder)}(/.*|[-.][^/]*)", name)]
    names = [name for name in names if re.search(r"(^|[/_.-])train", name)] or names
    if not names:
        where = f" in {folder}" if folder else ""
        raise UserError(f"dataset {repo_id}: no {', '.join(_FORMATS)} file is there{where}")
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


def _read_file(name: str, path: str, errors: list[UserError]) -> Iterator[Record]:
    """Yield the records of a file. The errors of wrong records are appended to `errors`."""
    suffix, is_compressed = _suffix(name)
    if suffix not in _FORMATS:
        supported = ", ".join(_FORMATS)
        raise UserError(f"dataset {name} ends in {suffix!r}; supported: {supported}, each also with .gz")
    data = read_file(path) if is_address(path) else Path(path).read_bytes()
    if is_compressed:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"dataset {name} is not a whole gzip file: {error}") from error
    for location, record in _FORMATS[suffix](name, data):
        if isinstance(record, UserError):
            errors.append(record)
        elif not isinstance(record, dict):
            found = type(record).__name__
            errors.append(UserError(f"{location}: expected an object with columns, found {found}"))
        else:
            yield location, record


# ---- formats: each parser yields (location, record), or (location, UserError) for a wrong record ----

Parsed = Iterator[tuple[str, object]]


def _parse_jsonl(name: str, data: bytes) -> Parsed:
    for number, line in enumerate(_decode(name, data).split("\n"), start=1):
        if line.strip():
            location = f"{name}, line {number}"
            try:
                yield location, parse_json(line)
            except UserError as error:
                yield location, UserError(f"{location}: {error}")


def _parse_json(name: str, data: bytes) -> Parsed:
    """Parse a list of objects; or an object that holds one list, {"data": [...]}; or an object per line."""
    text = _decode(name, data)
    first_line = text.strip().partition("\n")[0].strip()
    if not first_line or (first_line[0], first_line[-1]) == ("{", "}"):
        yield from _parse_jsonl(name, data)  # many files that are called .json are JSON lines
        return
    try:
        value = parse_json(text)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if isinstance(value, dict):
        key = _find_list(name, value)
        name, value = f"{name}, {key}", value[key]
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list of objects, found {type(value).__name__}")
    for i, record in enumerate(value, start=1):
        yield f"{name}, item {i}", record


def _find_list(name: str, value: dict) -> str:
    """Return the only key whose value is a list of objects, not an empty one."""
    lists = [key for key, entries in value.items() if isinstance(entries, list)]
    full = [key for key in lists if value[key] and all(isinstance(entry, dict) for entry in value[key])]
    if len(full) != 1:
        found = f"lists lie under {', '.join(lists)}" if lists else "there is no list in it"
        raise UserError(
            f"{name} is an object and should hold one list of objects; {found}; "
            "write that list into a file by itself"
        )
    return full[0]


def _parse_csv(name: str, data: bytes, delimiter: str = ",") -> Parsed:
    csv.field_size_limit(1 << 30)  # for all readers of this process; the default refuses cells over 128 KiB
    text = io.StringIO(_decode(name, data), newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    line = 1  # the last line of the record before
    try:
        for record in reader:
            location, line = f"{name}, line {line + 1}", reader.line_num
            if None in record:  # csv puts the cells behind the last column here
                message = "more cells than the header has columns; put cells with a comma in quotes"
                yield location, UserError(f"{location}: {message}")
            else:
                yield location, {column: cell for column, cell in record.items() if cell is not None}
    except csv.Error as error:
        raise UserError(f"{name}, line {line + 1}: not valid CSV: {error}") from error


def _parse_tsv(name: str, data: bytes) -> Parsed:
    return _parse_csv(name, data, delimiter="\t")


def _parse_parquet(name: str, data: bytes) -> Parsed:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"dataset {name}: Parquet needs a package that is missing: pip install 'minilora[parquet]'"
        ) from error
    try:
        records = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        message = " ".join(str(error).split())
        raise UserError(f"dataset {name} is not a whole Parquet file: {message}") from error
    for i, record in enumerate(records, start=1):
        yield f"{name}, row {i}", record


def _parse_txt(name: str, data: bytes) -> Parsed:
    """Parse documents with blank lines between them."""
    text = re.sub(r"\r\n?", "\n", _decode(name, data))
    documents = [part for part in re.split(r"\n(?:[^\S\n]*\n)+", text) if part.strip()]
    for i, document in enumerate(documents, start=1):
        yield f"{name}, document {i}", {"text": document.strip("\n")}


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


_FORMATS: dict[str, Callable[[str, bytes], Parsed]] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
    ".parquet": _parse_parquet,
    ".txt": _parse_txt,
}
