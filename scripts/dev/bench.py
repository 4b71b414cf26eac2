"""Time QLoRA training steps, ours and those of transformers + bitsandbytes + PEFT on the same work.

    python scripts/dev/bench.py           a 50-million-parameter Llama of random weights, 1 x 256 tokens
    python scripts/dev/bench.py --peer    the usual stack as well, and the ratios
    python scripts/dev/bench.py --peer --model DIR --tokens 512 --bf16 --gradient_checkpointing full

Each side reads the same checkpoint in a process of its own, so that its peak memory can be measured. The
script first compares their losses and their gradients on the same tokens, and stops if they differ. Then the
steps of the two sides alternate, so that a machine that slows down slows both. It reports medians. It also
times two parts of a step: the dequantization of 4-bit weights, and the machine's own matrix products. It
prints which share of the rate of these products the whole step reaches.

Each side runs as its users run it: ours as scripts/train.py does, with large freed blocks returned to the
system; the peer as PEFT's and bitsandbytes' documentation shows, in train() mode from the first forward on
(docs/parity.md says what eval() does to bitsandbytes' layers on some CPUs).
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports

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
from dataclasses import dataclass
from datetime import date
from functools import partial
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
from minilora.backend.copies import to_device
from minilora.formats.config_json import parse_config
from minilora.formats.weights import read_config
from minilora.loss import causal_lm_loss
from minilora.memory.allocator import limit_compiled_kernels
from minilora.optim import OPTIMIZERS, make_optimizer
from minilora.quantization import quantize_4bit
from minilora.recompute import POLICIES, set_recompute
from minilora.system.device import Placement, choose_placement, memory_used
from minilora.system.errors import ArgumentParser, local_path, run_script
from minilora.system.files import check_writable, refuse_overwrite, write_whole

OURS, PEER = "minilora", "transformers + bitsandbytes + PEFT"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
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
        report = describe(options, placement, config)
        for name, value in report.items():
            pairs = value.items() if isinstance(value, dict) else ()
            print(f"{name:<12} {', '.join(f'{k} {v}' for k, v in pairs) or value}")
        report["sides"] = time_sides(options, placement, Path(folder))
        report["kernels"] = time_kernels(placement, config)
    show(report, config, options)
    if options.output:
        write_whole(options.output, json.dumps(report, indent=2) + "\n")
        print(f"written to {options.output}")


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a model; default: a random Llama of these sizes")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--quantization_bit", default="4", choices=["4", "none"])
    policy_help, optim_help = "the peer recomputes all or nothing", "the peer uses bitsandbytes' own"
    parser.add_argument("--gradient_checkpointing", default="off", choices=POLICIES, help=policy_help)
    parser.add_argument("--optim", default="adamw_8bit", choices=OPTIMIZERS, help=optim_help)
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; default: as scripts/train.py"
    )
    parser.add_argument("--fp16", action="store_true", help="compute in float16")
    parser.add_argument("--peer", action="store_true", help=f"time {PEER} too")
    parser.add_argument("--output", type=local_path, help="write all figures to this JSON file")
    options = parser.parse_args()
    for name in SIZES:
        if not 1 <= getattr(options, name) <= LARGEST:
            raise UserError(f"--{name} must be from 1 to {LARGEST:,}, not {getattr(options, name)}")
    if options.width % 64:
        raise UserError(f"--width must be a multiple of 64, not {options.width}")
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


def describe(options: argparse.Namespace, placement: Placement, config: ModelConfig) -> dict:
    """Return the head of the report: date, machine, versions, model and settings."""
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
        "settings": {name: getattr(options, name) for name in names},
    }


# ---- the process that compares and times ---------------------------------------------------------------


def time_sides(options: argparse.Namespace, placement: Placement, folder: Path) -> dict[str, dict]:
    """Return, by side: seconds to load, of every step and of the median step; tokens a second; peak bytes."""
    sides = {OURS: load_ours} | ({PEER: load_peer} if options.peer else {})
    with contextlib.ExitStack() as stack:
        start = partial(side_process, options=options, placement=placement)
        request = {name: stack.enter_context(start(load)) for name, load in sides.items()}
        results = {name: dict(load_seconds=request[name](None)) for name in sides}
        files = {name: folder / f"{i}.safetensors" for i, name in enumerate(sides)}
        losses = {name: request[name](file) for name, file in files.items()}
        if options.peer:
            compare(losses, {name: load_file(file) for name, file in files.items()}, placement.dtype)
        for step in range(options.steps + 1):
            for name in sides:
                seconds, results[name]["peak_bytes"] = request[name](step)
                if step > 0:  # the first step warms up
                    results[name].setdefault("step_seconds", []).append(seconds)
    for result in results.values():
        result["median_seconds"] = statistics.median(result["step_seconds"])
        result["tokens_per_second"] = options.batch * options.tokens / result["median_seconds"]
    return results


@contextlib.contextmanager
def side_process(load: Callable, options: argparse.Namespace, placement: Placement):
    """Start `serve` in a new process; yield a function that sends it a request and returns the answer."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, load, options, placement), daemon=True)
    process.start()
    there.close()

    def request(message: None | Path | int):
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


