"""From a model and its adapters to a server that listens: in this thread, or in one of its own.

    setup = prepare_inference(None, ["sql=runs/a", "tutor=runs/b"], keys=[])
    app = load_app(setup, keys=[])
    with running(app) as address:                  # http://127.0.0.1:PORT/v1
        ...

scripts/serve.py does the same without the thread, until a signal comes.
"""

import asyncio
import logging
import math
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE
from minilora.inference.assistant import GenerationSettings
from minilora.inference.load import BASE, InferenceSetup
from minilora.inference.store import AdapterStore
from minilora.memory.ledger import available_memory
from minilora.serving.app import App
from minilora.serving.engine import Engine
from minilora.serving.models import Models
from minilora.serving.sizes import choose_sizes
from minilora.serving.slots import SlotCache
from minilora.system.errors import UserError
from minilora.system.files import read_json

CONNECTIONS = 512  # at once; the next ones get status 503
SLACK = 5  # seconds after the grace, for the last step and for what is on its way to the clients


@dataclass(frozen=True)
class Limits:
    """How much there is of everything, by vLLM's names. None: chosen, see sizes.py."""

    max_num_seqs: int | None = None  # answers at once
    max_model_len: int | None = None  # tokens of one, with its prompt
    max_loras: int = 8  # adapters on the device
    max_cpu_loras: int = 32  # and in main memory, those on the device among them
    max_waiting: int = 256  # requests that wait for a slot

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 2 if name == "max_model_len" else 1
            if value is not None and not least <= value <= 1 << 24:
                raise UserError(f"{name} must be at least {least} and at most {1 << 24}, not {value}")
        if self.max_cpu_loras < self.max_loras:
            numbers = f"{self.max_cpu_loras} is less than max_loras = {self.max_loras}"
            raise UserError(f"max_cpu_loras = {numbers}, and counts those on the device, too")


def load_app(
    setup: InferenceSetup,
    keys: Sequence[str],  # the trainer's keys, as for `prepare_inference`
    name: str | None = None,  # of the base model; None: see `name_of_base`
    limits: Limits = Limits(),
    defaults: GenerationSettings = GenerationSettings(),  # noqa: B008
    **settings: object,  # api_key, adapter_dir, local_only, grace: see App
) -> App:
    """Load the base model, read the adapters, and return the application that serves them.

    Says on stderr how many answers fit. Raises UserError.
    """
    name = name or name_of_base(setup)
    if name in setup.adapters:
        raise UserError(f"{name!r} is the name of an adapter and of the base model; choose another one")
    model = setup.load_base().eval()
    models = Models(setup, model, name, keys)
    store = AdapterStore(model, limits.max_loras, limits.max_cpu_loras)
    for adapter, directory in setup.adapters.items():
        store.register(adapter, directory)
    table = model.model.norm.weight
    free, asked = available_memory(table.device), (limits.max_num_seqs, limits.max_model_len)
    sizes = choose_sizes(model.config, table.dtype, table.device.type, free, *asked)
    setup.describe(model)
    print(sizes, file=sys.stderr)
    cache = SlotCache(model.config, sizes.slots, sizes.max_length, table.dtype, table.device)
    return App(Engine(model, store, cache, limits.max_waiting), models, defaults, **settings)


def name_of_base(setup: InferenceSetup) -> str:
    """Return what the first adapter calls its base model, or else the name of the base's directory."""
    directory = next(iter(setup.adapters.values()), None)
    named = read_json(Path(directory, ADAPTER_CONFIG_FILE)) if directory else {}
    return str(named.get("base_model_name_or_path") or setup.base.name or BASE)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket at an address of this machine. Raises UserError if that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "is no address of this machine"
        raise UserError(f"--host {host} --port {port}: {reason}; choose another one") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server over an App and a bound socket. `run` ends after a signal, which it raises again.

    At the end the engine has the grace for its answers; only then does it fail them, so that every client is
    told. uvicorn waits for that, and a little longer. A second Ctrl-C ends the grace.
    """

    def __init__(self, app: App, listener: socket.socket, ready: Callable[[str], object]):
        config = uvicorn.Config(
            app.asgi, log_level="warning", access_log=False, server_header=False, http="h11", ws="none",
            lifespan="on", limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(app.grace) + SLACK,
        )  # fmt: skip
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_worth_a_traceback)
        self.app, self.listener, self.ready = app, listener, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and call `ready` with the address."""
        await super().startup(sockets)
        host, port = self.listener.getsockname()[:2]
        self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and let those that there are end."""
        if wanted := self.app.engine.stop(self.app.grace, wait=False):
            how_long = f"at most {self.app.grace:g} s; Ctrl-C again to stop after this token"
            print(f"stopping when all answers ({wanted}) have ended, {how_long}", file=sys.stderr)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves this out, and PyTorch aborts if the engine's thread still runs
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal, in its handler."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            self.app.engine.stop(wait=False)

    def serve_until_stopped(self) -> None:
        self.run(sockets=[self.listener])


def _is_worth_a_traceback(record: logging.LogRecord) -> bool:
    """Whether a record of uvicorn's is more than a request that it gave up, which another line says."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextmanager
def running(app: App, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread of its own. Yields the address behind which the routes lie."""
    addresses, is_ready = [], threading.Event()

    def ready(address: str) -> None:
        addresses.append(address)
        is_ready.set()

    with open_socket(host, port) as listener:
        server = Server(app, listener, ready)
        thread = threading.Thread(target=server.serve_until_stopped, name="server", daemon=True)
        thread.start()
        try:
            while not is_ready.wait(0.05):
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
            yield addresses[0]
        finally:
            server.should_exit = True
            thread.join()
