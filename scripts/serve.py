"""Serve a model and many adapters at once, by OpenAI's API: each request names the one that answers.

    python scripts/serve.py --adapter sql=runs/a --adapter tutor=runs/b
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sql", "messages": [{"role": "user", "content": "How many customers are there?"}]}'

Needs `pip install 'minilora[serve]'`. docs/serving.md has examples, and says when to take vLLM or SGLang.

    --model DIR                                   default: the model that the adapters name, or assets/base
    --served_model_name NAME                      what clients call it; default: the words behind --model,
                                                  or what the first adapter calls its base
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
import sys
from dataclasses import fields

from minilora.inference.assistant import GenerationSettings
from minilora.inference.load import add_model_options, prepare_inference
from minilora.run.settings import parse_with_keys
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script

KEY_VARIABLE = "MINILORA_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMITS = dict(max_num_seqs=None, max_model_len=None, max_loras=8, max_cpu_loras=32, max_waiting=256)


def main() -> None:
    options, keys = parse_options()
    try:
        from minilora.serving.server import Limits, Server, load_app, open_socket
    except ModuleNotFoundError as error:
        missing = f"serving needs the package {str(error.name).partition('.')[0]}, which is missing"
        raise UserError(f"{missing}: pip install 'minilora[serve]'") from error
    limits = Limits(**{name: getattr(options, name) for name in LIMITS})
    settings = GenerationSettings(**{f.name: getattr(options, f.name) for f in fields(GenerationSettings)})
    is_local = options.host in LOOPBACK
    access = dict(api_key=options.api_key, adapter_dir=options.adapter_dir, local_only=is_local)
    with open_socket(
        options.host, options.port
    ) as listener:  # before weights are read, which may take minutes
        setup = prepare_inference(options.model, options.adapter, keys)
        name = options.served_model_name or options.model
        app = load_app(setup, keys, name, limits, settings, **access, grace=options.grace)
        names = ", ".join(app.models.by_name)
        if not is_local and not options.api_key:
            problem = f"warning: whoever reaches {options.host} may ask, as there is no key"
            print(f"{problem}; set {KEY_VARIABLE}", file=sys.stderr)
        if options.dry_run:
            print(f"would serve {names}")
            return

        def ready(address: str) -> None:
            print(f"{address} serves {names}", flush=True)

        Server(app, listener, ready).serve_until_stopped()


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, checked, and the trainer's keys."""
    parser = ArgumentParser(help_text=__doc__)
    add_model_options(parser)
    for name in ("served_model_name", "api_key"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapter_dir", type=local_path)
    for name, default in LIMITS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--dry_run", action="store_true")
    for field in fields(GenerationSettings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options, keys = parse_with_keys(parser)
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port must be from 0 (a free one) to 65535, not {options.port}")
    if not 0 <= options.grace <= 3600:
        raise UserError(f"--grace must be from 0 to 3600 seconds, not {options.grace:g}")
    if options.adapter_dir and not options.adapter_dir.is_dir():
        raise UserError(f"--adapter_dir {str(options.adapter_dir)!r} is no directory")
    options.api_key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if options.api_key and not re.fullmatch("[!-~]+", options.api_key):
        problem = f"the key of --api_key or {KEY_VARIABLE} holds a blank or a sign that is not ASCII"
        raise UserError(f"{problem}; choose another one")
    return options, keys


if __name__ == "__main__":
    run_script(main)
