"""Characters that occur nowhere in a conversation, and where a template that prints them puts them."""

import json
import re
from collections.abc import Sequence
from itertools import accumulate, chain, islice

import numpy as np

from minilora.data.messages import Message
from minilora.system.errors import UserError

Span = tuple[int, int]  # characters [start, end) of a text


def unused_characters(messages: Sequence[Message], count: int) -> list[str]:
    """Return characters that occur nowhere in the conversation.

    Unicode reserves U+FDD0 to U+FDEF for such internal use; the private use plane 15 extends them.
    """
    try:
        used = set(json.dumps(messages, ensure_ascii=False, default=str))
    except RecursionError as error:
        raise UserError("the conversation is nested too deeply") from error
    candidates = chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))
    unused = list(islice((chr(i) for i in candidates if chr(i) not in used), count))
    if len(unused) < count:
        raise UserError("the conversation uses all 65,566 characters that Unicode reserves for internal use")
    return unused


def remove_markers(text: str, markers: Sequence[str]) -> tuple[str, list[str], list[int]]:
    """Return the text without markers, the removed markers in order, and their positions in that text."""
    parts = re.split("([" + "".join(markers) + "])", text)  # text, marker, text, ..., text
    texts, removed = parts[::2], parts[1::2]
    positions = list(accumulate(map(len, texts)))[:-1]
    return "".join(texts), removed, positions


def front(content: str) -> tuple[int, int]:
    """Return two positions in front of a message: before its leading blanks, and after them."""
    return 0, len(content) - len(content.lstrip())


def back(content: str) -> tuple[int, int]:
    """Return two positions behind a message: after its trailing blanks, and before them."""
    return len(content), len(content.rstrip())


def spans_of_tokens(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return int32 (T,): the number, from 1, of the span that token i, the characters offsets[i] = [start,
    end), meets, or 0. The spans lie one behind the other."""
    token_starts = offsets[:, 0]
    # A token without characters, such as "▁" in front of a text, belongs to the character behind it.
    token_ends = np.maximum(offsets[:, 1], token_starts + 1)
    full = np.array(
        [(start, end, i + 1) for i, (start, end) in enumerate(spans) if start < end], dtype=np.int64
    )
    if not len(full):
        return np.zeros(len(offsets), dtype=np.int32)
    starts, ends, numbers = full.T
    first = np.searchsorted(ends, token_starts, side="right")  # the first span that ends behind its start
    nearest = np.minimum(first, len(ends) - 1)
    met = (first < len(ends)) & (starts[nearest] < token_ends)
    return np.where(met, numbers[nearest], 0).astype(np.int32)
