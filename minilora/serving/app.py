"""The HTTP side, by Starlette: OpenAI's routes over an engine.

    POST /v1/chat/completions, /v1/completions      answers, whole or as server-sent events
    GET  /v1/models, /v1/models/NAME                the base model and each adapter; one of them
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter   by vLLM's names; only with an adapter directory
    GET  /health, /metrics

A body has at most MOST_BYTES, comes within SECONDS, and is application/json: a browser sends that to another
site's server only after asking it, and this one never consents. Without a key, the Host must be this
machine's name, so that no page reaches the server under a name of its own (DNS rebinding).

Templates are rendered and texts encoded in worker threads: a stranger's template may take seconds.
"""

import asyncio
import contextlib
import hmac
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minilora.inference.assistant import GenerationSettings
from minilora.serving.engine import STOPS, Engine, Stopped
from minilora.serving.metrics import Metrics
from minilora.serving.models import Models, Served
from minilora.serving.protocol import ApiError, model_of, parse_body, understand
from minilora.serving.replies import Answering, EventStream
from minilora.system.errors import UserError, one_line, suggestion

MOST_BYTES = 4 << 20
SECONDS = 30  # for a body to come
LOCAL = ("localhost", "127.0.0.1", "[::1]")
Handler = Callable[[HttpRequest], Awaitable[Response]]


