"""Serve a model and many adapters at once, by OpenAI's API: each request names the one that answers.

    python scripts/serve.py --adapter sql=runs/a --adapter tutor=runs/b
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sql", "messages": [{"role": "user", "content": "How many customers are there?"}]}'

Needs `pip install 'minilora[serve]'`. docs/serving.md has examples, and says when to take vLLM or SGLang.

    --model DIR                                   default: the model that the adapters name
    --served_model_name NAME                      what clients call it; default: the words behind --model
    --host 127.0.0.1  --port 8000                 port 0: a free one
    --api_key KEY                                 what clients must send; better in MINILORA_API_KEY
    --adapter_dir DIR                             clients may load adapters from here; default: they may not
    --max_num_seqs N  --max_model_len N           answers at once, and tokens of one with its prompt; default:
                                                  16 of the model's context, or what free memory holds
    --max_loras 8  --max_cpu_loras 32             adapters on the device, and in main memory; others wait on
                                                  the disk
    --max_waiting 256                             requests that wait for a slot; more are refused (429)
    --grace 10                                    seconds for running answers when the server is stopped
    --dry_run                                     load everything, say what would be served, and end

What a request leaves out:

    --temperature 0.7  --top_p 0.9  --top_k 50    as in chat.py; top_k 0 and top_p 1: off
    --repetition_penalty 1  --max_new_tokens 512  --seed 42

All other keys are the trainer's, as in chat.py: the first adapter's run decides how the base is quantized.
Each adapter has the tokenizer and the chat template of its own run; --template NAME gives all of them one.

An answer is the same as chat.py's with these settings, whoever is answered beside it. Ctrl-C and SIGTERM stop
the server: it takes no more requests, gives running answers their grace, and ends.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import os
import re
import socket
import sys
from dataclasses import fields, replace
from pathlib import Path

from minilora.adapters.save_load import ADAPTER_CONFIG_FILE
from minilora.inference.assistant import GenerationSettings
from minilora.inference.load import BASE, InferenceSetup, add_model_options, prepare_inference
from minilora.inference.store import AdapterStore
from minilora.memory.ledger import available_memory
from minilora.serving.engine import Engine
from minilora.serving.models import Models
from minilora.serving.sizes import Sizes, choose_sizes
from minilora.serving.slots import SlotCache
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import read_json

KEY_VARIABLE = "MINILORA_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COUNTS = ("max_num_seqs", "max_model_len", "max_loras", "max_cpu_loras", "max_waiting")


def main() -> None:
    options, keys = parse_options()
    settings = GenerationSettings(**{f.name: getattr(options, f.name) for f in fields(GenerationSettings)})
    check_installed()
    with open_socket(
        options.host, options.port
    ) as listener:  # before weights are read, which may take minutes
        setup = prepare_inference(options.model, options.adapter, keys)
        name = options.served_model_name or name_of_base(options.model, setup)
        if name in setup.adapters:
            raise UserError(f"--served_model_name {name!r} is the name of an adapter; choose another one")
        engine, models, sizes = load(setup, name, keys, options)
        print(sizes, file=sys.stderr)
        if options.dry_run:
            print(f"would serve {', '.join(models.by_name)}")
            return
        serve(engine, models, settings, options, listener)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, checked, and the trainer's keys."""
    parser = ArgumentParser(help_text=__doc__)
    add_model_options(parser)
    for name in ("served_model_name", "api_key"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapter_dir", type=local_path)
    defaults = dict(max_loras=8, max_cpu_loras=32, max_waiting=256)
    for name in COUNTS:
        parser.add_argument(f"--{name}", type=int, default=defaults.get(name))
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--dry_run", action="store_true")
    for field in fields(GenerationSettings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options, keys = parser.parse_known_args()
    for name in COUNTS:
        value = getattr(options, name)
        least = 2 if name == "max_model_len" else 1
        if value is not None and not least <= value <= 1 << 24:
            raise UserError(f"--{name} must be at least {least} and at most {1 << 24}, not {value}")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port must be from 0 (a free one) to 65535, not {options.port}")
    if not 0 <= options.grace <= 3600:
        raise UserError(f"--grace must be from 0 to 3600 seconds, not {options.grace:g}")
    if options.adapter_dir and not options.adapter_dir.is_dir():
        raise UserError(f"--adapter_dir {str(options.adapter_dir)!r} is no directory")
    options.api_key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if options.api_key and not re.fullmatch("[!-~]+", options.api_key):
        raise UserError(
            f"the key of --api_key or {KEY_VARIABLE} may hold letters, digits and signs of ASCII, no blanks"
        )
    return options, keys


def check_installed() -> None:
    """Raise UserError if the extra is missing."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs the package {error.name}, which is missing: pip install 'minilora[serve]'"
        ) from error


def open_socket(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine. Raises UserError if that cannot be had."""
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


def name_of_base(model: str | None, setup: InferenceSetup) -> str:
    """What clients call the base model: as it was named here, or by the first adapter."""
    directory = next(iter(setup.adapters.values()), None)
    named = read_json(directory / ADAPTER_CONFIG_FILE) if directory and not model else {}
    return str(model or named.get("base_model_name_or_path") or BASE)


def load(
    setup: InferenceSetup, name: str, keys: list[str], options: argparse.Namespace
) -> tuple[Engine, Models, Sizes]:
    """The engine over the base model, and the names that it serves."""
    model = replace(setup, adapters={}).load_model()
    models = Models(setup, model, name, keys)
    store = AdapterStore(model, options.max_loras, options.max_cpu_loras)
    for adapter, directory in setup.adapters.items():
        store.register(adapter, directory)
    table = model.model.norm.weight
    free = available_memory(table.device)
    asked = options.max_num_seqs, options.max_model_len
    sizes = choose_sizes(model.config, table.dtype, table.device.type, free, *asked)
    cache = SlotCache(model.config, sizes.slots, sizes.max_length, table.dtype, table.device)
    return Engine(model, store, cache, options.max_waiting), models, sizes


def serve(
    engine: Engine,
    models: Models,
    settings: GenerationSettings,
    options: argparse.Namespace,
    listener: socket.socket,
) -> None:
    """Answer until a signal comes, which then ends the script as it ends every other."""
    import uvicorn

    from minilora.serving.app import App

    is_local = options.host in LOOPBACK
    if not is_local and not options.api_key:
        print(
            f"warning: whoever reaches {options.host} may ask, as there is no key; set {KEY_VARIABLE}",
            file=sys.stderr,
        )
    app = App(engine, models, settings, options.api_key, options.adapter_dir, is_local, options.grace)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}/v1"

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(f"{address} serves {', '.join(models.by_name)}", flush=True)

    config = uvicorn.Config(
        app.asgi, log_level="warning", access_log=False, server_header=False, http="h11", ws="none",
        lifespan="on", timeout_graceful_shutdown=max(1, int(options.grace)),
    )  # fmt: skip
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main)
