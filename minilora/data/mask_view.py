"""An example as text, with its learned tokens highlighted, for a person to check the loss mask.

    <s>Question: Where is the house of Orybelle Ashwood?↵
    Answer:⟦ She lives in Lanternsea.</s>⟧

Where cutoff_len has cut the example, its end says so: ✂ 45 tokens cut off.

On a terminal, learned tokens are green in place of the brackets, and special tokens are in reverse video. The
text is decoded from the example's tokens, so it shows what the model sees. It includes special tokens, which
decoding normally drops: the most important thing to check is whether an end token is there and learned.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from minilora.data.examples import Example
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer
from minilora.system.terminal import visible

_GREEN, _DEFAULT_COLOUR = "\x1b[32m", "\x1b[39m"
_REVERSE, _NO_REVERSE = "\x1b[7m", "\x1b[27m"


def highlight_learned(example: Example, tokenizer: Tokenizer, colours: bool, lost: int = 0) -> str:
    """Return the example as text in which learned tokens stand out, in colour or between brackets.

    lost: the tokens that were cut off at its end.
    """
    before, after = (_GREEN, _DEFAULT_COLOUR) if colours else ("⟦", "⟧")
    highlighted, pieces = "", _decode_pieces(example.input_ids, example.loss_mask, tokenizer)
    for learned, group in groupby(pieces, key=lambda piece: piece.learned):
        text = "".join(
            f"{_REVERSE}{piece.text}{_NO_REVERSE}" if piece.special and colours else _mark_line_ends(piece)
            for piece in group
        )
        highlighted += before + text + after if learned else text
    if lost:
        cut = f"✂ {lost:,} {'token' if lost == 1 else 'tokens'} cut off"
        highlighted += f" {_REVERSE}{cut}{_NO_REVERSE}" if colours else f" {cut}"
    return highlighted


def readable(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of token ids, with the special tokens in it written out."""
    return "".join(piece.text for piece in _decode_pieces(ids, [False] * len(ids), tokenizer))


class _Piece(NamedTuple):
    """The text of one token, or of the few tokens that form one character together."""

    text: str  # control characters written as escapes
    learned: bool
    special: bool


def _decode_pieces(ids: Sequence[int], loss_mask: Sequence[bool], tokenizer: Tokenizer) -> Iterator[_Piece]:
    decoder = StreamDecoder(tokenizer)
    for i, learned in zip(map(int, ids), map(bool, loss_mask), strict=True):
        if tokenizer.is_special(i):
            yield _Piece(tokenizer.token(i), learned, special=True)
        elif text := decoder.feed(i):
            yield _Piece(visible(text), learned, special=False)
    if text := decoder.flush():
        yield _Piece(visible(text), learned, special=False)


def _mark_line_ends(piece: _Piece) -> str:
    return piece.text if piece.special else piece.text.replace("\n", "↵\n")
