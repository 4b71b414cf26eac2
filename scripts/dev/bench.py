"""Time QLoRA training steps, beside transformers + bitsandbytes + PEFT doing the same work.

    python scripts/dev/bench.py                  a 50-million-parameter Llama of random weights, 1 x 256 tokens
    python scripts/dev/bench.py --peer           the usual stack as well, and the ratios
    python scripts/dev/bench.py --model DIR --tokens 512 --bf16 --gradient_checkpointing full --peer --output result.json

Each side is a process of its own, so that its peak memory is its own, and reads the same checkpoint. Before
anything is timed, their losses and their gradients on the same tokens are compared. Then steps alternate
between them, so that a machine that slows down slows both, and medians are reported. Of the kernels: how fast
4-bit weights are dequantized, and which share of the machine's own rate of matrix products the whole step
reaches.
"""

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
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora import (
    CausalLM,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    UserError,
    add_lora,
    load_model,
    save_model,
    trainable_parameters,
)
from minilora.backend.choice import product_dtype
from minilora.formats.config_json import parse_config
from minilora.formats.weights import read_config
from minilora.loss import causal_lm_loss
from minilora.memory.allocator import limit_compiled_kernels
from minilora.optim import OPTIMIZERS, make_optimizer
from minilora.quantization import quantize_4bit
from minilora.recompute import POLICIES, set_recompute
from minilora.system.device import Placement, choose_placement, memory_used
from minilora.system.errors import ArgumentParser, run_script
from minilora.system.files import check_writable, write_whole

OURS, PEER = "minilora", "transformers + bitsandbytes + PEFT"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = dict(width=512, layers=8, vocab=32000, batch=1, tokens=256, steps=5)


