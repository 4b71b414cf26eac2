"""How much memory will a training run need, and does it fit? This reads only the model's config.json.

    # Mistral-7B on a GPU of 16 GB
    python scripts/memory.py --model mistral-7b --gpu 16 --per_device_train_batch_size 4 --cutoff_len 1024 \\
        --optim adamw_8bit
    # the trainer's settings file, on this machine
    python scripts/memory.py --config run.yaml

Keys are the trainer's (`python scripts/train.py --help`), such as --bf16 false for float32. Further options:

    --gpu GB            a GPU with this many gigabytes (10^9 bytes), instead of this machine
    --picture FILE      file of the bar chart (default: memory.png)
    --processes N       train with so many processes, each with a GPU of its own (default: 1); the key
                        --parallel says whether they share the model, and by default that is chosen
    --link GB_PER_S     gigabytes a second that a process receives from the others: the time of a step
    --tflops N          10^12 operations a second that a process reaches: the same

--model is a directory, a hub id, or the name of a well-known shape: mistral-7b, llama-2-7b, llama-3-8b,
qwen2.5-7b, tinyllama-1.1b, llama-2-70b, llama-3-70b.

    # Llama-2-70B on two GPUs of 24 GB
    python scripts/memory.py --model llama-2-70b --gpu 24 --processes 2 --link 25 --tflops 80
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import io
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from minilora.config import ModelConfig
from minilora.formats.config_json import parse_config, read_config_file
from minilora.formats.weights import MODEL_CONFIG_FILE, StoredTensors, read_config
from minilora.memory.ledger import (
    CATEGORIES,
    CUDA_CONTEXT,
    MARGIN,
    Ledger,
    available_memory,
    process_memory,
)
from minilora.memory.planner import advise, choose_recompute, fastest_that_fits
from minilora.memory.ranks import choose_parallel, rank_ledger
from minilora.memory.stored_layers import InFiles
from minilora.memory.traffic import StepSeconds, Traffic, step_seconds, step_traffic
from minilora.recompute import POLICIES
from minilora.run.settings import TrainConfig, load_train_config, parse_with_keys
from minilora.run.vocabulary import train_rows
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.device import choose_placement, requested_dtype
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import check_picture, write_whole

GB = 10**9
LARGEST_GPU = 1_000_000  # GB
MOST_PROCESSES = 100_000
WIDTH = 12  # of a column, in characters
FITS = "fits, with a tenth to spare"


def _shape(model_type: str, V: int, D: int, F: int, layers: int, H: int, G: int) -> ModelConfig:
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers)
    heads = dict(num_attention_heads=H, num_key_value_heads=G, max_position_embeddings=32768)
    return parse_config(dict(model_type=model_type, **sizes, **heads))


SHAPES = {
    "mistral-7b": _shape("mistral", 32000, 4096, 14336, 32, 32, 8),
    "llama-2-7b": _shape("llama", 32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": _shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "qwen2.5-7b": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "tinyllama-1.1b": _shape("llama", 32000, 2048, 5632, 22, 32, 4),
    "llama-2-70b": _shape("llama", 32000, 8192, 28672, 80, 64, 8),
    "llama-3-70b": _shape("llama", 128256, 8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Target:
    """The machine that a run must fit on."""

    device: str  # cuda or cpu
    dtype: torch.dtype  # of activations and unquantized weights
    memory: float  # free bytes
    process: int  # bytes of the process before it holds a model, where they count
    description: str


def main() -> None:
    options, config = read_options()
    name = config.model_name_or_path or str(EMBEDDED_MODEL)
    model_config = find_model_config(name, config.model_revision, config.accepted_fields())
    in_files = find_quantized_layers(name)
    N = options.processes
    target = this_machine(config, N) if options.gpu is None else gpu_of_size(options.gpu, config)
    batch_size = config.per_device_train_batch_size
    length = config.cutoff_len or min(1024, model_config.max_position_embeddings)
    tokens = range(len(sum(config.new_tokens(), ())))  # any rows will do: what counts is how many
    lora = train_rows(config.lora_config(), [*tokens], model_config)
    model = model_config, lora, config.quant_config()
    ledger_of = partial(
        rank_ledger,
        *model,
        dtype=target.dtype,
        optim=config.optim,
        device=target.device,
        eval_batch_size=config.per_device_eval_batch_size if config.eval_dataset or config.val_size else 0,
        process=target.process,
        in_files=in_files,
    )
    of_batch = partial(ledger_of, batch_size=batch_size, length=length)
    of_batch(recompute="full")  # raises UserError for an adapter that the model cannot have
    model_name, what = config.model_name_or_path or "assets/base", describe(config, target.dtype, in_files)
    machines = f"{N} processes, each with " * (N > 1) + target.description
    print(f"{model_name}, {batch_size} x {length} tokens, {what}, on {machines}\n")
    if N > 1:
        traffic_of = partial(step_traffic, *model, dtype=target.dtype, in_files=in_files)
        parallel = print_processes(of_batch, traffic_of, options, config, target)
        ledger_of = partial(ledger_of, processes=N, parallel=parallel, offload=config.fsdp_offload)
    policies = [policy for policy in POLICIES if policy != "offload" or target.device == "cuda"]
    of_batch = partial(ledger_of, batch_size=batch_size, length=length)
    ledgers = {policy: of_batch(recompute=policy) for policy in policies}
    planned = fastest_that_fits(target.memory, of_batch)
    if planned is not None and planned.recompute not in policies:
        ledgers["auto"] = planned

    print_table(ledgers, target.memory)
    if "auto" in ledgers:
        print(f"auto: {planned.recompute}")
    print_micro_batches(ledger_of, policies, batch_size, length, target.memory)
    print()
    print_advice(advise(target.memory, ledger_of, batch_size, length), config, length)
    limits = {f"fits {target.description}": target.memory / MARGIN}
    write_whole(options.picture, draw_picture(ledgers, limits))
    print(f"bar chart: {options.picture}")


def read_options() -> tuple[Namespace, TrainConfig]:
    """Return this script's own options and the trainer's settings, all checked."""
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--gpu", type=float)
    parser.add_argument("--picture", type=local_path, default="memory.png")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--link", type=float)
    parser.add_argument("--tflops", type=float)
    options, keys = parse_with_keys(parser)
    config = load_train_config(keys)
    check_options(options)
    check_picture("--picture", options.picture)
    return options, config


def check_options(options: Namespace) -> None:
    """Raise UserError for a value that is none, and for options of processes where there is but one."""
    if options.gpu is not None and not 0 < options.gpu <= LARGEST_GPU:
        raise UserError(
            f"--gpu must be a number of gigabytes above 0 and at most {LARGEST_GPU:,}, not {options.gpu:g}"
        )
    if not 1 <= options.processes <= MOST_PROCESSES:
        raise UserError(f"--processes must be from 1 to {MOST_PROCESSES:,}, not {options.processes}")
    for name in ("link", "tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1e6:
            raise UserError(f"--{name} must be above 0 and at most 1,000,000, not {value:g}")
    for name in ("link", "tflops"):
        if options.processes == 1 and getattr(options, name) is not None:
            raise UserError(f"--{name} is about several processes; say how many with --processes")
    if (options.link is None) != (options.tflops is None):
        raise UserError("--link and --tflops give the time of a step together; set both or neither")


def gpu_of_size(gigabytes: float, config: TrainConfig) -> Target:
    """A GPU with this much memory, part of which the CUDA context takes."""
    dtype = requested_dtype(config.bf16, config.fp16) or torch.float16
    memory = gigabytes * GB - CUDA_CONTEXT
    return Target("cuda", dtype, memory, process=0, description=f"a GPU of {gigabytes:g} GB")


def this_machine(config: TrainConfig, processes: int) -> Target:
    """The device that the trainer would use here, with its free memory. Processes on a CPU share it."""
    placement = choose_placement(config.bf16, config.fp16)
    device, memory = placement.device.type, available_memory(placement.device)
    if memory is None:
        raise UserError("this system does not report how much memory is free; choose a GPU with --gpu GB")
    process, memory = (process_memory(), memory // processes) if device == "cpu" else (0, memory)
    share = "its part of " * (device == "cpu" and processes > 1)
    description = f"{share}the {memory / GB:.1f} GB that are free"
    return Target(device, placement.dtype, memory, process, description)


def find_model_config(name: str, revision: str | None, accepted: Collection[str] = ()) -> ModelConfig:
    """The config of a well-known shape, a directory or a hub id. Only config.json is downloaded."""
    if name in SHAPES:
        return SHAPES[name]
    if Path(name).expanduser().is_dir():
        return read_config(Path(name).expanduser(), accepted)
    from huggingface_hub import errors, hf_hub_download

    try:
        return read_config_file(hf_hub_download(name, MODEL_CONFIG_FILE, revision=revision), accepted)
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"{name!r} is not a directory, not one of {', '.join(SHAPES)}, and the hub does not return its "
            f"config.json ({type(error).__name__}); check the name, the network and your login"
        ) from error


def find_quantized_layers(name: str) -> dict[str, InFiles] | None:
    """The layers that the author of a local directory quantized. None: the settings say how to quantize.

    Nothing is downloaded, and a directory may hold config.json alone.
    """
    directory = Path(name).expanduser()
    if name in SHAPES or not any(directory.glob("*.safetensors")):
        return None
    return StoredTensors(directory).quantized_layers()


def describe(config: TrainConfig, dtype: torch.dtype, in_files: dict[str, InFiles] | None) -> str:
    """Adapter, weights, optimizer and dtype in a few words, for the first printed line."""
    lora, quant = config.lora_config(), config.quant_config()
    targets = lora.target_modules if isinstance(lora.target_modules, str) else " ".join(lora.target_modules)
    weights = "unquantized" if quant is None else "int8" if quant.bits == 8 else quant.quant_type
    if in_files is not None:
        weights = f"{len(in_files)} layers quantized as in the files"
    rank = f"r {lora.r} on {targets}, dropout {lora.lora_dropout:g}"
    return f"{rank}, {weights}, {config.optim}, {str(dtype).removeprefix('torch.')}"


def print_processes(
    ledger_of: Callable[..., Ledger],
    traffic_of: Callable[..., Traffic],
    options: Namespace,
    config: TrainConfig,
    target: Target,
) -> str:
    """Print a column for each way to train with several processes. Return the chosen one: ddp or fsdp."""
    N, steps = options.processes, config.gradient_accumulation_steps
    traffic_of = partial(traffic_of, processes=N, micro_batches=steps)

    @cache
    def plan_of(**kind) -> Ledger:
        return choose_recompute(target.memory, partial(ledger_of, **kind))[0]

    def time_of(ledger: Ledger, **kind) -> StepSeconds:
        rates = dict(flop_rate=options.tflops * 1e12, byte_rate=options.link * GB)
        return step_seconds(ledger, traffic_of(**kind), micro_batches=steps, **rates)

    kinds = {"ddp": dict(parallel="ddp")}
    if config.finetuning_type != "full":  # which leaves no frozen weights to share
        kinds["fsdp"] = dict(parallel="fsdp")
        if target.device == "cuda":
            kinds["offloaded"] = dict(parallel="fsdp", offload=True)
    ledgers = {name: plan_of(processes=N, **kind) for name, kind in kinds.items()}
    print_ways(ledgers, target.memory)
    print_row("received in a step", [f"{traffic_of(**kind).total / GB:.3f}" for kind in kinds.values()])
    if options.link is not None:
        times = [time_of(ledger, **kinds[name]) for name, ledger in ledgers.items()]
        tokens = N * steps * ledgers["ddp"].batch_size * ledgers["ddp"].length
        print_row("s a step, gathers hidden", [f"{time.least:.3g}" for time in times])
        print_row("s a step, none hidden", [f"{time.most:.3g}" for time in times])
        print_row("tokens a second, at most", [f"{tokens / time.least:,.0f}" for time in times])
    print(f"\n{steps} micro-batch{'es' * (steps > 1)} a step in each process; ", end="")
    print("recompute: layers off/selective/full, or one word for all")
    if config.parallel != "auto":
        parallel, reason = config.parallel, "as requested"
    elif "fsdp" not in kinds:
        parallel, reason = "ddp", "trains all weights"
    else:
        longest = None if options.link is None else lambda ledger, kind: time_of(ledger, parallel=kind).most
        parallel, _, reason = choose_parallel(target.memory, N, plan_of, longest)
    print(f"{parallel}: {reason}\n\neach process with {parallel}, by recompute policy:")
    return parallel


def print_ways(ledgers: dict[str, Ledger], memory: float) -> None:
    """Print gigabytes by part at the peak, with one column for each way to train with several processes."""
    print_row("GB in each process", list(ledgers))
    for part, (categories, _) in PARTS.items():
        sums = [sum(ledger.bytes[name] for name in categories) for ledger in ledgers.values()]
        if any(sums):
            print_row(part, [f"{size / GB:.3f}" for size in sums])
    print_row("peak", [f"{ledger.peak / GB:.3f}" for ledger in ledgers.values()])
    print_row(FITS, [yes_or_no(ledger.fits(memory)) for ledger in ledgers.values()])
    print_row("recompute", [short_plan(ledger) for ledger in ledgers.values()])


def short_plan(ledger: Ledger) -> str:
    """A recompute plan in a word or three numbers."""
    counts = [ledger.policies.count(policy) for policy in ("off", "selective", "full")]
    return ledger.recompute if ledger.recompute in POLICIES else "/".join(map(str, counts))


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def print_table(named: dict[str, Ledger], memory: float) -> None:
    """Print gigabytes by category at the peak, with one column for each recompute policy."""
    ledgers = list(named.values())
    row = partial(print_row, width=max(WIDTH, *(len(ledger.moment) + 2 for ledger in ledgers)))
    row("GB", list(named))
    for category in CATEGORIES:
        if any(ledger.bytes[category] for ledger in ledgers):
            row(category, [f"{ledger.bytes[category] / GB:.3f}" for ledger in ledgers])
    row("peak", [f"{ledger.peak / GB:.3f}" for ledger in ledgers])
    row("  in", [ledger.moment for ledger in ledgers])
    row(FITS, [yes_or_no(ledger.fits(memory)) for ledger in ledgers])
    fastest = ledgers[0].flop_per_token
    row("relative speed, by FLOPs", [f"{fastest / ledger.flop_per_token:.2f}" for ledger in ledgers])


def print_micro_batches(
    ledger_of: Callable[..., Ledger], policies: Sequence[str], batch_size: int, length: int, memory: float
) -> None:
    """Print the peaks of smaller micro-batches; gradient accumulation turns them into the same step."""
    for size in (n for n in range(batch_size - 1, 0, -1) if batch_size % n == 0):
        ledgers = [ledger_of(batch_size=size, length=length, recompute=policy) for policy in policies]
        peaks = [f"{ledger.peak / GB:.3f}" + ("" if ledger.fits(memory) else " no") for ledger in ledgers]
        print_row(f"peak at {size} x {length}", peaks)


def print_row(name: str, cells: Sequence[str], width: int = WIDTH) -> None:
    print(f"{name:<28}" + "".join(f"{cell:>{width}}" for cell in cells))


def print_advice(choices: Sequence[Ledger], config: TrainConfig, length: int) -> None:
    """Print the trainer's keys for settings that fit, each choice faster than the one before.

    A plan with several policies is what `auto` finds by itself.
    """
    if not choices:
        print("advice: nothing fits; take a smaller model or a larger GPU")
    for i, ledger in enumerate(choices):
        mixed = ledger.recompute not in POLICIES
        keys = [f"--gradient_checkpointing {'auto' if mixed else ledger.recompute}"]
        if ledger.batch_size != config.per_device_train_batch_size:
            examples = config.gradient_accumulation_steps * config.per_device_train_batch_size
            keys.append(f"--per_device_train_batch_size {ledger.batch_size}")
            keys.append(f"--gradient_accumulation_steps {examples // ledger.batch_size}")
        if ledger.length != length:
            keys.append(f"--cutoff_len {ledger.length}")
        speed = choices[0].flop_per_token / ledger.flop_per_token
        lead = "advice:" if i == 0 else f"or, {speed:.2f} times as fast:"
        plan = f"{ledger.recompute}; " if mixed else ""
        print(f"{lead} {' '.join(keys)}   ({plan}{ledger.peak / GB:.2f} GB)")


def draw_picture(ledgers: dict[str, Ledger], limits: dict[str, float]) -> bytes:
    """A PNG with one bar for each recompute policy; see `draw_bars`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(8.6, 4.6), layout="constrained")
    draw_bars(figure.subplots(), ledgers, limits)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return picture.getvalue()


