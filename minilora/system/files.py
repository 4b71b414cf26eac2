"""Files that are written completely or not at all, JSON errors that name the position, and fingerprints."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from minilora.system.errors import UserError

MAX_JSON_BYTES = 64 << 20  # of a file that is read whole; the largest index of a model's shards has 10 MB
_MAX_DEPTH = 100  # of lists and objects within each other


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file. Raises UserError that names the file and the error in it.

    A file that names a field twice is refused: one program would read the first value, and another the last.
    """
    try:
        value = parse_json(read_text(Path(path), max_bytes), object_pairs_hook=_unique_fields)
        _check_depth(value)
        return value
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a regular file. A pipe would wait for its writer, and a device might never end."""
    if not path.is_file():
        raise UserError("not a regular file" if path.exists() else "missing")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= max_bytes else b""  # `read` takes all the memory it may need
    if max(size, len(data)) > max_bytes:
        raise UserError(f"larger than {max_bytes >> 20} MiB, the most that is read of such a file")
    return data.decode("utf-8-sig")  # programs on Windows put a byte order mark in front


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise UserError(f"ambiguous: it holds the field {name[:80]!r} twice")
    return fields


def _check_depth(value: Any) -> None:
    """Raise UserError for a value so deep that a function which walks it would run out of stack."""
    level = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for nodes in inner for child in nodes if isinstance(child, dict | list)]
    if level:
        raise UserError("nested too deeply")


def parse_json(text: str, **options: Any) -> Any:
    """The value of a JSON text. The text of its UserError completes "FILE is ...": "not valid JSON: ...".

    `options` are those of json.loads.
    """
    try:
        return json.loads(text, **options)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        raise UserError(f"not valid JSON: {error.msg}, {line}column {error.colno}") from error
    except RecursionError as error:
        raise UserError("nested too deeply") from error
    except ValueError as error:  # Python refuses numbers so long that they would take minutes to convert
        raise UserError("more than can be read: a whole number in it has over 4300 digits") from error


def read_json_lines(path: Path) -> list[Any]:
    """The value on each line of a JSON Lines file, without a last line that was not written completely.

    A process may be writing that line, or was killed while it did. Raises UserError for any other bad line.
    """
    values, lines = [], path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            values.append(parse_json(line.decode("utf-8")))
        except (UserError, UnicodeDecodeError) as error:
            if number < len(lines) or line.endswith(b"\n"):
                problem = error if isinstance(error, UserError) else f"not valid JSON: {error}"
                raise UserError(f"{path}, line {number} is {problem}") from error
    return values


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` that keeps every script readable, not only ASCII. `options` are those of json.dumps."""
    text = json.dumps(value, ensure_ascii=False, **options)
    # Half of a surrogate pair cannot be written as UTF-8, so it stays escaped.
    return json.dumps(value, **options) if re.search("[\ud800-\udfff]", text) else text


def write_whole(path: Path, data: bytes | str, private: bool = False) -> None:
    """Write a file under a temporary name and rename it, so that a kill or a full disk keeps the old file.

    A `private` file is for its owner's eyes only. Raises OSError as `open` and `write` do, with the file's
    name, and removes the incomplete file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if private:
                part.chmod(0o600)
            # A file's name may hold bytes that are no UTF-8. In a text about it they are written as escapes.
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # errors of `write` carry no file name
        raise
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the list of names in a directory, to disk."""
    if os.name == "nt":  # Windows cannot sync a file that is open for reading only.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(name: str, path: Path, parents: bool = False) -> None:
    """Raise UserError if a file could not be written later. Leaves nothing behind.

    `name` is the option that sets the path, such as "--output". With `parents`, missing directories above the
    file are allowed, because the caller will create them.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{name} {path} exists and is no file; choose another name")
    ancestors = path.absolute().parents
    parent = next(ancestor for ancestor in ancestors if ancestor.exists()) if parents else ancestors[0]
    try:
        # Permission bits do not tell: root has all of them, even on a read-only disk.
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{name} {path}: cannot write to {parent} ({error.strerror})") from error


def make_folder(name: str, folder: Path) -> None:
    """Make a folder and those above it. Raises UserError naming the option `name` if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{name} {folder} cannot be created ({error.strerror}): name another folder"
        raise UserError(message) from error


def check_picture(name: str, path: Path) -> None:
    """Raise UserError if a picture could not be written later, or would replace what is no picture."""
    check_writable(name, path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{name} {path}: pictures are PNG files; choose a name that ends in .png")


def check_page(name: str, path: Path) -> None:
    """Raise UserError if a page could not be written later, or would replace what is no page."""
    check_writable(name, path)
    if path.suffix.lower() != ".html":
        raise UserError(f"{name} {path}: pages are HTML files; choose a name that ends in .html")


def refuse_overwrite(name: str, path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UserError if a file or directory to be written is one that is read, under whatever name."""
    for read in inputs:
        if os.path.exists(path) and os.path.exists(read) and os.path.samefile(path, read):
            raise UserError(f"{name} {path} would overwrite {read}, which is read; choose another name")


def fingerprint(chunks: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits that identify a sequence of byte strings, including where each one ends."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()[:12]
