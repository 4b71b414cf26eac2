"""From records to rows: one form for every dataset, whatever its columns are called.

    prompt, completion            other names with prompt_column and completion_column
    instruction, input, output    Stanford Alpaca's form; `input` may be empty or absent. LLaMA-Factory adds
                                  `system` and `history`, a list of [question, answer]
    messages                      a list of {"role": "user", "content": "Hi"}; system, user or assistant
    conversations                 ShareGPT's form, a list of {"from": "human", "value": "Hi"}; system, human
                                  or gpt. A list of either form may have another name, with messages_column
    text                          every token is learned

The first record decides the form of a dataset, and every other record must have it too. A dataset may have
the columns of several forms. Then the column names that the settings give decide; without such names, the
first of Alpaca's form, prompt and completion, messages, conversations, text.

With a chat template, prompts and instructions are questions to the assistant: conversations of two messages.
Without one, a prompt is used as written, and an instruction gets Alpaca's wording.

Tool calls are not supported. A row that calls tools or offers them is refused: without them, the rest of the
row would teach the model to answer nothing.

Several datasets can be joined. With weights, `a.jsonl:0.7,b.json:0.3`, they are mixed: 7 of 10 rows come from
the first one, and there are as many rows as possible without any row twice. The seed chooses which rows of
each dataset are used, once for the whole training.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from minilora.data.chat import Message
from minilora.data.file_formats import list_columns
from minilora.data.jinja_sandbox import render
from minilora.data.readers import each_record
from minilora.data.templates import TEMPLATES
from minilora.system.errors import UserError, raise_error
from minilora.system.redaction import hide_secrets, whole

MOST_ERRORS = 100_000  # wrong records of a dataset, each kept with its message
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text."""

    prompt: str | None  # None: the completion is plain text, and all of it is learned
    completion: str
    # The conversation, if a chat template writes the text of this row. Its last message is the completion.
    messages: tuple[Message, ...] | None = None
    location: str = field(default="", compare=False, repr=False)  # "data.jsonl, line 3"


RowReader = Callable[[str, dict], Row]  # location, record -> row


# ---- reading a dataset ----


def read_rows(
    dataset: str | Path,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str | None = None,
    chat: bool = False,
    on_error: Callable[[UserError], None] = raise_error,
) -> list[Row]:
    """Return the rows of a file, an address or a hub dataset.

    `chat`: a chat template will write the text, so prompts and instructions become conversations.

    Raises UserError with the file, the line or item, and the wrong column. For single wrong records,
    `on_error` is called, and the record is left out if it returns.
    """
    on_error, read_row, rows = _limit_errors(str(dataset), on_error), None, []
    for location, record in each_record(dataset, on_error):
        if read_row is None:
            read_row = _choose_form(location, record, prompt_column, completion_column, messages_column, chat)
        try:
            rows.append(read_row(location, record))
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


def to_record(row: Row) -> dict[str, object]:
    """Return the record that `read_rows` reads as this row."""
    if row.messages is not None:
        return {"messages": list(row.messages)}
    if row.prompt is None:
        return {"text": row.completion}
    return {"prompt": row.prompt, "completion": row.completion}


def _choose_form(
    location: str,
    columns: Collection[str],
    prompt_column: str,
    completion_column: str,
    messages_column: str | None,
    chat: bool,
) -> RowReader:
    """Return the reader for records with these columns. Raises UserError if they have no known form."""
    pair = {prompt_column, completion_column}
    has_pair = pair <= set(columns)
    read_pair = partial(
        _read_prompt, prompt_column=prompt_column, completion_column=completion_column, chat=chat
    )
    # Columns that the settings name.
    if messages_column in columns:
        return partial(_read_conversation, column=messages_column)
    if has_pair and pair != {"prompt", "completion"}:
        return read_pair
    # Columns with the usual names.
    if "instruction" in columns and "output" in columns:
        return partial(_read_alpaca, chat=chat)
    if has_pair:
        return read_pair
    for column in ("messages", "conversations"):
        if column in columns:
            return partial(_read_conversation, column=column)
    if "text" in columns:
        return _read_text
    raise UserError(
        f"{location}: no columns {prompt_column} + {completion_column}, instruction + output, messages, "
        f"conversations or text; it has {list_columns(columns) or 'none'}; name yours with prompt_column and "
        "completion_column, or with messages_column"
    )


# ---- forms: each reader turns a record into a row ----


def _read_prompt(location: str, record: dict, prompt_column: str, completion_column: str, chat: bool) -> Row:
    prompt = _text(location, record, prompt_column)
    completion = _text(location, record, completion_column)
    messages = (_message("user", prompt), _message("assistant", completion)) if chat else None
    return Row(prompt, completion, messages, location)


def _read_alpaca(location: str, record: dict, chat: bool) -> Row:
    question = alpaca_question(location, record)
    completion = _text(location, record, "output")
    if chat:
        messages = (*question, _message("assistant", completion))
        return Row(question[-1]["content"], completion, messages, location)
    if len(question) > 1:
        raise UserError(
            f"{location}: a row with system or history needs a chat template, such as --template alpaca"
        )
    variables = {"messages": question, "bos_token": "", "add_generation_prompt": True}
    prompt = render(TEMPLATES["alpaca"], variables)
    return Row(prompt, completion, location=location)


