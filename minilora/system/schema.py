"""JSON that other people wrote, checked field by field against a table.

A table names the fields of a file: type, range, default, meaning. The values that a program reads, the one
line that refuses a wrong one, and the documentation in docs/config_fields.md all come from it.

    TABLE = {"hidden_size": Field(int, "width D of the model", required=True, low=1, high=1_000_000)}

    read_fields({"hidden_size": 64}, TABLE)      {"hidden_size": 64}
    read_fields({"hidden_size": 64.0}, TABLE)    UserError: hidden_size must be a whole number from 1 to
                                                 1,000,000, not 64.0

Nothing is coerced. The text "64" and 64.0 are no whole numbers. `true` is no number, although Python counts
it as 1. NaN and infinities are no numbers, although Python's json reads them. There is one conversion: where
a fraction is meant, 1000000 is read as 1000000.0, because JSON itself does not tell the two apart.

Upper limits lie far above every model that exists. They keep a file from asking for a petabyte.
"""

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.system.errors import UserError
from minilora.system.files import read_json

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}
_LISTS = {int: "whole numbers", float: "numbers", str: "texts", dict: "objects", list: "lists"}
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Field:
    """One field of a JSON object. `allowed` says in words what it may hold."""

    kinds: type | tuple[type, ...]  # bool, int, float, str, list, dict
    meaning: str
    default: Any = None  # of a field that is absent
    required: bool = False  # neither absent nor null
    nullable: bool = False  # null is a value of its own
    low: float | None = None  # of a number, or of each number in a list
    high: float | None = None
    above: float | None = None  # as `low`, without the bound itself
    below: float | None = None
    choices: tuple = ()
    items: type = str  # of a list
    longest: int = 100_000  # characters of a text, entries of a list
    one_line: bool = False  # a text without line ends and other control characters

    def allowed(self) -> str:
        """Everything that the field may hold, in words."""
        kinds = self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)
        kinds = [kind for kind in kinds if kind is not int or float not in kinds]
        words = [f"a list of {_LISTS[self.items]}" if kind is list else _KINDS[kind] for kind in kinds]
        choices = [
            str(choice).lower() if isinstance(choice, bool) else repr(choice) for choice in self.choices
        ]
        words = choices or [" or ".join(words) + self._range()]
        return " or ".join(words + ["null"] * self.nullable)

    def _range(self) -> str:
        parts = []
        if self.low is not None and self.high is not None:
            parts.append(f"from {self.low:,} to {self.high:,}")
        elif self.low is not None:
            parts.append(f"of at least {self.low:,}")
        if self.above is not None:
            parts.append(f"above {self.above:,}")
        if self.low is None and self.high is not None:
            parts.append(f"up to {self.high:,}")
        if self.below is not None:
            parts.append(f"below {self.below:,}")
        if self.one_line:
            parts.append(f"in one line of at most {self.longest:,} characters")
        return " " + " and ".join(parts) if parts else ""

    def read(self, name: str, value: Any) -> Any:
        """The value, as it is. Raises UserError that names the field and the value."""
        if value is None and self.nullable:
            return None
        if value is None and self.required:
            raise UserError(f"the key {name} is missing")
        kinds = self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)
        if float in kinds and int not in kinds:
            value = _as_fraction(value)
        if list in kinds and self.items is float and type(value) is list:
            value = [_as_fraction(item) for item in value]
        if type(value) not in kinds or not self._holds(value):
            raise UserError(f"{name} must be {self.allowed()}, not {shown(value)}")
        if self.choices and value not in self.choices:
            raise UserError(f"{name} = {shown(value)} is not supported; it must be {self.allowed()}")
        return value

    def _holds(self, value: Any) -> bool:
        """Whether a value of the right type is within the bounds."""
        if isinstance(value, str):
            return len(value) <= self.longest and (value.isprintable() or not self.one_line)
        if isinstance(value, list):
            right = all(type(item) is self.items for item in value) and len(value) <= self.longest
            return right and (self.items not in (int, float, str) or all(map(self._holds, value)))
        if isinstance(value, bool | dict):
            return True
        bounds = (
            self.low is None or self.low <= value,
            self.high is None or value <= self.high,
            self.above is None or self.above < value,
            self.below is None or value < self.below,
        )
        # NaN is never between two numbers. An infinity is allowed where the table names it as a bound.
        return all(bounds) and (-_LARGEST <= value <= _LARGEST or value == self.high)


def _as_fraction(value: Any) -> Any:
    """A whole number as a fraction, anything else as it is."""
    return float(value) if type(value) is int and abs(value) <= _LARGEST else value


def read_fields(raw: Any, table: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """The value of every field of the table: its own, or the default where `raw` has no such field.

    `prefix` stands before the names in messages: "rope_scaling.". Fields that the table does not name are the
    caller's to judge. Raises UserError for anything that the table does not allow.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.') or 'it'} must hold a JSON object, not {shown(raw)}")
    return {
        name: field.read(prefix + name, raw.get(name)) if name in raw or field.required else field.default
        for name, field in table.items()
    }


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a file that holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value for a message: its repr, cut at 80 characters, whatever its size and depth."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def shown_name(name: str) -> str:
    """The name of a field for a message. A name that nobody would choose is quoted and cut."""
    return name if len(name) <= 80 and name.isprintable() else shown(name)
