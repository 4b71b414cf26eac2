"""What a terminal shows: text of strangers, which steers nothing, on a console of any encoding; and how far
long work has come.

A model's answer, a row of a dataset or the name of a tensor may hold control characters. They move the
cursor, change colours, or turn the direction of the text around, so that a reader sees something else than is
there. Half a surrogate pair cannot be printed at all.

A code page of Windows, or an ASCII console, lacks most characters, and Python's print raises an error for
them. Python writes such characters to stderr as escapes, and scripts write them to stdout in the same way.
Unlike a question mark, an escape says which character it was.
"""

import io
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

# Control characters but tab and line end, line separators, changes of direction, halves of surrogate pairs.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_what_the_console_lacks() -> None:
    """From now on, print writes a character that stdout's encoding lacks as an escape, such as \\u6570."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is None without a console
        sys.stdout.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """The text of an answer or a row in any script, with escapes for what would steer a terminal."""
    return _STEERING.sub(lambda match: _escaped(match[0]), text)


def printable(text: str) -> str:
    """A text in a message: everything that has no shape of its own is written as an escape, line ends too."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def progress_bar(total: int, unit: str, label: str, shown: bool = True) -> "tqdm":
    """A bar on stderr for work that takes longer than a moment; none where stderr is no terminal."""
    from tqdm import tqdm  # here, since every script imports this module before it answers --help

    return tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        leave=False,
        delay=1,
        smoothing=0,
        miniters=0,
        disable=not shown or None,
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
