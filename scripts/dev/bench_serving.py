"""Serve many adapters at once, and one after the other: tokens a second of both, through HTTP.

    python scripts/dev/bench_serving.py                             eight adapters of minilora's own model
    python scripts/dev/bench_serving.py --model DIR --adapters 32 --requests 256 --tokens 128
    python scripts/dev/bench_serving.py --requests 10000 --tokens 2 --once     does memory grow?

    --model assets/base            the base model; adapters on all its linear layers have random values
    --adapters 8 --lora_rank 16    how many, and their rank
    --requests 64 --prompt 32 --tokens 64    requests in all, the tokens of each prompt, and of its answer
    --max_num_seqs N               answers at once; default: as in serve.py
    --once                         the requests of all adapters together, and nothing to compare with
    --seed 0                       of adapters and prompts

All other keys are the trainer's: --quantization_bit 4, --bf16.

Together: up to 128 requests are sent at once, and the batch is a mixture of all adapters. One after the
other: the requests of an adapter are sent so, and those of the next when all of them are answered, as a
server must that changes its adapter. Tokens are counted, since an answer may end itself before --tokens.
Memory is the process's own, with the clients in it, after a tenth of the requests and at the end.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import asyncio
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
import torch

from minilora.adapters.save_load import save_adapter
from minilora.config import LoraConfig
from minilora.inference.load import prepare_inference
from minilora.lora import add_lora, remove_lora
from minilora.model import CausalLM
from minilora.rope import context_length
from minilora.run.settings import parse_with_keys
from minilora.serving.server import Limits, load_app, running
from minilora.system.errors import ArgumentParser, UserError, run_script

CLIENTS = 128  # connections at once
COUNTS = dict(adapters=8, lora_rank=16, requests=64, prompt=32, tokens=64)


def main() -> None:
    options, keys = parse_options()
    base = prepare_inference(options.model, [], keys)
    length, positions = options.prompt + options.tokens, context_length(base.model_config)
    if length > positions:
        given = f"--prompt {options.prompt} and --tokens {options.tokens}"
        raise UserError(f"{given} are more than the {positions} positions of the model; shorten them")
    with tempfile.TemporaryDirectory() as folder:
        names = write_adapters(base.load_base(), options, Path(folder))
        setup = prepare_inference(options.model, [str(Path(folder, name)) for name in names], keys)
        adapters = dict(max_loras=len(names), max_cpu_loras=len(names))
        sizes = dict(max_num_seqs=options.max_num_seqs, max_model_len=length, max_waiting=CLIENTS)
        app = load_app(setup, keys, "base", Limits(**sizes, **adapters))
        bodies = requests_for(names, app.models.vocab_size, options)
        with running(app) as address:
            compare(address, bodies, names, options.once)


def requests_for(names: Sequence[str], vocab_size: int, options: argparse.Namespace) -> list[dict]:
    """Return the bodies of all requests, the adapters in turn."""
    draw, same = random.Random(options.seed), dict(max_tokens=options.tokens, temperature=0)
    prompts = [draw.choices(range(3, vocab_size), k=options.prompt) for _ in range(options.requests)]
    return [dict(model=names[i % len(names)], prompt=prompt) | same for i, prompt in enumerate(prompts)]


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, checked, and the trainer's keys."""
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--model", default="assets/base")
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max_num_seqs", type=int)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options, keys = parse_with_keys(parser)
    for name in COUNTS:
        if not 1 <= getattr(options, name) <= 1 << 20:
            raise UserError(
                f"--{name} must be at least 1 and at most {1 << 20}, not {getattr(options, name)}"
            )
    return options, keys


def write_adapters(model: CausalLM, options: argparse.Namespace, folder: Path) -> list[str]:
    """Write random adapters, each into a directory of its name. Returns the names."""
    names = [f"adapter{i}" for i in range(options.adapters)]
    generator = torch.Generator().manual_seed(options.seed)
    for name in names:
        add_lora(
            model,
            LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules="all-linear"),
            name,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, folder / name, name, options.model)
        remove_lora(model, name)
    return names


def compare(address: str, bodies: Sequence[dict], names: Sequence[str], once: bool) -> None:
    """Send the requests in both orders, print what came of it, and what memory the process has."""
    asyncio.run(ask(address, bodies[: len(names)]))  # each adapter was used once
    asyncio.run(ask(address, bodies[: len(bodies) // 10]))
    before = resident_memory()
    together = asyncio.run(ask(address, bodies))
    print(f"together             {together:10.1f} tokens/s, {len(bodies)} requests for {len(names)} adapters")
    if not once:
        groups = [[body for body in bodies if body["model"] == name] for name in names]
        alone = asyncio.run(ask(address, *filter(None, groups)))
        print(f"one after the other  {alone:10.1f} tokens/s")
        print(f"together is {together / alone:.2f} times as fast")
    if before:
        after = resident_memory()
        print(f"memory               {before / 2**20:10.1f} MiB at first, {after / 2**20:.1f} MiB at the end")


async def ask(address: str, *groups: Sequence[dict]) -> float:
    """Send the requests of each group, CLIENTS at once, then those of the next. Returns tokens a second."""
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=address, timeout=None, limits=limits) as client:

        async def send(bodies: Iterator[dict]) -> int:  # one after the other; others send from the same list
            written = 0
            for body in bodies:
                answer = await client.post("/completions", json=body)
                written += answer.raise_for_status().json()["usage"]["completion_tokens"]
            return written

        began, written = time.perf_counter(), 0
        for group in groups:
            bodies = iter(group)
            written += sum(await asyncio.gather(*(send(bodies) for _ in range(CLIENTS))))
        return written / (time.perf_counter() - began)


def resident_memory() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    found = re.search(r"^VmRSS:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    run_script(main)