def main() -> None:
    options = parse_options()
    placement = choose_placement(options.bf16, options.fp16)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = f"{folder}/model"
            write_random_model(options)
        config = read_config(Path(options.model))
        report = describe(options, placement, config)
        for name, value in report.items():
            print(
                f"{name:<12} {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
            )
        report["sides"] = time_sides(options, placement, Path(folder))
        report["kernels"] = time_kernels(placement, config)
    show(report, config, options)
    if options.output:
        write_whole(Path(options.output), json.dumps(report, indent=2) + "\n")
        print(f"written to {options.output}")


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="directory of a model; default: a Llama of random weights and these sizes"
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--quantization_bit", default="4", choices=["4", "none"])
    parser.add_argument(
        "--gradient_checkpointing", default="off", choices=POLICIES, help="the peer recomputes all or nothing"
    )
    parser.add_argument(
        "--optim", default="adamw_8bit", choices=OPTIMIZERS, help="the peer takes bitsandbytes' own"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--fp16", action="store_true", help="compute in float16")
    parser.add_argument("--peer", action="store_true", help=f"time {PEER} beside it")
    parser.add_argument("--output", help="write all figures to this JSON file")
    options = parser.parse_args()
    if min(getattr(options, name) for name in SIZES) < 1 or options.width % 64:
        raise UserError("sizes must be at least 1 and --width a multiple of 64")
    if options.output:
        check_writable("--output", Path(options.output))
    return options


def write_random_model(options: argparse.Namespace) -> None:
    """A Llama of random bfloat16 weights, as a directory in the hub's layout."""
    config = dict(
        model_type="llama",
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
    )
    config |= dict(
        intermediate_size=11 * options.width // 4 // 64 * 64, num_attention_heads=options.width // 64
    )
    model = CausalLM(parse_config(config | dict(max_position_embeddings=max(2048, options.tokens))))
    model.init_weights()
    save_model(model.to(torch.bfloat16), options.model)


def describe(options: argparse.Namespace, placement: Placement, config: ModelConfig) -> dict:
    """What is timed, on what, with which versions."""
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if placement.device.type == "cuda":
        machine = torch.cuda.get_device_name(placement.device)
    packages = ("torch", *("transformers", "peft", "bitsandbytes") * options.peer)
    names = "batch tokens steps quantization_bit gradient_checkpointing optim".split()
    return {
        "date": date.today().isoformat(),
        "machine": machine,
        "computed on": str(placement),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "model": f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, V {config.vocab_size}",
        "settings": {name: getattr(options, name) for name in names},
    }


# ---- the process that compares and times ----------------------------------------------------------------------------


def time_sides(options: argparse.Namespace, placement: Placement, folder: Path) -> dict[str, dict]:
    """Name of the side -> seconds to load, of every step and of the median one; tokens a second; peak bytes."""
    sides = {OURS: load_ours} | ({PEER: load_peer} if options.peer else {})
    with contextlib.ExitStack() as stack:
        ask = {
            name: stack.enter_context(side_process(load, options, placement)) for name, load in sides.items()
        }
        results = {name: dict(load_seconds=ask[name](None)) for name in sides}
        files = {name: folder / f"{i}.safetensors" for i, name in enumerate(sides)}
        losses = {name: ask[name](file) for name, file in files.items()}
        if options.peer:
            compare(losses, {name: load_file(file) for name, file in files.items()}, placement.dtype)
        for step in range(options.steps + 1):
            for name in sides:
                seconds, results[name]["peak_bytes"] = ask[name](step)
                results[name].setdefault("step_seconds", []).extend(
                    [seconds] * (step > 0)
                )  # the first one warms up
    for result in results.values():
        result["median_seconds"] = statistics.median(result["step_seconds"])
        result["tokens_per_second"] = options.batch * options.tokens / result["median_seconds"]
    return results


@contextlib.contextmanager
def side_process(load: Callable, options: argparse.Namespace, placement: Placement):
    """A process with a model of its own; yields a function that tells it what to do and waits for the answer."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, load, options, placement), daemon=True
    )
    process.start()
    there.close()

    def ask(what):
        here.send(what)
        try:
            return here.recv()
        except EOFError:
            raise UserError("one side failed; what it said is above") from None

    yield ask
    here.close()
    process.join()


def compare(losses: dict[str, float], gradients: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Stop unless both sides have the same loss and the same gradients."""
    ours, theirs = gradients[OURS], gradients[PEER]
    assert ours.keys() == theirs.keys()
    worst = max(((ours[k] - g).norm() / g.norm()).item() for k, g in theirs.items())
    gap = abs(losses[OURS] - losses[PEER]) / losses[PEER]
    print(
        f"{'the same?':<12} loss {losses[OURS]:.5f} and {losses[PEER]:.5f}, gradients differ by at most {worst:.1e} in the norm"
    )
    # float32: as in the tests. Half precision: several hundred roundings of 2^-9 one after the other, at
    # random, on each side: sqrt(700) 2^-9 = 5 %.
    allowed = 1e-4 if dtype == torch.float32 else 1e-1
    if not (worst <= allowed and gap <= allowed):
        raise UserError(f"the two sides do not compute the same (allowed: {allowed:g}); nothing was timed")


# ---- the process of one side ----------------------------------------------------------------------------------------


def serve(connection: Connection, load: Callable, options: argparse.Namespace, placement: Placement) -> None:
    """Load on None, write the gradients of one batch on a path, take a step on a number; answer with what is
    wanted.
    """
    loss_of = named = optimizer = None
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        start = now(placement.device)
        if what is None:
            loss_of, named, optimizer = load(options, placement)
            connection.send(now(placement.device) - start)
            continue
        step = what if isinstance(what, int) else 0
        generator = torch.Generator().manual_seed(step)
        vocab_size = read_config(Path(options.model)).vocab_size
        ids = torch.randint(0, vocab_size, (options.batch, options.tokens), generator=generator).to(
            placement.device
        )
        start = now(placement.device)
        loss = loss_of(ids)
        loss.backward()
        if isinstance(what, Path):
            save_file({name: p.grad.float().cpu() for name, p in named.items() if p.grad.any()}, what)
            optimizer.zero_grad()
            connection.send(loss.item())
        else:
            optimizer.step()
            optimizer.zero_grad()
            connection.send((now(placement.device) - start, memory_used(placement.device)))


def load_ours(options: argparse.Namespace, placement: Placement):
    """(loss of a batch, trainable parameters by name, optimizer)."""
    limit_compiled_kernels()
    quant = QuantConfig() if options.quantization_bit == "4" else None
    model = load_model(options.model, quant, placement.dtype, placement.device)
    torch.manual_seed(1)
    add_lora(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    set_recompute(model, options.gradient_checkpointing)
    named = trainable_parameters(model.train())
    optimizer = make_optimizer(options.optim, named, lr=2e-4, weight_decay=0.0)
    return (
        (lambda ids: causal_lm_loss(model, ids, ids) / (ids.shape[0] * (ids.shape[1] - 1))),
        named,
        optimizer,
    )


def load_peer(options: argparse.Namespace, placement: Placement):
    """The same in transformers + bitsandbytes + PEFT, with A as it is here."""
    import bitsandbytes
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quant = None
    if options.quantization_bit == "4":
        kind = dict(
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=placement.dtype
        )
        quant = transformers.BitsAndBytesConfig(load_in_4bit=True, **kind)
    where = {"": str(placement.device)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=placement.dtype, device_map=where, quantization_config=quant
    )
    recompute = options.gradient_checkpointing != "off"
    if quant is not None:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {re.sub(r"base_model\.model\.|\.weight$", "", name): p for name, p in named.items()}
    torch.manual_seed(1)
    for name, parameter in named.items():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    optimizers = {
        "adamw_8bit": "AdamW8bit",
        "adamw_bnb_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
    }
    kind = (
        getattr(bitsandbytes.optim, optimizers[options.optim])
        if options.optim in optimizers
        else torch.optim.AdamW
    )
    return (
        (lambda ids: model.train()(input_ids=ids, labels=ids).loss),
        named,
        kind(named.values(), lr=2e-4, weight_decay=0.0),
    )


# ---- the kernels' part, and the figures -----------------------------------------------------------------------------


def time_kernels(placement: Placement, config: ModelConfig) -> dict[str, float]:
    """Dequantization and matrix products of one layer's largest weight, on 1024 rows."""
    device, shape = placement.device, (config.intermediate_size, config.hidden_size)
    x = torch.randn(1024, shape[1], device=device).to(placement.dtype)
    dtype = product_dtype(x)
    q = quantize_4bit(torch.randn(shape, device=device).to(placement.dtype))
    out, wide = torch.empty(shape, dtype=dtype, device=device), x.to(dtype)
    product = torch.empty(1024, shape[0], dtype=dtype, device=device)

    def median_seconds(function: Callable) -> float:
        times = []
        for _ in range(12):
            start = now(device)
            function()
            times.append(now(device) - start)
        return statistics.median(times[2:])

    return {
        "dequantize_bytes_per_second": (q.nbytes + out.nbytes)
        / median_seconds(lambda: q.dequantize(out=out)),
        "product_flop_per_second": 2
        * 1024
        * shape[0]
        * shape[1]
        / median_seconds(lambda: torch.mm(wide, out.T, out=product)),
    }


def step_flop(config: ModelConfig, options: argparse.Namespace) -> float:
    """Floating-point operations of the products of one step: forward, the gradient of the activations, and
    what is recomputed.
    """
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    tokens = options.batch * options.tokens
    linear = 2 * (2 * D * H * K + 2 * D * G * K + 3 * D * F)  # a token, one layer, one pass
    attention = 2 * options.tokens * H * K  # the same: scores and values, half of them seen
    again = {"off": 0, "selective": linear - 2 * D * F, "full": linear - 2 * D * F + attention}
    again["offload"] = again["full"]
    layer = (
        2 * linear + 3.5 * attention + again[options.gradient_checkpointing]
    )  # backward of attention: five products for two
    return tokens * (config.num_hidden_layers * layer + 2 * 2 * D * config.vocab_size)


def show(report: dict, config: ModelConfig, options: argparse.Namespace) -> None:
    """The table, and the shares added to the report."""
    sides, kernels = report["sides"], report["kernels"]
    print(f"\n{'':<36}{'load s':>9}{'step ms':>11}{'tok/s':>11}{'peak GiB':>11}")
    for name, side in sides.items():
        figures = (
            side["load_seconds"],
            1000 * side["median_seconds"],
            side["tokens_per_second"],
            side["peak_bytes"] / 2**30,
        )
        print(f"{name:<36}{figures[0]:>9.1f}{figures[1]:>11,.1f}{figures[2]:>11,.1f}{figures[3]:>11.2f}")
    if PEER in sides:
        wanted = {"load": "load_seconds", "step": "median_seconds", "memory": "peak_bytes"}
        ratios = report["ratios"] = {
            name: sides[PEER][key] / sides[OURS][key] for name, key in wanted.items()
        }
        print(
            f"{'times less than the peer':<36}{ratios['load']:>8.2f}x{ratios['step']:>10.2f}x{'':>11}{ratios['memory']:>10.2f}x"
        )
    rate = kernels["share_of_product_rate"] = (
        step_flop(config, options) / sides[OURS]["median_seconds"] / kernels["product_flop_per_second"]
    )
    print(
        f"\ndequantization {kernels['dequantize_bytes_per_second'] / 1e9:.1f} GB/s; matrix products "
        f"{kernels['product_flop_per_second'] / 1e9:,.0f} GFLOP/s, of which the whole step reaches {rate:.0%}"
    )


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.is_file()
        else None
    )
    return found.group(1) if found else platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run_script(main)
