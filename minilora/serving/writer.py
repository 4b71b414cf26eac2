"""The bodies that OpenAI's API gives: answers as JSON, whole or as the chunks of a stream."""

import time
import uuid
from collections.abc import Iterator

from minilora.serving.answers import Piece
from minilora.serving.engine import STOPS
from minilora.serving.protocol import ApiError, Asked


class Writer:
    """Writes the answers to one body: whole, or as the chunks of a stream."""

    def __init__(self, asked: Asked):
        self.asked, kind = asked, "chatcmpl" if asked.is_chat else "cmpl"
        self.head = dict(id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=asked.served.name)
        self.texts = [""] * len(asked.prompts)
        self.last: list[Piece | None] = [None] * len(asked.prompts)

    def add(self, i: int, piece: Piece) -> None:
        """Note a piece of answer i. Raises ApiError for one that says why there is no more."""
        if piece.error is not None:
            raise ApiError(503 if piece.error == STOPS else 500, piece.error)
        self.texts[i] += piece.text
        self.last[i] = piece

    @property
    def is_done(self) -> bool:
        return all(piece is not None and piece.is_last for piece in self.last)

    @property
    def usage(self) -> dict:
        read = sum(len(prompt) for prompt in self.asked.prompts)
        written = sum(piece.tokens for piece in self.last if piece)
        return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def whole(self) -> dict:
        """Return the body of an answer that is no stream."""
        choices = []
        for i, (text, piece) in enumerate(zip(self.texts, self.last, strict=True)):
            said = {"message": dict(role="assistant", content=text)} if self.asked.is_chat else {"text": text}
            choices.append(dict(index=i, logprobs=None, finish_reason=piece.finish_reason) | said)
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return self.head | dict(object=kind, choices=choices, usage=self.usage)

    def first_chunks(self) -> Iterator[dict]:
        """Yield what a stream begins with: in a chat, who speaks."""
        if self.asked.is_chat:
            yield self._chunk(0, dict(delta=dict(role="assistant", content="")), None)

    def chunks(self, i: int, piece: Piece) -> Iterator[dict]:
        """Yield a piece of answer i, which was noted before, and the end of a stream."""
        if piece.text or (piece.is_last and not self.asked.is_chat):
            said = dict(delta=dict(content=piece.text)) if self.asked.is_chat else dict(text=piece.text)
            yield self._chunk(i, said, None if self.asked.is_chat else piece.finish_reason)
        if piece.is_last and self.asked.is_chat:
            yield self._chunk(i, dict(delta={}), piece.finish_reason)
        if self.is_done and self.asked.include_usage:
            yield self._chunk(0, None, None) | dict(usage=self.usage)

    def _chunk(self, i: int, said: dict | None, reason: str | None) -> dict:
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        choices = [] if said is None else [dict(index=i, logprobs=None, finish_reason=reason) | said]
        no_usage_yet = dict(usage=None) if self.asked.include_usage else {}
        return self.head | dict(object=kind, choices=choices) | no_usage_yet
