"""Conversations in the forms in which people keep them, as messages with a role and a content.

    {"role": "user", "content": "Hi"}, {"from": "human", "value": "Hi"}    and any mixture of these names
    role       system or developer; user or human; assistant, gpt, model or bot
    content    text, or parts: [{"type": "text", "text": "Hi"}]
    weight, loss_weight 0; train, training false    on an answer: it is read and not learned

A list of messages may also be written as JSON text, as in cells of CSV. Further keys are kept for the
template. An answer that is not learned has `train: False`, whichever flag said so.

What an assistant thought before an answer is in its content, <think>...</think>, or in a key of its own.

Tool calls are not supported. A conversation that calls tools or offers them is refused: without them, the
rest of it would teach the model to answer nothing.
"""

import json
import re
from collections.abc import Sequence

from minilora.system.errors import UserError
from minilora.system.files import parse_json

Message = dict[str, object]  # {"role": "user", "content": "Hi"}; a template may read further keys

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of an answer
TOOLS = ("tools", "functions")  # columns of a conversation that offers tools
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_FLAGS = ("train", "training", "weight", "loss_weight")  # on an answer: whether it is learned


def message(role: str, content: str) -> Message:
    """Return a message without further keys."""
    return {"role": role, "content": content}


def is_learned(answer: Message) -> bool:
    """Whether a message of the assistant is learned."""
    return answer.get("train") is not False


def thoughts_of(answer: Message) -> list[str]:
    """Return what the assistant thought before an answer; empty thoughts are none."""
    written = re.findall(r"<think>(.*?)</think>", answer["content"], re.DOTALL)
    thoughts = [*written, *(answer.get(key) for key in THOUGHTS)]
    return [part.strip() for part in thoughts if isinstance(part, str) and part.strip()]


def lost_thoughts(messages: Sequence[Message], text: str) -> int:
    """Return of how many answers the thoughts are not in the text, one behind the other."""
    lost, position = 0, 0
    for thoughts in (thoughts_of(m) for m in messages if m["role"] == "assistant"):
        for thought in thoughts:
            found = text.find(thought, position)
            if found < 0:
                lost += 1
                break
            position = found + len(thought)
    return lost


def read_messages(location: str, record: dict, column: str) -> list[Message]:
    """Return the messages in a column. Raises UserError that names the message and what is wrong with it."""
    turns = record.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = parse_json(turns)
        except UserError as error:
            raise UserError(f"{location}: the column {column} is {error}") from error
    if not isinstance(turns, list):
        raise UserError(
            f"{location}: the column {column} {describe_fault(record, column, 'a list of messages')}"
        )
    return [_read_message(f"{location}, message {i}", turn) for i, turn in enumerate(turns, start=1)]


def _read_message(location: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{location}: expected an object with role and content, found {type(turn).__name__}")
    refuse_tools(location, turn, ("tool_calls", "function_call"))
    role_key, content_key = (
        next((key for key in keys if turn.get(key) is not None), keys["from" in turn])
        for keys in (_ROLE_KEYS, _CONTENT_KEYS)
    )
    role, content = text_of(location, turn, role_key), _read_content(location, turn, content_key)
    if role not in ROLES:
        tools = "; tools are not supported" if role in ("tool", "function", "observation") else ""
        raise UserError(f"{location}: the role {role!r} is not known; known: {', '.join(ROLES)}{tools}")
    read = {role_key, content_key, *_FLAGS}
    more = {key: value for key, value in turn.items() if key not in read and value is not None}
    if ROLES[role] == "assistant" and not _learned(location, turn):
        more["train"] = False
    try:
        json.dumps(more)
    except (TypeError, ValueError) as error:  # from Parquet: a date or bytes
        raise UserError(f"{location}: a key beside role and content is no JSON value: {error}") from error
    return more | message(ROLES[role], content)


def _read_content(location: str, turn: dict, key: str) -> str:
    """Return a message's text; parts are joined without anything between them, as templates print them."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(location, turn, key)
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{location}: {key} holds a part of type {kind!r}; only parts of type text are read"
            )
    return "".join(part["text"] for part in parts)


def _learned(location: str, answer: dict) -> bool:
    """Whether none of an answer's flags says that it is not learned."""
    given = {flag: answer[flag] for flag in _FLAGS if answer.get(flag) is not None}
    for flag, value in given.items():
        if value not in (0, 1):  # True and False among them
            raise UserError(
                f"{location}: the answer has {flag} {value!r}; it can be 1, learned, or 0, not learned: all "
                "learned answers have equal weight"
            )
    return all(given.values())


def refuse_tools(location: str, holder: dict, names: Sequence[str]) -> None:
    """Raise UserError for a record or a message that offers or calls tools."""
    for name in names:
        if holder.get(name) not in (None, "", "[]", [], {}):
            raise UserError(
                f"{location}: {name} {describe_fault(holder, name, 'empty')}, and tools are not supported; "
                "leave the row out, or write the text to learn into the content of its messages"
            )


def text_of(location: str, record: dict, column: str) -> str:
    """Return the text in a column. Raises UserError if it is missing or no text."""
    value = record.get(column)
    if not isinstance(value, str):
        raise UserError(f"{location}: the column {column} {describe_fault(record, column, 'text')}")
    return value


def describe_fault(record: dict, column: str, expected: str) -> str:
    """Return "is missing", or "holds VALUE, not EXPECTED"."""
    if column not in record:
        return "is missing"
    value = repr(record[column])
    return f"holds {value if len(value) <= 80 else value[:77] + '...'}, not {expected}"
