"""The records of one data file, read piece by piece and within limits, whoever wrote it.

    a line                   268 million characters; a JSON document, a thousand million
    blank lines              a million, and ten for each line that is not blank
    .gz, .parquet, .arrow    200 times their own size, once they expand beyond 64 MiB
    JSON                     100 levels of lists and objects

Without them a few kilobytes that expand without end, or gigabytes of line ends, would take all memory or
hours. A file of any size that keeps to them is read, and memory holds its records and one line.

Each parser yields (location, record), or (location, UserError) for a wrong record. It raises UserError if the
file cannot be read any further.
"""

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

from minilora.system.errors import UserError
from minilora.system.files import parse_json

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Parsed = Iterator[tuple[str, object]]

LONGEST_LINE = 2**28  # characters
LONGEST_DOCUMENT = 2**30
LONGEST_CELL = 2**27  # of CSV; its parser needs four bytes a character
MOST_BLANK_LINES = 1_000_000
EXPANDS_FREELY = 2**26  # bytes
MOST_EXPANSION = 200
MOST_ROWS_A_BYTE = 10  # of Parquet, beyond a million rows
DEEPEST = 100
_BATCH = 256  # rows of Parquet that are decoded at once


# ---- lines -------------------------------------------------------------------------------------------------


def _lines(
    name: str, file: BinaryIO, newline: str | None = "\n", longest: int = LONGEST_LINE
) -> Iterator[str]:
    """Yield the lines of a file with their ends. `newline` says what ends a line, as for `open`."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    number, blank = 0, 0
    try:
        while line := text.readline(longest + 1):
            number += 1
            blank += line.isspace()
            if len(line) > longest:
                raise UserError(f"dataset {name}, line {number} has more than {longest:,} characters")
            if blank > MOST_BLANK_LINES + 10 * (number - blank):
                raise UserError(f"dataset {name}: {blank:,} of its first {number:,} lines are blank")
            yield line
    except UnicodeDecodeError as error:
        start = file.tell() - len(error.object) + error.start
        raise UserError(f"dataset {name} is not UTF-8 text: {error.reason} at byte {start}") from error
    finally:
        with suppress(ValueError):  # it is closed already
            text.detach()  # whoever opened the file closes it


# ---- JSON --------------------------------------------------------------------------------------------------


def _parse_jsonl(name: str, file: BinaryIO) -> Parsed:
    numbered = enumerate(_lines(name, file), start=1)
    number, line = next(((n, line) for n, line in numbered if not line.isspace()), (0, ""))
    if line.strip() == "[" or line.lstrip().startswith("[{"):
        raise UserError(
            f"dataset {name} holds one JSON list, not an object in every line: let its name end in .json"
        )
    return _parse_lines(name, chain([(number, line)], numbered) if line else ())


def _parse_lines(name: str, numbered: Iterable[tuple[int, str]]) -> Parsed:
    for number, line in numbered:
        if not line.isspace():
            location = f"{name}, line {number}"
            try:
                record = parse_json(line.removesuffix("\n"))
                if line.count("{") + line.count("[") > DEEPEST:
                    _check_depth(record)
                yield location, record
            except UserError as error:
                yield location, UserError(f"{location}: {error}")


def _parse_json(name: str, file: BinaryIO) -> Parsed:
    """Parse a list of objects; or an object that holds one list, {"data": [...]}; or an object per line."""
    numbered = enumerate(_lines(name, file, longest=LONGEST_DOCUMENT), start=1)
    number, line = next(((n, line) for n, line in numbered if not line.isspace()), (0, ""))
    if not line:
        return
    if line.strip()[0] == "{" and line.strip()[-1] == "}":  # many files that are called .json are JSON lines
        yield from _parse_lines(name, chain([(number, line)], numbered))
        return
    text = _join(name, "\n" * (number - 1) + line, (line for _, line in numbered))
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
        location = f"{name}, item {i}"
        try:
            _check_depth(record)
            yield location, record
        except UserError as error:
            yield location, UserError(f"{location}: {error}")


def _join(name: str, start: str, lines: Iterable[str]) -> str:
    document, length = io.StringIO(), 0
    for line in chain([start], lines):
        document.write(line)
        length += len(line)
        if length > LONGEST_DOCUMENT:
            raise UserError(
                f"dataset {name} has more than {LONGEST_DOCUMENT:,} characters; write an object per line "
                "into a .jsonl file, which may have any size"
            )
    return document.getvalue()


def _find_list(name: str, value: dict) -> str:
    """Return the only key whose value is a list of objects, not an empty one."""
    lists = [key for key, entries in value.items() if isinstance(entries, list)]
    full = [key for key in lists if value[key] and all(isinstance(entry, dict) for entry in value[key])]
    if len(full) != 1:
        found = f"lists lie under {list_columns(lists)}" if lists else "there is no list in it"
        raise UserError(
            f"{name} is an object and should hold one list of objects; {found}; "
            "write that list into a file by itself"
        )
    return full[0]


def _check_depth(value: object, levels: int = DEEPEST) -> None:
    """Raise UserError if a value cannot be written or shown again because lists lie in lists in lists."""
    if levels == 0:
        raise UserError("nested too deeply")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        if isinstance(part, (dict, list)):
            _check_depth(part, levels - 1)


def list_columns(names: Iterable[object], limit: int = 8) -> str:
    """Return the names of columns for a message, the first few of them and not in full length."""
    names = [str(name) for name in names]
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:limit]]
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(shown) + more


# ---- tables ------------------------------------------------------------------------------------------------


def _parse_csv(name: str, file: BinaryIO, delimiter: str = ",") -> Parsed:
    csv.field_size_limit(LONGEST_CELL)  # for all readers of this process; the default refuses 128 KiB
    reader = csv.DictReader(_lines(name, file, newline=""), delimiter=delimiter, strict=True)
    line = 1  # the last line of the record before
    try:
        _refuse_doubled(name, reader.fieldnames or ())
        for record in reader:
            location, line = f"{name}, line {line + 1}", reader.line_num
            if None in record:  # csv puts the cells behind the last column here
                message = "more cells than the header has columns; put cells with a comma in quotes"
                yield location, UserError(f"{location}: {message}")
            else:
                yield location, {column: cell for column, cell in record.items() if cell is not None}
    except csv.Error as error:
        raise UserError(f"{name}, line {line + 1}: not valid CSV: {error}") from error


def _refuse_doubled(name: str, columns: Iterable[str]) -> None:
    """Raise UserError for two columns of one name, of which a record would hold the last."""
    doubled = [column for column, times in Counter(columns).items() if times > 1 and column]
    if doubled:
        raise UserError(f"dataset {name} has two columns {doubled[0]!r}; rename or remove one of them")


def _parse_tsv(name: str, file: BinaryIO) -> Parsed:
    return _parse_csv(name, file, delimiter="\t")


# pyarrow's threads outlive the reading. A script that ends soon after it would abort in some runs, so both
# formats are read without them.


def _parse_parquet(name: str, file: BinaryIO) -> Parsed:
    def batches(source: BinaryIO, stored: int) -> Iterator["RecordBatch"]:
        from pyarrow import parquet

        table = parquet.ParquetFile(source, pre_buffer=False)
        rows = table.metadata.num_rows
        if rows > max(1_000_000, MOST_ROWS_A_BYTE * stored):
            raise UserError(f"dataset {name} claims {rows:,} rows in {stored:,} bytes")
        _refuse_doubled(name, table.schema_arrow.names)
        yield from table.iter_batches(_BATCH, use_threads=False)

    return _parse_batches(name, file, batches, "Parquet")


def _parse_arrow(name: str, file: BinaryIO) -> Parsed:
    """Parse what `datasets.save_to_disk` writes, a stream, and Arrow's other format, a file with an index."""

    def batches(source: BinaryIO, stored: int) -> Iterator["RecordBatch"]:
        from pyarrow import ipc

        options = ipc.IpcReadOptions(use_threads=False)
        source.seek(0)
        if source.read(6) == b"ARROW1":
            reader = ipc.open_file(source, options=options)
            whole = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            whole = reader = ipc.open_stream(source, options=options)
        _refuse_doubled(name, reader.schema.names)
        for batch in whole:
            yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))

    return _parse_batches(name, file, batches, "Arrow")


