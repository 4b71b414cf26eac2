"""Time QLoRA training steps, ours and those of transformers + bitsandbytes + PEFT on the same work.

    python scripts/dev/bench.py           a 50-million-parameter Llama of random weights, 1 x 256 tokens
    python scripts/dev/bench.py --peer    the usual stack as well, and the ratios
    python scripts/dev/bench.py --peer --model DIR --tokens 512 --bf16 --gradient_checkpointing full
    python scripts/dev/bench.py --peer --model DIR --data alpaca.json --batch 4 --tokens 512 --steps 20

    --peer                         time transformers + bitsandbytes + PEFT too
    --model DIR                    default: a random Llama of these sizes:
    --width 512 --layers 8 --vocab 32000 --batch 1 --tokens 256 --steps 5
    --data FILE                    train on its examples, cut at --tokens; default: random tokens
    --tokenizer DIR                for --data; default: the model's
    --quantization_bit 4           or none
    --gradient_checkpointing off   or selective, full, offload; the peer recomputes all or nothing
    --optim adamw_8bit             or adamw_torch, adamw_bnb_8bit, paged_adamw_8bit; the peer uses its own
    --bf16, --fp16                 compute in bfloat16 or float16; default: as scripts/train.py
    --output FILE                  write all figures as JSON

Each side (bench_sides.py) reads the same checkpoint in a process of its own, so that its peak memory can be
measured. The script first compares their losses and their gradients on the step with the longest example, and
stops if they differ. Both warm up on that step. Then the steps of the two sides alternate, so that a machine
that slows down slows both.

With --data the steps are on a file's own examples, of any length. Tokens a second count the tokens of
examples, not padding, over all steps. The time of a step is the median.

The limit of each step is the time of its matrix products alone (bench_work.py), measured here as well. The
table says which share of a side's time they are.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bench_sides import load_ours, load_peer
from bench_work import (
    dequantized_bytes_per_second,
    describe_steps,
    longest,
    steps_of,
    time_products,
    useful_tokens,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora import CausalLM, ModelConfig, UserError, save_model
from minilora.data.examples import Example
from minilora.formats.config_json import parse_config
from minilora.formats.weights import read_config
from minilora.optim import OPTIMIZERS
from minilora.recompute import POLICIES
from minilora.system.device import Placement, choose_placement, memory_used
from minilora.system.errors import ArgumentParser, local_path, run_script
from minilora.system.files import check_writable, refuse_overwrite, write_whole

OURS, PEER = "minilora", "transformers + bitsandbytes + PEFT"
SIZES = dict(width=512, layers=8, vocab=32000, batch=1, tokens=256, steps=5)
LARGEST = 1_000_000  # of each of them


def main() -> None:
    options = parse_options()
    placement = choose_placement(options.bf16 or None, options.fp16)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = f"{folder}/model"
            write_random_model(options)
        config = read_config(Path(options.model))
        if options.output:
            refuse_overwrite("--output", options.output, Path(options.model).iterdir())
        steps = steps_of(options, config)
        report = describe(options, placement, config, steps)
        for name, value in report.items():
            pairs = value.items() if isinstance(value, dict) else ()
            print(f"{name:<12} {', '.join(f'{k} {v}' for k, v in pairs) or value}")
        report["sides"] = time_sides(options, placement, steps, Path(folder))
    seconds = time_products(steps, config, options.gradient_checkpointing, placement)
    report["products"] = summary(seconds, steps)
    report["dequantize_bytes_per_second"] = dequantized_bytes_per_second(config, placement)
    show(report)
    if options.output:
        write_whole(options.output, json.dumps(report, indent=2) + "\n")
        print(f"written to {options.output}")


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    for name in ("model", "data", "tokenizer"):
        parser.add_argument(f"--{name}")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quantization_bit", default="4", choices=["4", "none"])
    parser.add_argument("--gradient_checkpointing", default="off", choices=POLICIES)
    parser.add_argument("--optim", default="adamw_8bit", choices=OPTIMIZERS)
    for name in ("bf16", "fp16", "peer"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output", type=local_path)
    options = parser.parse_args()
    for name in SIZES:
        if not 1 <= getattr(options, name) <= LARGEST:
            raise UserError(f"--{name} must be from 1 to {LARGEST:,}, not {getattr(options, name)}")
    if options.width % 64:
        raise UserError(f"--width must be a multiple of 64, not {options.width}")
    if options.data and not (options.tokenizer or options.model):
        raise UserError("--data needs a tokenizer: name its directory, for example --tokenizer assets/base")
    if options.output:
        check_writable("--output", options.output)
    return options


def write_random_model(options: argparse.Namespace) -> None:
    """Write a Llama of random bfloat16 weights to the directory options.model."""
    width, feed_forward = options.width, 11 * options.width // 4 // 64 * 64
    config = dict(model_type="llama", vocab_size=options.vocab, num_hidden_layers=options.layers)
    config |= dict(hidden_size=width, intermediate_size=feed_forward, num_attention_heads=width // 64)
    model = CausalLM(parse_config(config | dict(max_position_embeddings=max(2048, options.tokens))))
    model.init_weights()
    save_model(model.to(torch.bfloat16), options.model)


def describe(
    options: argparse.Namespace, placement: Placement, config: ModelConfig, steps: list[list[Example]]
) -> dict:
    """Return the head of the report: date, machine, versions, model, examples and settings."""
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if placement.device.type == "cuda":
        machine = torch.cuda.get_device_name(placement.device)
    packages = ("torch", *("transformers", "peft", "bitsandbytes") * options.peer)
    names = "batch tokens steps quantization_bit gradient_checkpointing optim".split()
    versions = {"python": platform.python_version()}
    sizes = f"{config.num_hidden_layers} layers of width {config.hidden_size}, V {config.vocab_size}"
    return {
        "date": date.today().isoformat(),
        "machine": machine,
        "computed on": str(placement),
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
        "model": f"{config.model_type}, {sizes}",
        "data": f"{Path(options.data).name if options.data else 'random tokens'}, {describe_steps(steps)}",
        "settings": {name: getattr(options, name) for name in names},
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    line = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return line.group(1) if line else platform.processor() or platform.machine()


# ---- the process that compares and times ---------------------------------------------------------------


def time_sides(
    options: argparse.Namespace, placement: Placement, steps: list[list[Example]], folder: Path
) -> dict[str, dict]:
    """Return, by side: seconds to load, peak bytes, and the `summary` of its steps."""
    sides, first = {OURS: load_ours} | ({PEER: load_peer} if options.peer else {}), max(steps, key=longest)
    seconds = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:
        start = partial(side_process, options=options, placement=placement)
        request = {name: stack.enter_context(start(load)) for name, load in sides.items()}
        results = {name: dict(load_seconds=request[name](None)) for name in sides}
        files = {name: folder / f"{i}.safetensors" for i, name in enumerate(sides)}
        losses = {name: request[name]((first, file)) for name, file in files.items()}
        if options.peer:
            compare(losses, {name: load_file(file) for name, file in files.items()}, placement.dtype)
        for examples in [first, *steps]:
            for name in sides:
                taken, results[name]["peak_bytes"] = request[name]((examples, None))
                seconds[name].append(taken)
    return {name: results[name] | summary(seconds[name][1:], steps) for name in sides}  # the first warms up


def summary(seconds: list[float], steps: list[list[Example]]) -> dict:
    """Return the seconds of every step and of the median one, and the useful tokens a second of them all."""
    return {
        "step_seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "tokens_per_second": sum(map(useful_tokens, steps)) / sum(seconds),
    }


@contextlib.contextmanager
def side_process(load: Callable, options: argparse.Namespace, placement: Placement):
    """Start `serve` in a new process; yield a function that sends it a request and returns the answer."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, load, options, placement), daemon=True)
    process.start()
    there.close()

    def request(message: tuple[list[Example], Path | None] | None):
        here.send(message)
        try:
            return here.recv()
        except EOFError:
            raise UserError("one side failed; its error message is above") from None

    yield request
    here.close()
    process.join()


