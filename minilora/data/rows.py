"""From records to rows: one form, whatever the columns are called.

    instruction, input, output           Stanford Alpaca's form; `input` may be empty or absent; `system` and `history`, a list of
                                         [question, answer], as LLaMA-Factory has them
    prompt, completion                   names may be changed with prompt_column and completion_column
    messages                             a list of {"role": "user", "content": "Hi"}; roles: system, user, assistant
    conversations                        ShareGPT's form, a list of {"from": "human", "value": "Hi"}; from: system, human, gpt;
                                         a list of either kind may have another name, messages_column
    text                                 every token is supervised

The first of these that a dataset has is read; but before all others one whose names were changed, as it was
asked for.

Tools are not taught: a row that calls them or is offered some is refused, as what is left of it would teach
silence.

Where a chat template words the rows, prompts and instructions are questions to the assistant: conversations
of two messages. Where none does, prompts stand as they are written and instructions get Alpaca's wording.

Several datasets are joined. With weights, `a.jsonl:0.7,b.json:0.3`, they are mixed: 7 of 10 rows are of the
first, as many rows in all as there can be without any row twice. The seed chooses which rows of each, once
for the whole training.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from minilora.data.chat import Message
from minilora.data.jinja_sandbox import render
from minilora.data.readers import read_records
from minilora.data.templates import TEMPLATES
from minilora.system.errors import UserError, raise_error

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text. A prompt of None means that all of the completion is plain text to learn."""

    prompt: str | None
    completion: str
    messages: tuple[Message, ...] | None = (
        None  # the conversation, where a chat template is to word it; it ends with `completion`
    )
    location: str = field(default="", compare=False, repr=False)  # "data.jsonl, line 3"


def read_rows(
    path: str | Path,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str | None = None,
    chat: bool = False,
    on_error: Callable[[UserError], None] = raise_error,
) -> list[Row]:
    """Read a dataset: a file, an address or a hub dataset; `chat`: a chat template will word its prompts and
    instructions.

    Raises UserError naming the file, the line or item, and the column that is wrong. Where single rows are
    wrong, `on_error` may do something else; they are left out.
    """
    records = read_records(path, on_error)
    if not records:
        return []
    location, columns = (
        records[0][0],
        records[0][1].keys(),
    )  # the first record decides the form; every other one must have it too
    pair, alpaca = {prompt_column, completion_column}, {"instruction", "output"}
    if messages_column in columns:
        read = partial(_conversation, column=messages_column)
    elif pair <= columns and (pair != {"prompt", "completion"} or not alpaca <= columns):
        read = partial(
            _prompt_and_completion,
            prompt_column=prompt_column,
            completion_column=completion_column,
            chat=chat,
        )
    elif alpaca <= columns:
        read = partial(_alpaca, chat=chat)
    elif column := next((name for name in ("messages", "conversations") if name in columns), None):
        read = partial(_conversation, column=column)
    elif "text" in columns:
        read = _plain_text
    else:
        raise UserError(
            f"{location}: no columns {prompt_column} + {completion_column}, instruction + output, messages, conversations or text; "
            f"it has {', '.join(columns) or 'none'}; say which with prompt_column and completion_column, or messages_column"
        )
    rows = []
    for record in records:
        try:
            rows.append(read(*record))
        except UserError as error:
            on_error(error)
    return rows


def record_of(row: Row) -> dict[str, object]:
    """The columns that `read_rows` makes this row of."""
    if row.messages is not None:
        return {"messages": list(row.messages)}
    return (
        {"text": row.completion}
        if row.prompt is None
        else {"prompt": row.prompt, "completion": row.completion}
    )


