"""Files that appear whole or not at all, JSON that says where it is broken, and a fingerprint to tell
contents apart.
"""

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
    """The contents of a JSON file. Raises UserError naming the file and what is wrong with it."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises UserError with what the text is instead: "not valid JSON: ..."."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        raise UserError(f"not valid JSON: {error.msg}, {line}column {error.colno}") from error
    except RecursionError as error:
        raise UserError("nested too deeply") from error
    except ValueError as error:  # Python's guard against numbers that take ages to read
        raise UserError("more than can be read: a whole number in it has over 4300 digits") from error


def to_json(value: Any, **options: Any) -> str:
    """JSON that is readable in every script; half a surrogate pair, which has no UTF-8, stays escaped.
    options: of json.dumps.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return json.dumps(value, **options) if re.search("[\ud800-\udfff]", text) else text


def read_json_lines(path: Path) -> list[Any]:
    """What stands on each line of a JSON Lines file, but for a last line that is being written, or was when
    its writer was killed.

    Raises UserError naming the line that is no JSON.
    """
    values, lines = [], path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
    return values


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a passing name and rename it when it is complete, so that a kill or a full disk
    leaves the old one.

    Raises OSError as `open` and `write` do, with the file's name; what was written so far is then removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # `write` names none
        raise
    finally:
        part.unlink(missing_ok=True)


def check_writable(name: str, path: Path, parents: bool = False) -> None:
    """Find out whether a file can be written, before the work is done that it is for. Nothing stays behind.

    name: of the option that says so, as in "--output". parents: whether directories above the file will be
    made where they are missing. Raises UserError.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{name} {path} exists and is no file; choose another name")
    above = path.absolute().parents
    parent = next(place for place in above if place.exists()) if parents else above[0]
    try:
        with TemporaryFile(
            dir=parent
        ):  # permissions alone do not tell: root has all of them, on a read-only disk too
            pass
    except OSError as error:
        raise UserError(
            f"{name} {path}: {parent} is no directory that may be written ({error.strerror})"
        ) from error


def fingerprint(chunks: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits that stand for a sequence of bytes strings."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little") + chunk)
    return digest.hexdigest()[:12]
