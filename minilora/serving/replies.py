"""An answer on its way to the client: whole, or as server-sent events.

Pieces come from the engine's thread into the event loop's queue. A client that leaves cancels its requests:
they free their slots at the engine's next step.
"""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from minilora.serving.answers import Piece, Request
from minilora.serving.engine import STOPS, Engine, QueueFull, Stopped
from minilora.serving.metrics import Clock, Metrics
from minilora.serving.protocol import ApiError, Asked
from minilora.serving.writer import Writer


class Answering:
    """The requests of one body, submitted to the engine, and their pieces as they come."""

    def __init__(self, engine: Engine, asked: Asked, metrics: Metrics):
        loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.writer = Writer(asked)
        self.requests: list[Request] = []
        served = asked.served
        try:
            for i, prompt in enumerate(asked.prompts):
                clock = metrics.clock(served.name)

                def tell(piece: Piece, i: int = i, clock: Clock = clock) -> None:
                    clock.note(piece)
                    loop.call_soon_threadsafe(self.pieces.put_nowait, (i, piece))

                who = served.adapter, asked.settings, served.end_ids, served.tokenizer
                request = Request(prompt, *who, tell, asked.stop)
                engine.submit(request)
                self.requests.append(request)
        except (QueueFull, Stopped) as error:
            self.cancel()
            if isinstance(error, Stopped):
                raise ApiError(503, STOPS) from error
            full = f"{engine.most_waiting} requests wait already, the most; try again later"
            raise ApiError(429, full, code="queue_full") from error

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    async def take(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all answers up to their ends. Raises ApiError where one has an error."""
        while not self.writer.is_done:
            i, piece = await self.pieces.get()
            self.writer.add(i, piece)
            yield i, piece

    async def whole(self, http: HttpRequest) -> Response:
        """Return all answers in one body, or cancel them if the client leaves."""

        async def collect() -> None:
            async for _ in self.take():
                pass

        collected, left = asyncio.ensure_future(collect()), asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait({collected, left}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                raise ClientDisconnect
            await collected
        finally:
            self.cancel()
            collected.cancel()
            left.cancel()
        return JSONResponse(self.writer.whole())

    async def events(self) -> AsyncIterator[bytes]:
        """Yield all answers as server-sent events."""
        try:
            for chunk in self.writer.first_chunks():
                yield _event(chunk)
            async for i, piece in self.take():
                for chunk in self.writer.chunks(i, piece):
                    yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)


class EventStream(StreamingResponse):
    """A stream that cancels its requests however it ends, even before it began."""

    def __init__(self, answering: Answering):
        super().__init__(
            answering.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.answering = answering

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.cancel()


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


async def _left(http: HttpRequest) -> None:
    """Return when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