def parse_datasets(datasets: str | Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Places and weights of `a.jsonl:0.7,b.json:0.3`, or of a list of such entries. Without weights they are
    None.
    """
    entries = datasets.split(",") if isinstance(datasets, str) else datasets
    if (
        not isinstance(entries, Sequence)
        or not entries
        or not all(isinstance(entry, str) for entry in entries)
    ):
        raise UserError(f"dataset = {datasets!r} must be the name of a dataset, or a list of names")
    found = [re.fullmatch(r"(?s)(.+?)(?::(\d+\.?\d*|\.\d+))?", entry.strip()) for entry in entries]
    if None in found:
        raise UserError(f"dataset = {datasets!r} names nothing between two commas")
    parsed = [(match[1], Fraction(match[2]) if match[2] else None) for match in found]
    weights = [weight for _, weight in parsed]
    if None in weights and any(weights):
        raise UserError(
            f"dataset = {datasets!r}: some have a weight and some have none; give one to all of them, or to none"
        )
    if 0 in weights:
        raise UserError(f"dataset = {datasets!r}: a weight is 0; leave that dataset out")
    return parsed


def mix_rows(parts: Sequence[list[Row]], weights: Sequence[Fraction | None], seed: int) -> list[Row]:
    """Join datasets; those with weights in that proportion, the first that is used up ending it. Rows keep
    their order.
    """
    if None in weights:
        return [row for part in parts for row in part]
    shares = [weight / sum(weights) for weight in weights]
    total = min(
        len(part) / share for part, share in zip(parts, shares, strict=True)
    )  # exact: shares are fractions
    mixed = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = max(1, math.floor(total * share))
        order = np.random.Generator(np.random.Philox(key=[seed, i])).permutation(len(part))
        mixed += [part[j] for j in sorted(order[:count].tolist())]
    return mixed


# ---- forms -----------------------------------------------------------------------------------------------------------------


def _prompt_and_completion(
    location: str, record: dict, prompt_column: str, completion_column: str, chat: bool
) -> Row:
    prompt, completion = _text(location, record, prompt_column), _text(location, record, completion_column)
    messages = (_message("user", prompt), _message("assistant", completion)) if chat else None
    return Row(prompt, completion, messages, location)


def _alpaca(location: str, record: dict, chat: bool) -> Row:
    messages, completion = alpaca_question(location, record), _text(location, record, "output")
    if chat:
        return Row(
            messages[-1]["content"], completion, (*messages, _message("assistant", completion)), location
        )
    if len(messages) > 1:
        raise UserError(
            f"{location}: a row with system or history needs a chat template to word it, such as --template alpaca"
        )
    wording = dict(bos_token="", add_generation_prompt=True)
    return Row(render(TEMPLATES["alpaca"], messages, **wording), completion, location=location)


def alpaca_question(location: str, record: dict) -> list[Message]:
    """Columns of Alpaca's form, but for the output, as a conversation that waits for an answer: system,
    history, question.
    """
    instruction = _text(location, record, "instruction")
    context, system = (
        _text(location, record, column) if record.get(column) else "" for column in ("input", "system")
    )
    question = _message("user", f"{instruction}\n{context}" if context else instruction)
    if context:
        question |= {
            "instruction": instruction,
            "input": context,
        }  # for the alpaca template, which words them apart
    return ([_message("system", system)] if system else []) + [*_history(location, record), question]


def _history(location: str, record: dict) -> list[Message]:
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns
    ):
        raise UserError(
            f"{location}: the column history {_fault(record, 'history', 'a list of [question, answer]')}"
        )
    return [
        message
        for question, answer in turns
        for message in (_message("user", question), _message("assistant", answer))
    ]


def _plain_text(location: str, record: dict) -> Row:
    return Row(None, _text(location, record, "text"), location=location)


def _conversation(location: str, record: dict, column: str) -> Row:
    _refuse_tools(location, record, ("tools", "functions"))
    turns = record.get(column)
    if not isinstance(turns, list):
        raise UserError(f"{location}: the column {column} {_fault(record, column, 'a list of messages')}")
    messages = [_read_message(f"{location}, message {i}", turn) for i, turn in enumerate(turns, start=1)]
    if record.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, _message("system", _text(location, record, "system")))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learned from what comes after the last answer
    if not messages:
        raise UserError(
            f"{location}: the conversation has no message of the assistant, so there is nothing to learn"
        )
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return Row(questions[-1] if questions else "", messages[-1]["content"], tuple(messages), location)


def _read_message(location: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{location}: expected an object with role and content, found {type(turn).__name__}")
    _refuse_tools(location, turn, ("tool_calls", "function_call"))
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = _text(location, turn, role_key), _text(location, turn, content_key)
    if role not in _ROLES:
        raise UserError(f"{location}: the role {role!r} is not known; known: {', '.join(_ROLES)}")
    if _ROLES[role] == "assistant" and turn.get("weight") not in (None, 1):
        mend = "leave its row out, or end the row with the answer to learn and say --mask_history"
        raise UserError(
            f"{location}: the answer has weight {turn['weight']!r}, and every answer counts alike here; {mend}"
        )
    more = {
        key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None
    }
    return more | _message(_ROLES[role], content)


def _refuse_tools(location: str, holder: dict, names: Sequence[str]) -> None:
    for name in names:
        if holder.get(name) not in (None, "", "[]", [], {}):
            mend = "leave the row out, or write what is to be learned into the content of its messages"
            raise UserError(
                f"{location}: {name} {_fault(holder, name, 'empty')}, and tools are not taught here; {mend}"
            )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(location: str, record: dict, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise UserError(f"{location}: the column {column} {_fault(record, column, 'text')}")
    return value


def _fault(record: dict, column: str, expected: str) -> str:
    if column not in record:
        return "is missing"
    found = repr(record[column])
    return f"holds {found if len(found) <= 80 else found[:77] + '...'}, not {expected}"
