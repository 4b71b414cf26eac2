"""From records to rows: one form for every dataset, whatever its columns are called.

    prompt, completion           other names with prompt_column and completion_column; both may be lists of
                                 messages (TRL's form), of which the completion's are learned
    instruction, input, output   Stanford Alpaca's form; `input` may be empty or absent. Dolly's names for the
                                 last two are context and response. LLaMA-Factory adds `history`, a list of
                                 [question, answer]. Other names with columns, instruction=task,...
    messages, conversations      a list of messages, in all the forms of `messages.py`; another name with
                                 messages_column
    text                         every token is learned; another name with text_column

A column `system` or `system_prompt` may stand beside all but text. Every other column is not read, and
`unread` says which hold something.

The first record decides the form of a dataset, and every other record must have it too. A dataset may have
the columns of several forms. Then the column names that the settings give decide; without such names, the
first of Alpaca's form, prompt and completion, messages, conversations, text.

A row holds no wording: that is the template's. Where a template words the rows, a prompt is a question to the
assistant. Without one, a prompt is used as it is written; messages and instructions need one.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from minilora.data.file_formats import list_columns
from minilora.data.messages import (
    TOOLS,
    Message,
    describe_fault,
    message,
    read_messages,
    refuse_tools,
    text_of,
)
from minilora.data.readers import each_record
from minilora.system.errors import UserError, raise_error

MOST_ERRORS = 100_000  # wrong records of a dataset, each kept with its message
_SYSTEM = ("system", "system_prompt")
_INPUT, _OUTPUT = ("input", "context"), ("output", "response")
RENAMED = ("instruction", "input", "output", "system", "history")  # columns that may have other names


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text, before any template has worded it."""

    prompt: str | None  # None: the completion is plain text, and all of it is learned
    completion: str
    # A conversation; its last message is the completion. None: there is nothing but prompt and completion.
    messages: tuple[Message, ...] | None = None
    location: str = field(default="", compare=False, repr=False)  # "data.jsonl, line 3"

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The row as messages, for a template. Plain text has none."""
        return self.messages or (message("user", self.prompt), message("assistant", self.completion))

    @property
    def is_instruction(self) -> bool:
        """Whether the row came in Alpaca's form, for which `alpaca` is the usual template."""
        return bool(self.messages) and any("instruction" in m for m in self.messages)


class ColumnNames(NamedTuple):
    """The columns of a dataset, where the settings name them."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None  # None: messages or conversations
    text: str = "text"
    # Other names of the columns of Alpaca's form, and of `system`: {"task": "instruction"}.
    renamed: Mapping[str, str] = MappingProxyType({})

    def apply(self, record: dict) -> dict:
        """Return a record with its `renamed` columns under their usual names, in place of those there."""
        usual = {self.renamed[column]: value for column, value in record.items() if column in self.renamed}
        rest = {column: value for column, value in record.items() if column not in self.renamed}
        return rest | usual if usual else record


_USUAL = ColumnNames()


class Form(NamedTuple):
    """How the records of a dataset become rows."""

    read: Callable[[str, dict], Row]  # location, record -> row
    columns: frozenset[str]  # that it reads


# ---- reading a dataset ----


def read_rows(
    dataset: str | Path,
    names: ColumnNames = _USUAL,
    on_error: Callable[[UserError], None] = raise_error,
    unread: dict[str, int] | None = None,
) -> list[Row]:
    """Return the rows of a file, an address or a hub dataset.

    Raises UserError with the file, the line or item, and the wrong column. For single wrong records,
    `on_error` is called, and the record is left out if it returns. `unread` receives the columns that hold
    something and are not read, with the number of their records.
    """
    on_error, form, rows = _limit_errors(str(dataset), on_error), None, []
    for location, given in each_record(dataset, on_error):
        record = names.apply(given)
        if form is None:
            form = _choose_form(location, record, names)
        for column, value in given.items() if unread is not None else ():
            usual = names.renamed.get(column, column)
            is_read = usual in form.columns and record[usual] is value
            if not is_read and value not in (None, "", [], {}):
                unread[column] = unread.get(column, 0) + 1
        try:
            rows.append(form.read(location, record))
        except UserError as error:
            on_error(error)
    return rows


def _limit_errors(dataset: str, on_error: Callable[[UserError], None]) -> Callable[[UserError], None]:
    """Return an `on_error` that gives up on a file in which nearly everything is wrong."""
    numbers = count(1)

    def report(error: UserError) -> None:
        on_error(error)
        if next(numbers) > MOST_ERRORS:
            raise UserError(f"dataset {dataset}: over {MOST_ERRORS:,} records are wrong, as {error}")

    return report


def files_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of the files that rows come from, each once."""
    return list(dict.fromkeys(row.location.rpartition(", ")[0] for row in rows))


def to_record(row: Row) -> dict[str, object]:
    """Return the record that `read_rows` reads as this row."""
    if row.messages is not None:
        return {"messages": list(row.messages)}
    if row.prompt is None:
        return {"text": row.completion}
    return {"prompt": row.prompt, "completion": row.completion}