class App:
    """The routes over one engine; `asgi` is what a server runs."""

    def __init__(
        self,
        engine: Engine,
        models: Models,
        defaults: GenerationSettings,
        api_key: str | None = None,
        adapter_dir: Path | None = None,  # where clients may load adapters from; None: they may not
        local_only: bool = True,  # whether only names of this machine are its Host
        grace: float = 10.0,  # seconds for answers that run when the server stops
    ):
        self.engine, self.models, self.defaults = engine, models, defaults
        self.api_key, self.adapter_dir, self.local_only, self.grace = api_key, adapter_dir, local_only, grace
        self.metrics, self.loading = Metrics(engine), asyncio.Lock()
        routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.complete),
            "/v1/models": ("GET", self.list_models),
            "/v1/models/{name:path}": ("GET", self.show_model),
            "/v1/load_lora_adapter": ("POST", self.load_adapter),
            "/v1/unload_lora_adapter": ("POST", self.unload_adapter),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.read_metrics),
        }
        listed = [
            Route(path, self._guarded(handler), methods=[method])
            for path, (method, handler) in routes.items()
        ]
        self.asgi = Starlette(
            routes=listed, lifespan=self._lifespan, exception_handlers={HTTPException: _no_route}
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await anyio.to_thread.run_sync(self.engine.stop, self.grace)

    def _guarded(self, handler: Handler) -> Handler:
        """Return a handler that checks who asks, and answers every error with OpenAI's object."""

        async def guarded(request: HttpRequest) -> Response:
            try:
                self._check_caller(request)
                return await handler(request)
            except ApiError as error:
                return error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # a bug: one line here, none of it for the client
                print(f"error: {request.url.path}: {one_line(repr(error))}", file=sys.stderr)
                return error_response(ApiError(500, "the server made a mistake; its log says which"))

        return guarded

    def _check_caller(self, request: HttpRequest) -> None:
        if request.url.path == "/health":
            return
        if self.api_key is None:
            host = request.headers.get("host", "").lower()
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if self.local_only and name not in LOCAL:
                raise ApiError(403, f"Host: {name!r} is no name of this machine; ask {', '.join(LOCAL)}")
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("utf-8", "surrogateescape"), self.api_key.encode()
        ):
            raise ApiError(
                401, "the key is wrong or missing: Authorization: Bearer KEY", code="invalid_api_key"
            )

    # ---- answers ----

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, is_chat=True)

    async def complete(self, http: HttpRequest) -> Response:
        return await self._answer(http, is_chat=False)

    async def _answer(self, http: HttpRequest, is_chat: bool) -> Response:
        name = ""  # of a model that exists
        try:
            body = await read_body(http)
            served = self._served(model_of(body))
            name = served.name
            sizes = self.engine.cache.max_length, self.models.vocab_size
            asked = await anyio.to_thread.run_sync(understand, body, served, self.defaults, is_chat, *sizes)
            if self.models.by_name.get(name) is not served:  # it was unloaded in the meantime
                raise ApiError(404, f"model {name!r} was unloaded", "model", "model_not_found")
            answering = Answering(self.engine, asked, self.metrics)
        except ApiError as error:
            self.metrics.ended(name, "full" if error.status == 429 else "refused")
            raise
        if asked.stream:
            return EventStream(answering)
        return await answering.whole(http)

    def _served(self, name: str) -> Served:
        if name not in self.models.by_name:
            nearest = suggestion(name, self.models.by_name, "GET /v1/models lists the names")
            raise ApiError(404, f"model {name!r} does not exist{nearest}", "model", "model_not_found")
        return self.models.by_name[name]

    # ---- adapters ----

    async def list_models(self, http: HttpRequest) -> Response:
        return JSONResponse(dict(object="list", data=self.models.listed()))

    async def show_model(self, http: HttpRequest) -> Response:
        return JSONResponse(self._served(http.path_params["name"]).entry(self.models.base_name))

    async def load_adapter(self, http: HttpRequest) -> Response:
        body = await read_body(http)
        name, path = self._texts(body, "lora_name", "lora_path")

        def read() -> tuple[Path, Served]:
            directory = self.models.find(name, path, self.adapter_dir)
            return directory, self.models.read(name, directory)

        try:
            async with self.loading:
                directory, served = await anyio.to_thread.run_sync(read)
                await self._change(lambda: self.engine.store.register(name, directory))
                self.models.by_name[name] = served
                print(f"loaded {name} from {str(directory)!r}", file=sys.stderr)
        except UserError as error:
            raise ApiError(400, str(error)) from error
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    async def unload_adapter(self, http: HttpRequest) -> Response:
        (name,) = self._texts(await read_body(http), "lora_name")
        served = self.models.by_name.get(name)
        if served is None or served.adapter is None:
            raise ApiError(404, f"lora_name = {name!r} is no adapter that is loaded", "lora_name")
        del self.models.by_name[name]  # from now on nobody may ask for it
        self.models.leaving.add(name)

        def forget() -> None:
            self.engine.store.forget(name)
            self.models.leaving.discard(name)

        await self._change(forget, adapter=name)  # when those who asked have their answers
        print(f"unloaded {name}", file=sys.stderr)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")

    def _texts(self, body: dict, *names: str) -> list[str]:
        if self.adapter_dir is None:
            raise ApiError(403, "adapters are fixed: the server was started without --adapter_dir")
        for name in [name for name in body if name not in names]:
            raise ApiError(400, f"{name} is not known here{suggestion(name, names)}", name[:80])
        for name in names:
            if not isinstance(body.get(name), str):
                raise ApiError(400, f"{name} must be a text", name)
        return [body[name] for name in names]

    async def _change(self, function: Callable[[], object], adapter: str | None = None) -> object:
        """Let the engine's thread call a function. It happens even if the client leaves."""
        try:
            future: Future = self.engine.call(function, adapter)
            return await asyncio.shield(asyncio.wrap_future(future))
        except Stopped as error:
            raise ApiError(503, STOPS) from error

    # ---- for those who run it ----

    async def health(self, http: HttpRequest) -> Response:
        alive = self.engine.is_alive
        return JSONResponse(dict(status="ok" if alive else "stopped"), 200 if alive else 503)

    async def read_metrics(self, http: HttpRequest) -> Response:
        figures = await self._change(self.engine.store.figures)  # which one thread at a time may ask
        return Response(self.metrics.text(figures), media_type="text/plain; version=0.0.4; charset=utf-8")


def error_response(error: ApiError) -> Response:
    """Return OpenAI's error object; for a full queue, with when to try again."""
    retry = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error.body, error.status, retry)


async def _no_route(http: HttpRequest, error: HTTPException) -> Response:
    known = [route.path for route in http.app.routes if "{" not in route.path]
    missing = f"does not exist; there are {', '.join(known)}"
    what = missing if error.status_code == 404 else f"knows no {http.method}"
    return error_response(ApiError(error.status_code, f"{http.url.path} {what}"))


async def read_body(http: HttpRequest) -> dict:
    """Return the object that a client sent. Raises ApiError, and ClientDisconnect."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind!r}; send application/json")
    raw = bytearray()
    try:
        with anyio.fail_after(SECONDS):
            async for part in http.stream():
                raw += part
                if len(raw) > MOST_BYTES:
                    raise ApiError(413, f"the body has over {MOST_BYTES:,} bytes, the most that is read")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {SECONDS} seconds") from error
    return await anyio.to_thread.run_sync(parse_body, bytes(raw))
