"""From a place to records: data files of the common formats, on this machine or elsewhere.

    data.jsonl, .json, .csv, .tsv, .parquet, .txt       a file; data.jsonl.gz: compressed
    https://host/data.jsonl                             a file on a web server
    s3://bucket/data.csv, hf://datasets/owner/name/f    a file in whatever fsspec knows; see `minilora.system.remote`
    owner/name, owner/name/folder                       a dataset on the Hugging Face hub: its training files, or all where none is
                                                        called so, in one format, the first of those that it
                                                        has: .jsonl, .parquet, .csv, .tsv, .json, .txt;
                                                        downloaded once, then taken from the cache

A record is a dict of columns. Its place, "data.jsonl, line 3", goes with it, for whoever finds a fault in it.
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
from minilora.system.remote import error_kind, is_address, read_file, redacted

Record = tuple[str, dict]  # its place, its columns
_PREFERRED = [
    ".jsonl",
    ".parquet",
    ".csv",
    ".tsv",
    ".json",
    ".txt",
]  # what is least likely to be something else goes first
_NOT_DATA = re.compile(
    r"(.*/)?(dataset_(infos?|dict)|state)\.json"
)  # what the datasets library keeps beside its files


def read_records(place: str | Path, on_error: Callable[[UserError], None] = raise_error) -> list[Record]:
    """All records of a file, an address or a hub dataset. Raises UserError with the place and the line of
    what is wrong.

    Where single records are wrong, `on_error` may do something else; they are left out.
    """
    place, faults = str(place), []
    records = [record for name, file in _files(place) for record in _parse(name, file, faults)]
    for fault in faults:
        on_error(fault)
    if not records and not faults:
        raise UserError(f"dataset {redacted(place)} is empty")
    return records


# ---- places ----------------------------------------------------------------------------------------------------------------


def _files(place: str) -> list[tuple[str, str]]:
    """The files at a place: what to call each one, and where it is."""
    if is_address(place):
        return [(redacted(place), place)]
    if os.path.isdir(place):  # Path's own methods raise for a name that is too long
        raise UserError(f"dataset {place} is a directory; name a {', '.join(_FORMATS)} file in it")
    if not os.path.exists(place):
        if _suffix(place)[0] not in _FORMATS and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", place):
            return _hub_files(place)
        raise UserError(f"dataset {place} does not exist")
    return [(place, place)]


def _hub_files(dataset: str) -> list[tuple[str, str]]:
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo_id, folder = "/".join(dataset.split("/")[:2]), "/".join(dataset.split("/")[2:])
    try:
        try:
            names = huggingface_hub.HfApi().list_repo_files(repo_id, repo_type="dataset")
        except errors.OfflineModeIsEnabled:
            cached = Path(
                huggingface_hub.snapshot_download(repo_id, repo_type="dataset", local_files_only=True)
            )
            names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        chosen = _choose(names, repo_id, folder)
        paths = [huggingface_hub.hf_hub_download(repo_id, name, repo_type="dataset") for name in chosen]
    except errors.RepositoryNotFoundError as error:  # gated ones too
        mend = "correct the name; if it is private or gated, ask for access on its page and log in with `hf auth login`"
        raise UserError(
            f"{repo_id!r} is neither a file here nor a dataset at {constants.ENDPOINT}: {mend}"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(
            f"dataset {dataset} does not exist, nor can it be a hub id, which is owner/name"
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"dataset {repo_id} cannot be fetched from {constants.ENDPOINT}: {error_kind(error)}"
        ) from error
    return [(f"{repo_id}/{name}", path) for name, path in zip(chosen, paths, strict=True)]


def _choose(names: list[str], repo_id: str, folder: str) -> list[str]:
    """The training files in a folder of a dataset repository, or those that begin with its name; of several
    formats one.
    """
    names = [name for name in sorted(names) if _suffix(name)[0] in _FORMATS and not _NOT_DATA.fullmatch(name)]
    names = [
        name for name in names if re.fullmatch(rf"{re.escape(folder)}(/.*|[-.][^/]*)", name) or not folder
    ]
    names = [name for name in names if re.search(r"(^|[/_.-])train", name)] or names
    if not names:
        raise UserError(
            f"dataset {repo_id}: no {', '.join(_FORMATS)} file is there" + (f" in {folder}" if folder else "")
        )
    folders = sorted({name.rpartition("/")[0] for name in names})
    if len(folders) > 1:
        first = next(name for name in folders if name)
        beside = [
            f"; or a file beside the folders, as in hf://datasets/{repo_id}/{name}"
            for name in names
            if "/" not in name
        ]
        found = ", ".join(name or "no folder" for name in folders)
        raise UserError(
            f"dataset {repo_id} holds several, in {found}; choose one, as in {repo_id}/{first}{''.join(beside[:1])}"
        )
    first = min(map(_suffix, names), key=lambda kind: (_PREFERRED.index(kind[0]), kind[1]))
    return [name for name in names if _suffix(name) == first]


def _suffix(place: str) -> tuple[str, bool]:
    """The format's suffix, and whether the file is compressed."""
    path = PurePosixPath(redacted(place))
    return (PurePosixPath(path.stem).suffix, True) if path.suffix == ".gz" else (path.suffix, False)


