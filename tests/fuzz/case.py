"""An entry of the table: a command line, the files that it meets, and what the error has to name."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def nothing() -> None:
    """The files stay as `place.py` made them."""


@dataclass(frozen=True)
class Case:
    """One mistake. `change` edits the files first, with their folder as the working directory."""

    kind: str  # the heading in the table of figures
    name: str  # what is wrong, in a few words; unique within its kind
    command: tuple[str, ...]  # a script and its arguments
    # Words that the error line must contain: the value or the place. "a|b": one of these.
    names: tuple[str, ...]
    change: Callable[[], object] = nothing
    environment: Mapping[str, str] = field(default_factory=dict)
    secret: str | None = None  # a credential that no output may show
    code: int = 2  # the exit code: 0 for a control, 1 for findings of lint_adapter
    remarks: bool = False  # whether lines of stderr may precede the error: prepare.py lists wrong rows there
    descriptors: int | None = None  # how many files may be open at once
    file_size: int | None = None  # bytes that a file may have: a full disk
    encoding: str = "utf-8"  # of the console
    shows: tuple[str, ...] = ()  # texts that stdout must contain

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


def make_case(
    kind: str, name: str, command: str | list[str | bytes], names: str | tuple[str, ...], **more: object
) -> Case:
    """A case whose command is one text, split at its blanks, or a list of words."""
    words = command.split() if isinstance(command, str) else map(os.fsdecode, command)
    return Case(kind, name, tuple(words), (names,) if isinstance(names, str) else names, **more)