def _choose_form(location: str, columns: Collection[str], names: ColumnNames) -> Form:
    """Return the form of records with these columns. Raises UserError if they have no known form."""
    has_pair = {names.prompt, names.completion} <= set(columns)
    pair = Form(
        lambda location, record: _read_pair(location, record, names.prompt, names.completion),
        frozenset((names.prompt, names.completion, *_SYSTEM)),
    )
    text = Form(
        lambda location, record: Row(None, text_of(location, record, names.text), location=location),
        frozenset((names.text,)),
    )
    # Columns that the settings name.
    if names.messages in columns:
        return _conversations(names.messages)
    if has_pair and (names.prompt, names.completion) != ("prompt", "completion"):
        return pair
    if names.text in columns and names.text != "text":
        return text
    # Columns with the usual names.
    if "instruction" in columns and any(name in columns for name in _OUTPUT):
        return Form(_read_alpaca, frozenset(("instruction", "history", *_INPUT, *_OUTPUT, *_SYSTEM)))
    if has_pair:
        return pair
    for column in ("messages", "conversations"):
        if column in columns:
            return _conversations(column)
    if names.text in columns:
        return text
    raise UserError(
        f"{location}: no columns {names.prompt} + {names.completion}, instruction + output, messages, "
        f"conversations or {names.text}; it has {list_columns(columns) or 'none'}; name yours with "
        "prompt_column and completion_column, with messages_column, or with text_column"
    )


def _conversations(column: str) -> Form:
    return Form(
        lambda location, record: _read_conversation(location, record, column),
        frozenset((column, *_SYSTEM, *TOOLS)),
    )


# ---- forms: each reader turns a record into a row ----


def _read_pair(location: str, record: dict, prompt_column: str, completion_column: str) -> Row:
    system = _system(location, record)
    if isinstance(record.get(prompt_column), list) and isinstance(record.get(completion_column), list):
        before = read_messages(location, record, prompt_column)
        before = [m | {"train": False} if m["role"] == "assistant" else m for m in before]
        return _row_of(location, [*system, *before, *read_messages(location, record, completion_column)])
    prompt, completion = (text_of(location, record, name) for name in (prompt_column, completion_column))
    if not system:
        return Row(prompt, completion, location=location)
    return _row_of(location, [*system, message("user", prompt), message("assistant", completion)])


def _read_alpaca(location: str, record: dict) -> Row:
    output = _one_of(location, record, _OUTPUT) or _OUTPUT[0]
    completion = text_of(location, record, output)
    return _row_of(location, [*alpaca_question(location, record), message("assistant", completion)])


def alpaca_question(location: str, record: dict) -> list[Message]:
    """Return a record of Alpaca's form, without its output, as a conversation: system, history, question.

    The question keeps its two parts, which the alpaca template prints apart.
    """
    instruction, column = text_of(location, record, "instruction"), _one_of(location, record, _INPUT)
    context = text_of(location, record, column) if column and record[column] else ""
    question = message("user", f"{instruction}\n{context}" if context else instruction)
    question |= {"instruction": instruction, "input": context}
    return [*_system(location, record), *_history(location, record), question]


def _one_of(location: str, record: dict, columns: Sequence[str]) -> str | None:
    """Return which of these columns holds something, or else which is there. Raises UserError for two."""
    full = [column for column in columns if record.get(column)]
    if len(full) > 1:
        raise UserError(f"{location}: {' and '.join(full)} both hold text; rename the one that is not meant")
    return next(iter([*full, *(column for column in columns if record.get(column) is not None)]), None)


def _system(location: str, record: dict) -> list[Message]:
    """Return the system message that a column of its own holds, or nothing."""
    column = _one_of(location, record, _SYSTEM)
    return [message("system", text_of(location, record, column))] if column and record[column] else []


def _history(location: str, record: dict) -> list[Message]:
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns
    ):
        fault = describe_fault(record, "history", "a list of [question, answer]")
        raise UserError(f"{location}: the column history {fault}")
    messages = []
    for question, answer in turns:
        messages += [message("user", question), message("assistant", answer)]
    return messages


def _read_conversation(location: str, record: dict, column: str) -> Row:
    refuse_tools(location, record, TOOLS)
    messages = read_messages(location, record, column)
    if not (messages and messages[0]["role"] == "system"):
        messages = _system(location, record) + messages
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing behind the last answer is learned
    return _row_of(location, messages)


def _row_of(location: str, messages: list[Message]) -> Row:
    """Return the row of a conversation that ends with an answer."""
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{location}: the conversation has no message of the assistant, so nothing to learn")
    questions = [m["content"] for m in messages if m["role"] == "user"]
    return Row(questions[-1] if questions else "", messages[-1]["content"], tuple(messages), location)


def parse_columns(columns: str | Sequence[str] | None) -> dict[str, str]:
    """Return {"task": "instruction", ...} of "instruction=task,output=solution", or of a list of entries.

    One column may have several other names, of which each dataset has one.
    """
    renamed: dict[str, str] = {}
    for entry in columns.split(",") if isinstance(columns, str) else columns or ():
        usual, _, other = (part.strip() for part in entry.partition("="))
        if usual not in RENAMED or not other:
            raise UserError(
                f"columns = {entry!r} must be NAME=COLUMN, where NAME is one of {', '.join(RENAMED)}"
            )
        if renamed.setdefault(other, usual) != usual:
            raise UserError(f"columns gives the column {other!r} two meanings, {renamed[other]} and {usual}")
    return renamed
