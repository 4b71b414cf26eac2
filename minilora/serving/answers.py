"""A request, and the answer to it as it grows: its tokens, its text, and why it ended.

The engine tells an answer in pieces, from its own thread. A piece holds the text that became certain: a
character may take several tokens, and text that may be the beginning of a stop string waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer
from minilora.inference.assistant import GenerationSettings


class Piece(NamedTuple):
    """A part of an answer. The last one has a reason or an error."""

    text: str
    tokens: int  # of the answer so far, with the one that ended it
    finish_reason: str | None = None  # "stop": an end token or a stop string; "length"; "cancelled"
    error: str | None = None  # why there is no more

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """A prompt that waits for an answer. The engine reads it; `cancel` may be called from any thread."""

    prompt: Sequence[int]  # at least one token
    adapter: str | None
    settings: GenerationSettings
    end_ids: frozenset[int]
    tokenizer: Tokenizer
    tell: Callable[[Piece], None]  # called in the engine's thread; must not wait
    stop: tuple[str, ...] = ()  # strings that end the answer, and are no part of it
    cancelled: bool = False

    def cancel(self) -> None:
        """Let the engine drop the request at its next step."""
        self.cancelled = True


class Answer:
    """The text of a request's tokens, up to its end."""

    def __init__(self, request: Request, limit: int):
        self.request, self.limit = request, limit
        self.tokens: list[int] = []
        self.decoder, self.text = StreamDecoder(request.tokenizer), UntilStop(request.stop)

    def add(self, token: int) -> Piece:
        """Add the next token. Returns what it makes certain."""
        self.tokens.append(token)
        reason = "length" if len(self.tokens) == self.limit else None
        if token in self.request.end_ids:
            text, reason = self.text.feed(self.decoder.flush()), "stop"
        else:
            text = self.text.feed(self.decoder.feed(token))
            if reason:
                text += self.text.feed(self.decoder.flush())
        if self.text.ended:
            reason = "stop"
        if reason:
            text += self.text.flush()
        return Piece(text, len(self.tokens), reason)


class UntilStop:
    """Text up to the first stop string. The joined results of `feed` and `flush` do not depend on the pieces.

    The string that is complete first ends the text; of several that end there, the longest.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop, self.ended = stop, False
        self._waiting = ""  # may be the beginning of a stop string

    def feed(self, text: str) -> str:
        """Return the text that is certain now."""
        if self.ended:
            return ""
        self._waiting += text
        starts = [(self._waiting.find(s), s) for s in self.stop]
        found = [(start + len(s), start) for start, s in starts if start >= 0]
        if found:
            self.ended = True
            certain, self._waiting = self._waiting[: min(found)[1]], ""
            return certain
        longest = max((self._begun(s) for s in self.stop), default=0)
        end = len(self._waiting) - longest
        certain, self._waiting = self._waiting[:end], self._waiting[end:]
        return certain

    def flush(self) -> str:
        """Return the text that still waits: no more comes."""
        certain, self._waiting = self._waiting, ""
        return certain

    def _begun(self, stop: str) -> int:
        """Return how many characters of a stop string the text ends with."""
        lengths = range(min(len(stop) - 1, len(self._waiting)), 0, -1)
        return next((n for n in lengths if self._waiting.endswith(stop[:n])), 0)
