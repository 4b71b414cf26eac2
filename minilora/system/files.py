"""Files that are written completely or not at all, JSON errors that name the position, and fingerprints."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from minilora.system.errors import UserError


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError that names the file and the error in it."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. The text of its UserError completes "FILE is ...": "not valid JSON: ..."."""
    try:
        return json.loads(text)
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
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
    return values


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` that keeps every script readable, not only ASCII. `options` are those of json.dumps."""
    text = json.dumps(value, ensure_ascii=False, **options)
    # Half of a surrogate pair cannot be written as UTF-8, so it stays escaped.
    return json.dumps(value, **options) if re.search("[\ud800-\udfff]", text) else text


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it, so that a kill or a full disk keeps the old file.

    Raises OSError as `open` and `write` do, with the file's name, and removes the incomplete file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
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


def fingerprint(chunks: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits that identify a sequence of byte strings, including where each one ends."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()[:12]