PARTS = {  # of a bar: label -> categories that it sums up, colour
    "program": (("process",), "#d8d8d8"),
    "frozen weights and scales": (("linear weights", "scales"), "#3b6ea5"),
    "embeddings, head, norms": (("embeddings, head, norms",), "#7fa6cf"),
    "gathered weights": (("gathered weights",), "#b9cfe4"),
    "adapter, gradients, moments": (
        ("adapter", "gradients", "summed gradients", "optimizer states"),
        "#5a9367",
    ),
    "scratch": (("scratch",), "#b5cfa8"),
    "layer inputs": (("layer inputs",), "#d1662f"),
    "kept activations": (("kept activations",), "#efa67c"),
    "attention masks": (("attention masks",), "#c9b79c"),
    "the layer at work": (("live layer",), "#f3cf73"),
    "hidden states and logits": (("hidden and logits",), "#9a6fb0"),
}


def draw_bars(axes, ledgers: dict[str, Ledger], limits: dict[str, float]) -> None:
    """Draw the peak of each recompute policy as a stacked bar, and a line at each limit (label -> bytes)."""
    names, bottom = list(ledgers), [0.0] * len(ledgers)
    for part, (categories, colour) in PARTS.items():
        heights = [sum(ledger.bytes[category] for category in categories) / GB for ledger in ledgers.values()]
        if max(heights) > 0:
            axes.bar(names, heights, 0.6, bottom=bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for x, top in enumerate(bottom):
        axes.text(x, top, f"{top:.3g}", ha="center", va="bottom", fontweight="bold")
    right = len(ledgers) - 0.5
    for label, limit in limits.items():
        if limit / GB < 1.3 * max(bottom):  # a line far above would shrink the bars
            axes.axhline(limit / GB, color="#707070", linewidth=1, linestyle="--", zorder=0)
            axes.text(right, limit / GB, label, ha="right", va="bottom", color="#707070", fontsize=9)
    axes.set(ylabel="GB at the peak", xlim=(-0.5, right))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, reverse=True, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)


if __name__ == "__main__":
    run_script(main)