def alpaca_question(location: str, record: dict) -> list[Message]:
    """Return a record of Alpaca's form, without its output, as a conversation: system, history, question."""
    instruction = _text(location, record, "instruction")
    context, system = (
        _text(location, record, column) if record.get(column) else "" for column in ("input", "system")
    )
    question = _message("user", instruction)
    if context:
        question = _message("user", f"{instruction}\n{context}")
        question |= {"instruction": instruction, "input": context}  # the alpaca template prints both apart
    start = [_message("system", system)] if system else []
    return [*start, *_history(location, record), question]


def _history(location: str, record: dict) -> list[Message]:
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns
    ):
        fault = _describe_fault(record, "history", "a list of [question, answer]")
        raise UserError(f"{location}: the column history {fault}")
    messages = []
    for question, answer in turns:
        messages += [_message("user", question), _message("assistant", answer)]
    return messages


def _read_text(location: str, record: dict) -> Row:
    return Row(None, _text(location, record, "text"), location=location)


def _read_conversation(location: str, record: dict, column: str) -> Row:
    _refuse_tools(location, record, ("tools", "functions"))
    turns = record.get(column)
    if not isinstance(turns, list):
        fault = _describe_fault(record, column, "a list of messages")
        raise UserError(f"{location}: the column {column} {fault}")
    messages = [_read_message(f"{location}, message {i}", turn) for i, turn in enumerate(turns, start=1)]
    if record.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, _message("system", _text(location, record, "system")))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing behind the last answer is learned
    if not messages:
        raise UserError(f"{location}: the conversation has no message of the assistant, so nothing to learn")
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return Row(questions[-1] if questions else "", messages[-1]["content"], tuple(messages), location)


def _read_message(location: str, turn: object) -> Message:
    """Return a message of either form as {"role", "content"}, with further keys for the template."""
    if not isinstance(turn, dict):
        raise UserError(f"{location}: expected an object with role and content, found {type(turn).__name__}")
    _refuse_tools(location, turn, ("tool_calls", "function_call"))
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = _text(location, turn, role_key), _text(location, turn, content_key)
    if role not in _ROLES:
        raise UserError(f"{location}: the role {role!r} is not known; known: {', '.join(_ROLES)}")
    if _ROLES[role] == "assistant" and turn.get("weight") not in (None, 1):
        raise UserError(
            f"{location}: the answer has weight {turn['weight']!r}, but all answers have equal weight here; "
            "leave the row out, or let it end with the answer to learn and add --mask_history"
        )
    more = {k: value for k, value in turn.items() if k not in (role_key, content_key) and value is not None}
    if more:
        try:
            json.dumps(more)
        except (TypeError, ValueError) as error:  # from Parquet: a date or bytes
            raise UserError(f"{location}: a key beside role and content is no JSON value: {error}") from error
    return more | _message(_ROLES[role], content)


def _refuse_tools(location: str, holder: dict, names: Sequence[str]) -> None:
    for name in names:
        if holder.get(name) not in (None, "", "[]", [], {}):
            raise UserError(
                f"{location}: {name} {_describe_fault(holder, name, 'empty')}, and tools are not supported; "
                "leave the row out, or write the text to learn into the content of its messages"
            )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(location: str, record: dict, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise UserError(f"{location}: the column {column} {_describe_fault(record, column, 'text')}")
    return value


def _describe_fault(record: dict, column: str, expected: str) -> str:
    """Return "is missing", or "holds VALUE, not EXPECTED"."""
    if column not in record:
        return "is missing"
    value = repr(record[column])
    return f"holds {value if len(value) <= 80 else value[:77] + '...'}, not {expected}"


# ---- several datasets ----


def parse_datasets(datasets: str | Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Return names and weights of `a.jsonl:0.7,b.json:0.3`, or of a list of such entries.

    Without weights, every weight is None.
    """
    entries = whole(datasets).split(",") if isinstance(datasets, str) else datasets
    is_list = isinstance(entries, Sequence) and all(isinstance(entry, str) for entry in entries)
    if not is_list or not entries:
        raise UserError(f"dataset = {datasets!r} must be the name of a dataset, or a list of names")
    if not all(entry.strip() for entry in entries):
        raise UserError(f"dataset = {datasets!r} names nothing between two commas; remove one of them")
    parsed = [_split_weight(whole(entry).strip()) for entry in entries]
    weights = [weight for _, weight in parsed]
    if None in weights and any(weights):
        raise UserError(
            f"dataset = {datasets!r}: only some datasets have a weight; give one to all of them, or to none"
        )
    if 0 in weights:
        raise UserError(f"dataset = {datasets!r}: a weight is 0; leave that dataset out")
    return parsed


def _split_weight(entry: str) -> tuple[str, Fraction | None]:
    """Return name and weight of `a.jsonl:0.7`. What has more digits than a weight belongs to the name."""
    name, _, weight = entry.rpartition(":")
    if name and re.fullmatch(r"\d{1,20}(\.\d{0,20})?|\.\d{1,20}", weight):
        return hide_secrets(name), Fraction(weight)
    return hide_secrets(entry), None


def mix_rows(parts: Sequence[list[Row]], weights: Sequence[Fraction | None], seed: int) -> list[Row]:
    """Return the rows of several datasets, mixed in proportion to their weights.

    The mixture ends where the first dataset is used up. Rows keep their order. Without weights, all rows of
    all datasets are joined.
    """
    if None in weights:
        return [row for part in parts for row in part]
    shares = [weight / sum(weights) for weight in weights]
    # Fractions are exact: the dataset that is used up contributes all of its rows, not one fewer.
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    mixed = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = max(1, math.floor(total * share))
        order = np.random.Generator(np.random.Philox(key=[seed, i])).permutation(len(part))
        mixed += [part[j] for j in sorted(order[:count].tolist())]
    return mixed