@dataclass(frozen=True)
class Side:
    """A loaded model, ready to train."""

    loss_of: Callable[[Tensor], Tensor]  # (B, T) token ids on the CPU -> the mean loss
    trainable: dict[str, nn.Parameter]  # by the same names on both sides
    optimizer: torch.optim.Optimizer

    def gradients(self, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and every gradient that is not zero, in float32 on the CPU."""
        loss = self.loss_of(ids)
        loss.backward()
        found = {name: p.grad.float().cpu() for name, p in self.trainable.items() if p.grad.any()}
        self.optimizer.zero_grad()
        return loss.item(), found

    def step(self, ids: Tensor) -> None:
        self.loss_of(ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def serve(connection: Connection, load: Callable, options: argparse.Namespace, placement: Placement) -> None:
    """Answer requests until the other end closes.

    None: load the model -> seconds. A path: write the gradients of one batch there -> the loss. A number:
    take that training step -> (seconds, peak bytes so far).
    """
    side, device = None, placement.device
    with contextlib.suppress(EOFError):
        while True:
            message = connection.recv()
            start = now(device)
            if message is None:
                side = load(options, placement)
                connection.send(now(device) - start)
            elif isinstance(message, Path):
                loss, found = side.gradients(tokens_of_step(0, options))
                save_file(found, message)
                connection.send(loss)
            else:
                ids = tokens_of_step(message, options)
                start = now(device)
                side.step(ids)
                connection.send((now(device) - start, memory_used(device)))


def tokens_of_step(step: int, options: argparse.Namespace) -> Tensor:
    """Return random token ids, (B, T), the same for both sides."""
    generator = torch.Generator().manual_seed(step)
    vocab_size = read_config(Path(options.model)).vocab_size
    return torch.randint(0, vocab_size, (options.batch, options.tokens), generator=generator)


def load_ours(options: argparse.Namespace, placement: Placement) -> Side:
    """Load our side, as scripts/train.py does."""
    limit_compiled_kernels()
    quant = QuantConfig() if options.quantization_bit == "4" else None
    model = load_model(options.model, quant, placement.dtype, placement.device)
    torch.manual_seed(1)
    add_lora(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    set_recompute(model, options.gradient_checkpointing)
    named = trainable_parameters(model.train())
    optimizer = make_optimizer(options.optim, named, lr=2e-4, weight_decay=0.0)

    def mean_loss(ids: Tensor) -> Tensor:
        # transformers takes the mean over the tokens that have a next one.
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        return causal_lm_loss(model, to_device(ids, placement.device), ids) / tokens

    return Side(mean_loss, named, optimizer)


def load_peer(options: argparse.Namespace, placement: Placement) -> Side:
    """Load the same in transformers + bitsandbytes + PEFT, with the same A."""
    import peft

    recompute = options.gradient_checkpointing != "off"
    model = load_in_transformers(options, placement)
    if options.quantization_bit == "4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(
        model, config
    ).train()  # before the first forward: from_pretrained calls eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {re.sub(r"base_model\.model\.|\.weight$", "", name): p for name, p in named.items()}
    torch.manual_seed(1)
    for name, parameter in named.items():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    optimizer = peer_optimizer(options.optim)(named.values(), lr=2e-4, weight_decay=0.0)

    def mean_loss(ids: Tensor) -> Tensor:
        ids = to_device(ids, placement.device)
        return model(input_ids=ids, labels=ids).loss

    return Side(mean_loss, named, optimizer)


def load_in_transformers(options: argparse.Namespace, placement: Placement) -> nn.Module:
    """Load the base model of the peer, in 4 bits where the options say so."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    how = dict(dtype=placement.dtype, device_map={"": str(placement.device)})
    if options.quantization_bit == "4":
        quant = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quant |= dict(bnb_4bit_compute_dtype=placement.dtype)
        how |= dict(quantization_config=transformers.BitsAndBytesConfig(**quant))
    return transformers.AutoModelForCausalLM.from_pretrained(options.model, **how)


def peer_optimizer(optim: str) -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' optimizer of the same kind, or PyTorch's for moments in float32."""
    import bitsandbytes

    names = dict(adamw_8bit="AdamW8bit", adamw_bnb_8bit="AdamW8bit", paged_adamw_8bit="PagedAdamW8bit")
    return getattr(bitsandbytes.optim, names[optim]) if optim in names else torch.optim.AdamW


# ---- the kernels' part, and the figures ----------------------------------------------------------------


def time_kernels(placement: Placement, config: ModelConfig) -> dict[str, float]:
    """Time the dequantization and the matrix product of one layer's largest weight, on 1024 rows."""
    device, shape, rows = placement.device, (config.intermediate_size, config.hidden_size), 1024
    x = torch.randn(rows, shape[1], device=device).to(placement.dtype)
    dtype = product_dtype(x)
    q = quantize_4bit(torch.randn(shape, device=device).to(placement.dtype))
    weight, wide = torch.empty(shape, dtype=dtype, device=device), x.to(dtype)
    product = torch.empty(rows, shape[0], dtype=dtype, device=device)
    dequantization = median_seconds(lambda: q.dequantize(out=weight), device)
    multiplication = median_seconds(lambda: torch.mm(wide, weight.T, out=product), device)
    return {
        "dequantize_bytes_per_second": (q.nbytes + weight.nbytes) / dequantization,
        "product_flop_per_second": 2 * rows * shape[0] * shape[1] / multiplication,
    }


def median_seconds(function: Callable, device: torch.device, calls: int = 10) -> float:
    """Return the median time of some calls, after two that warm up.

    On a GPU events take the time there. A kernel of 55 microseconds takes less than to wait for it.
    """
    for _ in range(2):
        function()
    if device.type == "cuda":
        return statistics.median(event_seconds(function, device, calls))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def event_seconds(function: Callable, device: torch.device, calls: int) -> list[float]:
    """Return the time of each call on the GPU. The host waits once, at the end."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
    with torch.cuda.device(device):
        for start, end in zip(events[::2], events[1::2], strict=True):
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in zip(events[::2], events[1::2], strict=True)]


def step_flop(config: ModelConfig, options: argparse.Namespace) -> float:
    """Return the floating-point operations of the matrix products of one step.

    They are those of the forward, of the gradient of the activations, and of the recomputed part.
    """
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    tokens = options.batch * options.tokens
    linear = 2 * (2 * D * H * K + 2 * D * G * K + 3 * D * F)  # per token, layer and pass
    attention = 2 * options.tokens * H * K  # the same: scores and values, half of them masked
    again = {"off": 0, "selective": linear - 2 * D * F, "full": linear - 2 * D * F + attention}
    again["offload"] = again["full"]
    # The backward of attention has five products, its forward two.
    layer = 2 * linear + 3.5 * attention + again[options.gradient_checkpointing]
    return tokens * (config.num_hidden_layers * layer + 2 * 2 * D * config.vocab_size)


def show(report: dict, config: ModelConfig, options: argparse.Namespace) -> None:
    """Print the table; add the ratios and the share of the product rate to the report."""
    sides, kernels = report["sides"], report["kernels"]
    print(f"\n{'':<36}{'load s':>9}{'step ms':>11}{'tok/s':>11}{'peak GiB':>11}")
    for name, side in sides.items():
        load, step = side["load_seconds"], 1000 * side["median_seconds"]
        speed, peak = side["tokens_per_second"], side["peak_bytes"] / 2**30
        print(f"{name:<36}{load:>9.1f}{step:>11,.1f}{speed:>11,.1f}{peak:>11.2f}")
    if PEER in sides:
        keys = {"load": "load_seconds", "step": "median_seconds", "memory": "peak_bytes"}
        ratios = {name: sides[PEER][key] / sides[OURS][key] for name, key in keys.items()}
        load, step, memory = (f"{ratio:.2f}x" for ratio in ratios.values())
        print(f"{'times less than the peer':<36}{load:>9}{step:>11}{'':>11}{memory:>11}")
        report["ratios"] = ratios
    flop_per_second = step_flop(config, options) / sides[OURS]["median_seconds"]
    share = kernels["share_of_product_rate"] = flop_per_second / kernels["product_flop_per_second"]
    dequantized, multiplied = (
        kernels[key] / 1e9 for key in ("dequantize_bytes_per_second", "product_flop_per_second")
    )
    print(f"\ndequantization {dequantized:.1f} GB/s; matrix products {multiplied:,.0f} GFLOP/s, "
          f"of which the whole step reaches {share:.0%}")  # fmt: skip


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    line = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return line.group(1) if line else platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Return the time when everything submitted to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    run_script(main)