# ---- formats: each gives what stands at every place of a file, or the UserError that stands there instead -------------------


def _parse(name: str, file: str, faults: list[UserError]) -> Iterator[Record]:
    suffix, compressed = _suffix(name)
    if suffix not in _FORMATS:
        raise UserError(
            f"dataset {name} ends in {suffix!r}; supported: {', '.join(_FORMATS)}, and .gz behind them"
        )
    data = read_file(file) if is_address(file) else Path(file).read_bytes()
    if compressed:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"dataset {name} is not a whole gzip file: {error}") from error
    for place, record in _FORMATS[suffix](name, data):
        if isinstance(record, UserError):
            faults.append(record)
        elif not isinstance(record, dict):
            faults.append(
                UserError(f"{place}: expected an object with columns, found {type(record).__name__}")
            )
        else:
            yield place, record


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _jsonl(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_text(name, data).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{name}, line {number}", parse_json(line)
            except UserError as error:
                yield f"{name}, line {number}", UserError(f"{name}, line {number}: {error}")


def _json(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    """A list of objects; or an object that holds one such list, {"data": [...]}; or, as many do, one object a
    line.
    """
    text = _text(name, data)
    first = text.strip().partition("\n")[0].strip()
    if not first or (first[0], first[-1]) == ("{", "}"):
        yield from _jsonl(name, data)
        return
    try:
        records, key = parse_json(text), ""
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if isinstance(records, dict):
        lists = [key for key, value in records.items() if isinstance(value, list)]
        full = [
            key for key in lists if records[key] and all(isinstance(entry, dict) for entry in records[key])
        ]
        if len(full) != 1:
            found = f"lists lie under {', '.join(lists)}" if lists else "there is no list in it"
            raise UserError(
                f"{name} is an object and should hold one list of objects; {found}; write that list into a file of its own"
            )
        records, key = records[full[0]], f", {full[0]}"
    if not isinstance(records, list):
        raise UserError(f"{name}: expected a list of objects, found {type(records).__name__}")
    yield from ((f"{name}{key}, item {i}", record) for i, record in enumerate(records, start=1))


def _csv(name: str, data: bytes, delimiter: str = ",") -> Iterator[tuple[str, object]]:
    csv.field_size_limit(1 << 30)  # of all readers in this process; the default refuses cells of 128 KiB
    reader = csv.DictReader(io.StringIO(_text(name, data), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            line, place = reader.line_num, f"{name}, line {line + 1}"
            if None in record:
                yield (
                    place,
                    UserError(f"{place}: more cells than the header has columns; is a comma not in quotes?"),
                )
                continue
            yield place, {column: cell for column, cell in record.items() if cell is not None}
    except csv.Error as error:
        raise UserError(f"{name}, line {line + 1}: not valid CSV: {error}") from error


def _tsv(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    return _csv(name, data, delimiter="\t")


def _parquet(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"dataset {name}: Parquet needs a package that is missing: pip install 'minilora[parquet]'"
        ) from error
    try:
        records = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # bytes that are no text are a ValueError
        raise UserError(
            f"dataset {name} is not a whole Parquet file: {' '.join(str(error).split())}"
        ) from error
    yield from ((f"{name}, row {i}", record) for i, record in enumerate(records, start=1))


def _txt(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    """Documents between blank lines."""
    text = re.sub(r"\r\n?", "\n", _text(name, data))
    documents = (
        document.strip("\n") for document in re.split(r"\n(?:[^\S\n]*\n)+", text) if document.strip()
    )
    yield from (
        (f"{name}, document {i}", {"text": document}) for i, document in enumerate(documents, start=1)
    )


_FORMATS: dict[str, Callable[[str, bytes], Iterator[tuple[str, object]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _txt,
}
