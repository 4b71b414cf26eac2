"""Text of ids that arrive one by one, as a model generates them.

A token may be less than a character: an emoji may be four tokens of one byte. So tokens wait until their
characters are complete.

The text of a token depends on the token before it: sentencepiece's "▁Hello" is "Hello" at the start of a text
and " Hello" elsewhere. So waiting tokens are decoded behind the tokens whose text was returned last, and the
text of those is then cut off in front.
"""

from minilora.data.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one by one. The joined results of `feed` and `flush` are `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens whose text was returned last
        self._waiting: list[int] = []  # the tokens whose text is not complete yet

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes: mostly its own, sometimes none."""
        token_id = int(token_id)
        if not self._tokenizer.is_text(token_id):
            return ""
        self._waiting.append(token_id)
        text = self._waiting_text()
        if text.endswith("\ufffd") or self._tokenizer.is_unsettled(token_id):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Return the text that still waits, broken characters as U+FFFD. A new text begins after it."""
        text = self._waiting_text()
        self._context, self._waiting = [], []
        return text

    def _waiting_text(self) -> str:
        known_text = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(known_text) :]
