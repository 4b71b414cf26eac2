"""A YAML file of settings, read within limits: whoever wrote the file, it is read in seconds or refused.

    100,000 bytes                 PyYAML reads about as many in a second
    20 levels, 100,000 values     with every alias written out: nine lines of [*a, *a, ...] are 10^9 values
    10,000 characters in a text   a number such as 1:59:59:... takes the square of its length to convert

Only plain values are accepted: text, numbers, true and false, dates, lists and mappings. A tag for anything
else, such as !!python/object or !!set, is an error. So is a key that is set twice: YAML alone would take the
last value.
"""

import datetime
import os
import re
from pathlib import Path

import yaml

from minilora.system.errors import UserError

LARGEST_FILE = 100_000
DEEPEST = 20
MOST_VALUES = 100_000
LONGEST_TEXT = 10_000
_PLAIN = (str, int, float, datetime.date, type(None))  # bool is an int, datetime a date
# Control characters, and halves of surrogate pairs, which cannot be written to a file.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGEST_BITS = 13_000  # Python prints no number of more than 4300 digits


def read_yaml(path: Path) -> dict:
    """The keys of a file, with underscores for hyphens. Raises UserError that names the file."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise UserError(f"config {path} {'is no file' if os.path.exists(path) else 'does not exist'}")
    with open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise UserError(f"config {path} is larger than {LARGEST_FILE:,} bytes; is it a file of settings?")
    try:
        return _parse(data.decode("utf-8"))
    except UserError as error:
        raise UserError(f"config {path} {error}") from error
    except RecursionError as error:
        raise UserError(f"config {path} is not valid YAML: it is nested too deeply") from error
    except Exception as error:  # PyYAML raises every type, a KeyError for `!!bool maybe`
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"config {path} is not valid YAML: {reason}") from error


def _parse(text: str) -> dict:
    """The keys of a text. The text of its UserError completes "config FILE ..."."""
    loader = yaml.SafeLoader(text)
    try:
        tree = loader.get_single_node()
        if not isinstance(tree, yaml.MappingNode):
            raise UserError("must hold `key: value` lines")
        _measure(tree, 0, {})
        values = loader.construct_document(tree)
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UserError("must hold `key: value` lines")
    for key, value in values.items():
        _check_plain(str(key), key)
        _check_plain(str(key), value)
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _measure(node: yaml.Node, level: int, measured: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node holds and how many levels, with every alias written out.

    `measured` are the nodes that were seen before, by id; a node that is not finished holds itself.
    """
    if id(node) not in measured:
        measured[id(node)] = (0, DEEPEST)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
            parts = [part for pair in parts for part in pair]
        elif isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_TEXT:
            raise UserError(f"holds a text of more than {LONGEST_TEXT:,} characters")
        sizes = [_measure(part, level + 1, measured) for part in parts]
        count = 1 + sum(count for count, _ in sizes)
        measured[id(node)] = count, max((height + 1 for _, height in sizes), default=0)
    count, height = measured[id(node)]
    if level + height > DEEPEST:
        raise UserError(f"is nested more than {DEEPEST} levels deep")
    if count > MOST_VALUES:
        raise UserError(f"holds more than {MOST_VALUES:,} values, with its aliases written out")
    return count, height


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = key.value.replace("-", "_")
            if name in seen:
                raise UserError(f"sets {name} twice; leave one of them out")
            seen.add(name)


def _check_plain(key: str, value: object) -> None:
    """Raise UserError if a value of this key is not plain, or could not be printed."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_plain(key, name)
            _check_plain(key, part)
    elif isinstance(value, list):
        for part in value:
            _check_plain(key, part)
    elif not isinstance(value, _PLAIN):
        raise UserError(f"holds a {type(value).__name__} at {key!r}, which no setting is")
    elif isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
        raise UserError(f"holds a number of too many digits at {key!r}")
    elif isinstance(value, str) and _UNPRINTABLE.search(value):
        raise UserError(f"holds a character that cannot be printed at {key!r}")
