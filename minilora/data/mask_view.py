"""An example as text, with its learned tokens highlighted, for a person to check the loss mask.

    <s>Question: Where is the house of Orybelle Ashwood?↵
    Answer:⟦ She lives in Lanternsea.</s>⟧

On a terminal, learned tokens are green in place of the brackets, and special tokens are in reverse video. The
text is decoded from the example's tokens, so it shows what the model sees. It includes special tokens, which
decoding normally drops: the most important thing to check is whether an end token is there and learned.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from minilora.data.examples import Example
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer
from minilora.system.terminal import visible

_GREEN, _DEFAULT_COLOUR = "\x1b[32m", "\x1b[39m"
_REVERSE, _NO_REVERSE = "\x1b[7m", "\x1b[27m"


def highlight_learned(example: Example, tokenizer: Tokenizer, colours: bool) -> str:
    """Return the example as text in which learned tokens stand out, in colour or between brackets."""
    before, after = (_GREEN, _DEFAULT_COLOUR) if colours else ("⟦", "⟧")
    highlighted = ""
    for learned, pieces in groupby(_decode_pieces(example, tokenizer), key=lambda piece: piece.learned):
        text = "".join(
            f"{_REVERSE}{piece.text}{_NO_REVERSE}" if piece.special and colours else piece.text
            for piece in pieces
        )
        highlighted += before + text + after if learned else text
    return highlighted


class _Piece(NamedTuple):
    """The text of one token, or of the few tokens that form one character together."""

    text: str
    learned: bool
    special: bool


def _decode_pieces(example: Example, tokenizer: Tokenizer) -> Iterator[_Piece]:
    decoder = StreamDecoder(tokenizer)
    for i, learned in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if tokenizer.is_special(i):
            yield _Piece(tokenizer.token(i), learned, special=True)
        elif text := decoder.feed(i):
            yield _Piece(_make_visible(text), learned, special=False)
    if text := decoder.flush():
        yield _Piece(_make_visible(text), learned, special=False)


def _make_visible(text: str) -> str:
    """Return the text with line ends marked by "↵", and control characters written as escapes."""
    return visible(text).replace("\n", "↵\n")
