"""Text of ids that come one at a time, as a model makes them.

A token need not be whole characters: an emoji may be four tokens of one byte. And what a token says depends
on the one before it: sentencepiece's "▁Hello" is "Hello" at the start of a text and " Hello" elsewhere. So
tokens wait until their text is whole, and are decoded together with the ones that came out last, whose own
text is then cut off in front.
"""

from minilora.data.tokenizer import Tokenizer


class StreamDecoder:
    """What `feed` and `flush` return, joined, is `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text was returned last
        self._waiting: list[int] = []  # tokens whose text is not whole yet

    def feed(self, token_id: int) -> str:
        """The text that became whole with this token, often all of its own, sometimes none."""
        token_id = int(token_id)
        if not self._tokenizer.is_text(token_id):
            return ""
        self._waiting.append(token_id)
        text = self._text()
        if text.endswith("\ufffd") or self._tokenizer.is_open(token_id):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """The text still waiting, broken characters as U+FFFD. The next `feed` begins another text."""
        text = self._text()
        self._context, self._waiting = [], []
        return text

    def _text(self) -> str:
        known = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(known) :]
