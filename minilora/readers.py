"""From a place to records: data files of the common formats, on this machine or elsewhere.

    data.jsonl, .json, .csv, .tsv, .parquet, .txt       a file; data.jsonl.gz: compressed
    https://host/data.jsonl                             a file on a web server, read by Python's own client
    s3://bucket/data.csv, hf://datasets/owner/name/f    a file in whatever fsspec knows
    owner/name, owner/name/folder                       a dataset on the Hugging Face hub: its training files, or all where none is
                                                        called so; downloaded once, then taken from the cache

A record is a dict of columns. Its place, "data.jsonl, line 3", goes with it, for whoever finds a fault in it. An address may hold a
password or a signature, so places are shown without them.
"""

import csv
import gzip
import http.client
import io
import json
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from minilora.errors import UserError

Record = tuple[str, dict]  # its place, its columns
_NOT_DATA = re.compile(r"(.*/)?(dataset_(infos?|dict)|state)\.json")  # what the datasets library keeps beside its files


def read_records(place: str | Path) -> list[Record]:
    """All records of a file, an address or a hub dataset. Raises UserError with the place and the line of what is wrong."""
    place = str(place)
    records = [record for name, file in _files(place) for record in _parse(name, file)]
    if not records:
        raise UserError(f"dataset {_shown(place)} is empty")
    return records


# ---- places ----------------------------------------------------------------------------------------------------------------


def _files(place: str) -> list[tuple[str, str]]:
    """The files at a place: what to call each one, and where it is."""
    if "://" in place:
        return [(_shown(place), place)]
    if Path(place).is_dir():
        raise UserError(f"dataset {place} is a directory; name a {', '.join(_FORMATS)} file in it")
    if not Path(place).exists():
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
            cached = Path(huggingface_hub.snapshot_download(repo_id, repo_type="dataset", local_files_only=True))
            names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        chosen = _choose(names, repo_id, folder)
        paths = [huggingface_hub.hf_hub_download(repo_id, name, repo_type="dataset") for name in chosen]
    except errors.RepositoryNotFoundError as error:  # gated ones too
        mend = "correct the name; if it is private or gated, ask for access on its page and log in with `hf auth login`"
        raise UserError(f"{repo_id!r} is neither a file here nor a dataset at {constants.ENDPOINT}: {mend}") from error
    except errors.HFValidationError as error:
        raise UserError(f"dataset {dataset} does not exist, nor can it be a hub id, which is owner/name") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(f"dataset {repo_id} cannot be fetched from {constants.ENDPOINT}: {_kind(error)}") from error
    return [(f"{repo_id}/{name}", path) for name, path in zip(chosen, paths, strict=True)]


def _choose(names: list[str], repo_id: str, folder: str) -> list[str]:
    """The training files in a folder of a dataset repository."""
    names = [name for name in sorted(names) if _suffix(name)[0] in _FORMATS and not _NOT_DATA.fullmatch(name)]
    names = [name for name in names if name.startswith(folder)]
    names = [name for name in names if re.search(r"(^|[/_.-])train", name)] or names
    if not names:
        raise UserError(f"dataset {repo_id}: no {', '.join(_FORMATS)} file is there" + (f" in {folder}" if folder else ""))
    folders = sorted({str(PurePosixPath(name).parent) for name in names})
    if len(folders) > 1:
        raise UserError(f"dataset {repo_id} holds several, in {', '.join(folders)}; choose one, as in {repo_id}/{folders[0]}")
    return names


def _read(name: str, place: str) -> bytes:
    if "://" not in place:
        return Path(place).read_bytes()
    scheme = place.partition("://")[0]
    try:
        if scheme in ("http", "https"):
            with urllib.request.urlopen(place, timeout=60) as answer:
                return answer.read()
        import fsspec

        with fsspec.open(place, "rb") as file:
            return file.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"dataset {name} cannot be read: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise UserError(
            f"dataset {name} cannot be read: {_kind(getattr(error, 'reason', error))}; is the address right?"
        ) from error
    except ImportError as error:
        mend = "pip install 'minilora[s3]'" if scheme == "s3" else " ".join(str(error).split())
        raise UserError(f"dataset {name}: a package for {scheme}:// is missing: {mend}") from error
    except FileNotFoundError as error:
        raise UserError(f"dataset {name} does not exist") from error
    except Exception as error:  # every file system has its own
        known = f"; {error}" if "Protocol not known" in str(error) else ""
        raise UserError(f"dataset {name} cannot be read: {_kind(error)}{known}") from error


def _kind(error: object) -> str:
    """An error without its text, which may hold what belongs to nobody else: headers, keys."""
    if not isinstance(error, Exception):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the answer is {status}" if status else getattr(error, "strerror", None) or type(error).__name__


def _shown(place: str) -> str:
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _suffix(place: str) -> tuple[str, bool]:
    """The format's suffix, and whether the file is compressed."""
    path = PurePosixPath(_shown(place))
    return (PurePosixPath(path.stem).suffix, True) if path.suffix == ".gz" else (path.suffix, False)


# ---- formats ---------------------------------------------------------------------------------------------------------------


def _parse(name: str, file: str) -> Iterator[Record]:
    suffix, compressed = _suffix(name)
    if suffix not in _FORMATS:
        raise UserError(f"dataset {name} ends in {suffix!r}; supported: {', '.join(_FORMATS)}, and .gz behind them")
    data = _read(name, file)
    if compressed:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"dataset {name} is not a whole gzip file: {error}") from error
    for place, record in _FORMATS[suffix](name, data):
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object with columns, found {type(record).__name__}")
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
                yield f"{name}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}, line {number}: not valid JSON: {error.msg}") from error


def _json(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    """A list of objects; or, as many do, one object a line."""
    text = _text(name, data)
    if not text.lstrip().startswith("["):
        yield from _jsonl(name, data)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}: not valid JSON: {error.msg}") from error
    yield from ((f"{name}, item {i}", record) for i, record in enumerate(records, start=1))


def _csv(name: str, data: bytes, delimiter: str = ",") -> Iterator[tuple[str, object]]:
    csv.field_size_limit(1 << 30)  # of all readers in this process; the default refuses cells of 128 KiB
    reader = csv.DictReader(io.StringIO(_text(name, data), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            line, place = reader.line_num, f"{name}, line {line + 1}"
            if None in record:
                raise UserError(f"{place}: more cells than the header has columns; is a comma not in quotes?")
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
        raise UserError(f"dataset {name}: Parquet needs a package that is missing: pip install 'minilora[parquet]'") from error
    try:
        records = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"dataset {name} is not a whole Parquet file: {' '.join(str(error).split())}") from error
    yield from ((f"{name}, row {i}", record) for i, record in enumerate(records, start=1))


def _txt(name: str, data: bytes) -> Iterator[tuple[str, object]]:
    """Documents between blank lines."""
    documents = (document.strip("\n") for document in _text(name, data).split("\n\n") if document.strip())
    yield from ((f"{name}, document {i}", {"text": document}) for i, document in enumerate(documents, start=1))


_FORMATS: dict[str, Callable[[str, bytes], Iterator[tuple[str, object]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _txt,
}