def compare(losses: dict[str, float], gradients: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Raise UserError unless both sides have the same loss and the same gradients."""
    ours, theirs = gradients[OURS], gradients[PEER]
    assert ours.keys() == theirs.keys()
    worst = max(((ours[k] - g).norm() / g.norm()).item() for k, g in theirs.items())
    gap = abs(losses[OURS] - losses[PEER]) / losses[PEER]
    both = f"loss {losses[OURS]:.5f} and {losses[PEER]:.5f}"
    print(f"{'the same?':<12} {both}, gradients differ by at most {worst:.1e} in the norm")
    # float32: as in the tests. Half precision: each side takes several hundred random roundings of 2^-9, one
    # after the other: sqrt(700) 2^-9 = 5 %.
    allowed = 1e-4 if dtype == torch.float32 else 1e-1
    if not (worst <= allowed and gap <= allowed):
        raise UserError(f"the two sides do not compute the same (allowed: {allowed:g}); nothing was timed")


# ---- the process of one side ---------------------------------------------------------------------------


def serve(connection: Connection, load: Callable, options: argparse.Namespace, placement: Placement) -> None:
    """Answer requests until the other end closes.

    None: load the model -> seconds. Examples and a path: write their gradients there -> the loss. Examples
    and None: take a training step on them -> (seconds, peak bytes so far).
    """
    side, device = None, placement.device
    with contextlib.suppress(EOFError):
        while True:
            message = connection.recv()
            start = now(device)
            if message is None:
                side = load(options, placement)
                connection.send(now(device) - start)
                continue
            examples, file = message
            if file is None:
                side.step(examples)
                connection.send((now(device) - start, memory_used(device)))
            else:
                loss, found = side.gradients(examples)
                save_file(found, file)
                connection.send(loss)


def now(device: torch.device) -> float:
    """Return the time when everything submitted to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- the figures -------------------------------------------------------------------------------------------


def show(report: dict) -> None:
    """Print the table; add the ratios and the share of the products to the report."""
    sides, products = report["sides"], report["products"]
    print(f"\n{'':<36}{'load s':>9}{'step ms':>11}{'tok/s':>11}{'peak GiB':>11}{'products':>11}")
    for name, side in sides.items():
        load, step = side["load_seconds"], 1000 * side["median_seconds"]
        speed, peak = side["tokens_per_second"], side["peak_bytes"] / 2**30
        share = side["share_of_products"] = sum(products["step_seconds"]) / sum(side["step_seconds"])
        print(f"{name:<36}{load:>9.1f}{step:>11,.1f}{speed:>11,.1f}{peak:>11.2f}{share:>11.0%}")
    step, speed = 1000 * products["median_seconds"], products["tokens_per_second"]
    print(f"{'products alone':<36}{'':>9}{step:>11,.1f}{speed:>11,.1f}")
    if PEER in sides:
        keys = {"load": "load_seconds", "step": "median_seconds", "memory": "peak_bytes"}
        ratios = {name: sides[PEER][key] / sides[OURS][key] for name, key in keys.items()}
        ratios["speed"] = sides[OURS]["tokens_per_second"] / sides[PEER]["tokens_per_second"]
        load, step, memory, speed = (f"{ratio:.2f}x" for ratio in ratios.values())
        print(f"{'times better than the peer':<36}{load:>9}{step:>11}{speed:>11}{memory:>11}")
        report["ratios"] = ratios
    print(f"\ndequantization {report['dequantize_bytes_per_second'] / 1e9:.1f} GB/s")


if __name__ == "__main__":
    run_script(main)