def _parse_batches(
    name: str, file: BinaryIO, batches: Callable[[BinaryIO, int], Iterator["RecordBatch"]], form: str
) -> Parsed:
    """Yield the rows of what pyarrow reads; `batches` returns that for a source and its size in bytes."""
    if find_spec("pyarrow") is None:
        raise UserError(
            f"dataset {name}: {form} needs a package that is missing: pip install 'minilora[parquet]'"
        )
    source = file if file.seekable() else io.BytesIO(file.read())
    stored, row, expanded = source.seek(0, io.SEEK_END), 0, 0
    try:
        for batch in batches(source, stored):
            expanded += batch.nbytes
            _refuse_expansion(name, stored, expanded)
            for record in batch.to_pylist():
                row += 1
                yield f"{name}, row {row}", record
    except UserError:
        raise
    except Exception as error:  # pyarrow raises every type for damaged files, and for types Python lacks
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"dataset {name} is not a whole {form} file: {message}") from error


# ---- plain text --------------------------------------------------------------------------------------------


def _parse_txt(name: str, file: BinaryIO) -> Parsed:
    """Parse documents with blank lines between them."""
    lines = _lines(name, file, newline=None)
    document, number = [next(lines, "")], 0  # a blank first line separates nothing
    for line in chain(lines, ["\n"]):
        if not line.isspace() or not line.endswith("\n"):
            document.append(line)
            continue
        text = "".join(document)
        document = []
        if text.strip():
            number += 1
            yield f"{name}, document {number}", {"text": text.strip("\n")}


FORMATS: dict[str, Callable[[str, BinaryIO], Parsed]] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
    ".parquet": _parse_parquet,
    ".txt": _parse_txt,
    ".arrow": _parse_arrow,
}


# ---- gzip --------------------------------------------------------------------------------------------------


def decompressed(name: str, file: BinaryIO) -> BinaryIO:
    """Return the contents of a gzip file. Reading raises UserError if it is damaged or expands too much."""
    return io.BufferedReader(_Decompressed(name, file))


class _Decompressed(io.RawIOBase):
    def __init__(self, name: str, file: BinaryIO):
        self._name, self._file, self._gzip, self._expanded = name, file, gzip.GzipFile(fileobj=file), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._expanded

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self._gzip.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"dataset {self._name} is not a whole gzip file: {error}") from error
        self._expanded += len(data)
        _refuse_expansion(self._name, self._file.tell(), self._expanded)
        buffer[: len(data)] = data
        return len(data)


def _refuse_expansion(name: str, stored: int, expanded: int) -> None:
    if expanded > max(EXPANDS_FREELY, MOST_EXPANSION * stored):
        raise UserError(
            f"dataset {name} expands to more than {MOST_EXPANSION} times its size; decompress it yourself"
        )
