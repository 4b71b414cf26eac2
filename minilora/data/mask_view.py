"""Which tokens of an example are learned, for a person to look at.

    <s>Question: Where is the house of Orybelle Ashwood?↵
    Answer:⟦ She lives in Lanternsea.</s>⟧

On a terminal what is learned is green instead, and special tokens are reversed. No decoded text shows those,
and whether an end token is there and learned is what one most wants to see. It is made from the tokens: an
example is shown as the model will see it.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from minilora.data.examples import Example
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer

_GREEN, _PLAIN = "\x1b[32m", "\x1b[39m"
_REVERSED, _UPRIGHT = "\x1b[7m", "\x1b[27m"


def highlight_learned(example: Example, tokenizer: Tokenizer, colours: bool) -> str:
    """The example as text in which learned tokens stand out; in colour, or between brackets."""
    shown = ""
    for loss_mask, pieces in groupby(_pieces(example, tokenizer), key=lambda piece: piece.loss_mask):
        texts = [
            f"{_REVERSED}{piece.text}{_UPRIGHT}" if piece.special and colours else piece.text
            for piece in pieces
        ]
        before, after = (_GREEN, _PLAIN) if colours else ("⟦", "⟧")
        shown += before + "".join(texts) + after if loss_mask else "".join(texts)
    return shown


class _Piece(NamedTuple):
    text: str  # what a token says
    loss_mask: bool
    special: bool


def _pieces(example: Example, tokenizer: Tokenizer) -> Iterator[_Piece]:
    decoder = StreamDecoder(tokenizer)
    for i, loss_mask in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if tokenizer.is_special(i):
            yield _Piece(tokenizer.token(i), loss_mask, special=True)
        elif text := decoder.feed(i):
            yield _Piece(_visible(text), loss_mask, special=False)
    if text := decoder.flush():
        yield _Piece(_visible(text), loss_mask, special=False)


def _visible(text: str) -> str:
    """With line ends marked, and what would move the cursor or colour the terminal written out."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return text.replace("\n", "↵\n")
