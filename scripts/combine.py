"""Add LoRA adapters of one base model, each times a weight, into one plain LoRA adapter.

    python scripts/combine.py --adapter one:0.7 --adapter two:0.3 --output new
    python scripts/combine.py --adapter one:1 --adapter two:-0.5 --combination_type cat --output new

    --adapter ADAPTER:WEIGHT     may be repeated; a directory or a hub id, and the weight of its update
    --output DIRECTORY           a new directory
    --combination_type svd       the nearest adapter of rank --svd_rank to the sum (the default)
                       cat       exactly the sum; its rank is the sum of the ranks
                       linear    the factors are added, not their products: rough; all ranks must be equal
    --svd_rank RANK              default: the adapters' largest rank

These are PEFT's `add_weighted_adapter`. The script prints each layer's error, the norm of the difference to
the exact sum over the sum's norm, and whether the new adapter loads in PEFT, vLLM and SGLang. The output
appears complete or not at all. No base model is read.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import math
from pathlib import Path

from minilora.adapters.arithmetic import COMBINATION_TYPES, Adapter, combine, errors_text
from minilora.adapters.lint import findings_text, lint_adapter
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, A, B, tensor_key
from minilora.adapters.plain import write_plain_adapter
from minilora.adapters.save_load import AdapterFile, read_adapter
from minilora.config import LoraConfig
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import check_writable, read_json
from minilora.system.hub import resolve_model
from minilora.system.outputs import check_output, whole_output
from minilora.targets import matching_names, ranks_and_alphas


def main() -> None:
    options = parse_options()
    names, weights = zip(*map(weighted, options.adapter), strict=True)
    check_options(options)
    directories = [resolve_model(name) for name in names]
    configs, adapters = zip(*map(read_updates, directories), strict=True)
    combined, errors = combine(list(adapters), list(weights), options.combination_type, options.svd_rank)
    targets = target_names(configs, list(combined))
    with whole_output("output", options.output) as part:
        write_plain_adapter(part, combined, targets, base_model(directories))
    print(f"{options.combination_type}: error of each layer against the exact sum")
    print(errors_text(errors))
    rank = len(next(iter(combined.values()))[0])
    print(f"{options.output} holds the sum as plain LoRA: r {rank}, scaling 1, {len(combined)} layers")
    print(findings_text(lint_adapter(options.output)))


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--combination_type", choices=COMBINATION_TYPES, default="svd")
    parser.add_argument("--svd_rank", type=int)
    parser.add_argument("--output", type=local_path, required=True)
    return parser.parse_args()


def weighted(text: str) -> tuple[str, float]:
    """The adapter and the weight of "ADAPTER:WEIGHT"."""
    name, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise UserError(f"--adapter {text!r} must be ADAPTER:WEIGHT, such as {text.rstrip(':')}:0.5")
    return name, weight


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for a rank that means nothing, and for an output that cannot be written."""
    if options.svd_rank is not None and options.combination_type != "svd":
        raise UserError("--svd_rank holds for --combination_type svd only: leave it out")
    if options.svd_rank is not None and options.svd_rank < 1:
        raise UserError(f"--svd_rank must be at least 1, not {options.svd_rank}")
    if options.output.exists():
        raise UserError(f"output {options.output} exists; choose another directory, or remove it first")
    check_writable("output", options.output, parents=True)
    check_output("output", options.output)


def read_updates(directory: Path) -> tuple[LoraConfig, Adapter]:
    """An adapter's configuration, and its A, B and scaling by layer. Raises UserError if it holds more."""
    adapter = read_adapter(directory)
    if more := beside_updates(adapter):
        raise UserError(f"{directory} {more}: merge it, with merge.py")
    config, updates = adapter.config, {}
    for layer, (r, alpha) in ranks_and_alphas(adapter.layers, config).items():
        parts = adapter.modules[layer]
        updates[layer] = parts[A].float(), parts[B].float(), config.scaling_of(r, alpha)
    return config, updates


def beside_updates(adapter: AdapterFile) -> str:
    """In words, what an adapter does beside adding scaling * B A to weights; an empty text: nothing."""
    config = adapter.config
    if config.use_dora:
        return "is a DoRA adapter, which is no sum with W"
    if config.use_vera:
        return "is a VeRA adapter, whose A and B depend on the base model"
    if config.init_lora_weights is not True:
        return f"started with a part of W (init_lora_weights = {config.init_lora_weights!r})"
    others = [tensor_key(m, part) for m, parts in adapter.modules.items() for part in parts.keys() - {A, B}]
    return f"holds {sorted(others)[0]}, which is no A and no B of a linear layer" if others else ""


def target_names(configs: list[LoraConfig], layers: list[str]) -> list[str]:
    """The names of all configurations together, if these choose the layers; else the layers' full names."""
    for config in configs:
        if (
            isinstance(config.target_modules, str)
            or config.exclude_modules
            or config.layers_to_transform != ()
        ):
            return layers
    names = sorted({name for config in configs for name in config.target_modules})
    return [name for name in names if matching_names(layers, [name])]


def base_model(directories: list[Path]) -> str | None:
    """The base model that the adapters name. Prints a note if they name different ones."""
    names = {read_json(path / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") for path in directories}
    if len(names) > 1:
        print(f"note: the adapters name different base models: {', '.join(sorted(map(repr, names)))}")
    return next(iter(names)) if len(names) == 1 else None


if __name__ == "__main__":
    run_script(main)
