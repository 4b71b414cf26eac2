"""Merge a LoRA adapter into its base model, for every program that may run it.

    python scripts/merge.py --adapter outputs --output merged                     transformers, vLLM, minilora
    python scripts/merge.py --adapter outputs --output merged --quantize          the same, quantized again
    python scripts/merge.py --adapter outputs --output model.gguf --outtype q8_0  llama.cpp, Ollama, LM Studio
    python scripts/merge.py --adapter outputs --export_adapter plain              any server; merges nothing

    --adapter ADAPTER               its directory, or its hub id
    --output PATH                   a new directory, or a new file that ends in .gguf
    --export_adapter DIRECTORY      in place of --output: a new directory for the plain adapter
    --model MODEL                   the base model, directory or hub id; default: the one the adapter names
    --into original                 or dequantized, see below; default: original, if the files hold them
    --dtype float32                 or bfloat16, float16, of a directory's weights; default: the base's
    --outtype f16                   or q8_0: of the matrices of a .gguf file; default: f16
    --quantize                      write the matrices quantized, as training had them
    --quantization_type nf4         or fp4; default: as in training, or nf4
    --double_quantization true      or false; default: as in training, or true
    --accept_config_fields NAMES    unknown fields of the base's config.json; default: as in training

An adapter corrects the weights it was trained on. QLoRA trains on Q = dequantize(quantize(W)), which is all
that 4 bits keep of W. So there are two weights to add the adapter to:

    --into original      W + scaling B A   nearer to the base model: undoes the quantization (the default)
    --into dequantized   Q + scaling B A   the weights of training, in every linear layer, adapted or not

A base that its author quantized, whole or in part, holds Q and no W. Training read it as it is, so Q it is in
the layers that its files hold in 4 or 8 bits, and W in the others.

Neither is right in all cases. A table shows how far each lies from Q + scaling B A: the norm of the
difference over the norm. It shows the adapter's own size on the same scale. And it shows the merged weights
quantized once more, which may lose more than the adapter gained; only --quantize writes them. Below the
table stands what follows from its figures. An adapter trained without quantization, or a layer of it, saw W,
and goes into the original weights.

Sums are computed in float32 and rounded once, to the dtype of the base's file or to --dtype; the distances
include this rounding. Memory holds one tensor at a time, and one output file of about 1 GB until it is
written: a 7B model needs less than 4 GB. The output appears complete or not at all.

--export_adapter merges nothing. It writes rsLoRA, ranks and alphas by layer, patterns and chosen layers as
plain LoRA: one rank, one alpha, names. SGLang knows nothing else (minilora/adapters/export.py). Then it
prints for each server whether the adapter loads there, as scripts/lint_adapter.py does.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from minilora.adapters.export import as_plain
from minilora.adapters.file import AdapterFile, write_adapter
from minilora.adapters.lint import findings_text, lint_adapter
from minilora.adapters.merging import Merging
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, PICKLED_WEIGHTS_FILE
from minilora.adapters.save_load import load_adapter, read_adapter
from minilora.config import ModelConfig, QuantConfig
from minilora.data.chat import answer_end
from minilora.data.tokenizer import Tokenizer
from minilora.formats.quantized import (
    QuantizedWeight,
    bitsandbytes_config,
    plain_layers,
    quant_config_of,
    quantize,
    to_entries,
)
from minilora.formats.weights import (
    MODEL_CONFIG_FILE,
    StoredTensors,
    is_redundant,
    read_model,
    write_shards,
)
from minilora.inference.load import find_base, load_adapted_tokenizer, load_run_config
from minilora.initialize import takes_part_of_base
from minilora.model import CausalLM
from minilora.quantization import FLOATS, QUANT_TYPES
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import read_yaml
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, summarize
from minilora.system.files import check_writable, read_json, write_whole
from minilora.system.hub import resolve_model
from minilora.system.locks import LOCK_FILE
from minilora.system.outputs import check_output, whole_output
from minilora.wrapping import match_targets

_MERGING_OPTIONS = (
    "model", "into", "dtype", "quantize", "quantization_type", "double_quantization", "accept_config_fields"
)  # fmt: skip

FLOAT32_ROUNDING = 1e-6  # more than float32 takes from any number, relatively


def main() -> None:
    options = parse_options()
    output = options.export_adapter or options.output
    check_options(options, output)
    adapter = resolve_model(options.adapter)
    if options.export_adapter:
        export_adapter(adapter, output)
    else:
        merge_model(make_plan(adapter, options), output)


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    add, target = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--adapter", required=True)
    target.add_argument("--output", type=local_path)
    target.add_argument("--export_adapter", type=local_path)
    add("--model")
    add("--into", choices=("original", "dequantized"))
    add("--dtype", choices=FLOATS)
    add("--outtype", choices=("f16", "q8_0"))
    add("--quantize", action="store_true")
    add("--quantization_type", choices=QUANT_TYPES)
    add("--double_quantization", choices=("true", "false"))
    add("--accept_config_fields")
    options = parser.parse_args()
    options.to_gguf = options.output is not None and options.output.suffix == ".gguf"
    return options


def check_options(options: argparse.Namespace, output: Path) -> None:
    """Raise UserError for options that contradict one another, and for an output that cannot be written."""
    if options.outtype and not options.to_gguf:
        raise UserError("--outtype holds for a .gguf file only: let --output end in .gguf, or leave it out")
    if options.dtype and options.to_gguf:
        raise UserError(
            "--dtype holds for a directory only: leave it out, or choose the .gguf file's with --outtype"
        )
    if options.quantize and options.to_gguf:
        raise UserError(
            "--quantize writes bitsandbytes' format, which no .gguf file holds: "
            "leave it out, or choose --outtype q8_0"
        )
    stray = [f"--{name}" for name in _MERGING_OPTIONS if getattr(options, name)]
    if options.export_adapter and stray:
        raise UserError(f"--export_adapter merges nothing: leave out {', '.join(stray)}")
    if output.exists():
        raise UserError(f"output {output} exists; choose another directory, or remove it first")
    check_writable("output", output, parents=True)
    check_output("output", output)
    if options.to_gguf:
        import minilora.formats.gguf  # noqa: F401  raises UserError if the gguf package is missing


# ---- everything that can be wrong, before a weight is in memory ----


@dataclass(frozen=True)
class Choice:
    """The weights to add the adapter to, and the quantization that training used."""

    trained_quantized: bool
    into: str  # original | dequantized
    quant: QuantConfig  # of training, and of --quantize
    quantize: bool  # write the merged weights quantized
    dtype: torch.dtype | None  # of the written weights; None: as the base stores them

    @property
    def written(self) -> str:
        """The row of the printed table whose weights are written."""
        return "quantized" if self.quantize else self.into


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    merging: Merging  # the adapter, and what it makes of each tensor
    base: Path
    stored: StoredTensors  # the base model's tensors, still on disk
    base_shapes: dict[str, tuple[int, ...]]  # of the base model's tensors
    shapes: dict[str, tuple[int, ...]]  # of every tensor to write
    quantized: set[str]  # names of the weights that the base's author, QLoRA or --quantize quantizes
    plain: list[str]  # full names of the other linear layers
    tokenizer: Tokenizer
    choice: Choice
    gguf_type: str | None  # f16 | q8_0; None: write a directory

    @property
    def config(self) -> ModelConfig:
        """The merged model's configuration."""
        return self.merging.config


def make_plan(adapter: Path, options: argparse.Namespace) -> Plan:
    """Read the adapter and the base model's headers. Raises UserError if they do not fit together."""
    file = read_adapter(adapter)
    base = find_base(options.model, [adapter])
    config, stored = read_model(base, accepted_fields(options, adapter))
    tokenizer = load_adapted_tokenizer(base, {"adapter": adapter})  # with training's chat template
    merging = Merging(file, config)
    with torch.device("meta"):
        model = CausalLM(config)
    base_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linear = (f"{layer}.weight" for layer in match_targets(model, "all-linear"))
    quantized = set(stored.quantized or linear)
    plain = plain_layers(model, quantized)
    load_adapter(model, adapter)  # The model has shapes and no memory; every tensor must fit it.
    merging.check(base_shapes)
    if (rows := merging.config.vocab_size) < min(config.vocab_size, tokenizer.vocab_size):
        raise UserError(
            f"{adapter} holds an embedding of {rows} rows, too few for the tokenizer's "
            f"{tokenizer.vocab_size} tokens: it was not trained on {base}"
        )
    with torch.device("meta"):
        merged = CausalLM(merging.config)
    stored.check(base_shapes, ignore=is_redundant(config))
    check_start(file, options, stored)
    as_in_files = stored.prequantized
    return Plan(
        merging=merging,
        base=base,
        stored=stored,
        base_shapes=base_shapes,
        shapes={name: tuple(p.shape) for name, p in merged.named_parameters()},
        quantized=quantized,
        plain=plain,
        tokenizer=tokenizer,
        choice=choose_as_in_files(options, stored, base_shapes) if as_in_files else choose(options, file),
        gguf_type=(options.outtype or "f16") if options.to_gguf else None,
    )


def check_start(file: AdapterFile, options: argparse.Namespace, stored: StoredTensors) -> None:
    """Raise UserError for an adapter that took a part out of W, where W is not to be had."""
    kind = file.config.init_lora_weights
    if takes_part_of_base(kind) and (stored.quantized or options.into == "dequantized"):
        raise UserError(
            f"{file.directory} took a part out of the unquantized weights (init_lora_weights = {kind!r}): "
            "merge it into these, with --model, and leave out --into dequantized"
        )


def accepted_fields(options: argparse.Namespace, adapter: Path) -> list[str]:
    """Unknown fields of the base's `config.json` that the user, or else the adapter's run, calls harmless."""
    given = options.accept_config_fields
    keys = [f"--accept_config_fields={given}"] if given else []
    return load_run_config({"adapter": adapter}, keys).accepted_fields()


def choose(options: argparse.Namespace, file: AdapterFile) -> Choice:
    """The choice of weights: by the options, else by the run's settings beside the adapter, else QLoRA's.

    An adapter that took a part out of W was trained on unquantized weights.
    """
    adapter = file.directory
    run = read_yaml(adapter / SETTINGS_FILE) if (adapter / SETTINGS_FILE).exists() else {}
    requested = options.quantization_type is not None or options.double_quantization is not None
    bits = 4 if requested else run.get("quantization_bit", 4)
    bits = None if takes_part_of_base(file.config.init_lora_weights) else bits
    if options.into == "dequantized" and bits not in (4, 8):
        raise UserError(
            f"{adapter} was not trained on weights in 4 bits, nor in 8 (see its {SETTINGS_FILE}): "
            "leave out --into dequantized"
        )
    quant_type = options.quantization_type or run.get("quantization_type", "nf4")
    double_quant = options.double_quantization or run.get("double_quantization", True)
    quant = QuantConfig(8 if bits == 8 else 4, quant_type, str(double_quant).lower() == "true")
    dtype = FLOATS.get(options.dtype)
    return Choice(bits in (4, 8), options.into or "original", quant, options.quantize, dtype)


def choose_as_in_files(
    options: argparse.Namespace, stored: StoredTensors, shapes: dict[str, tuple[int, ...]]
) -> Choice:
    """Quantized files leave no choice: where they hold 4 or 8 bits, the original weights are gone."""
    name, dtype = next(iter(stored.quantized), None), FLOATS.get(options.dtype)
    if name is None:  # Only config.json says that the base is quantized: no weight of it is.
        return Choice(False, "original", QuantConfig(), options.quantize, dtype)
    quant = quant_config_of(stored.read_quantized(name, shapes[name], torch.float32, "cpu"))
    if options.into == "original" or options.quantization_type or options.double_quantization:
        raise UserError(
            f"the files in {stored.directory} hold {quant.bits} bits a weight: "
            "leave out --into original, --quantization_type and --double_quantization"
        )
    print(
        f"the base model's files hold {quant.bits} bits a weight in {len(stored.quantized)} layers, "
        "so only merging into the dequantized weights is possible there"
    )
    return Choice(True, "dequantized", quant, options.quantize, dtype)


# ---- one tensor, then all of them ----


def merge_model(plan: Plan, output: Path) -> None:
    """Write the merged model, and print the errors of each choice."""
    file = plan.merging.adapter
    size = f"r {file.config.r}, scaling {file.config.scaling:g}, {len(file.layers)} layers"
    print(f"merging {file.directory} ({size}) into the {plan.choice.into} weights of {plan.base}")
    merger = Merger(plan)
    differences = []
    if plan.gguf_type is not None:
        from minilora.formats.gguf import write_gguf

        directory, config = plan.tokenizer.directory, plan.config
        differences = write_gguf(output, directory, config, plan.shapes, merger.tensor, plan.gguf_type)
    else:
        write_directory(output, plan, merger)
    if merger.errors:
        print_table(merger.errors, plan.choice)
    for line in recommend(merger, plan):
        print(line)
    if not plan.choice.trained_quantized and not plan.choice.quantize:
        print(
            "training saw the original weights, unquantized: "
            "the output is exactly these weights plus the adapter, rounded once"
        )
    elif merger.exact:
        print(
            f"adapted layers that training saw unquantized: {summarize(merger.exact, 3)}: "
            "exactly their weights plus the adapter, rounded once"
        )
    if whole := plan.merging.replaced:
        print(f"taken from the adapter, whole: {summarize(whole, 3)}")
    if plan.merging.unties:
        print("the merged model has an output head of its own, apart from the embedding")
    for difference in differences:
        print(f"note: {difference}")
    files = output.glob("*.safetensors") if output.is_dir() else [output]
    total = sum(file.stat().st_size for file in files)
    print(f"{output} holds the merged model, {total / 1e6:,.0f} MB")


class Merger:
    """Reads one tensor of the base model at a time, and merges it. Notes the errors of each choice."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.errors: dict[str, dict[str, float]] = {}  # choice -> quantized layer -> relative error
        self.exact: list[str] = []  # adapted layers that are not quantized, and hold W + scaling B A
        # Of sums whose base training saw: "sum" -> layer -> what rounding them takes; "adapter" -> its size.
        self.rounding: dict[str, dict[str, float]] = {}

    def tensor(self, name: str) -> Tensor:
        """The merged tensor to write under a name, unquantized."""
        return self.entries(name)[name]

    def entries(self, name: str) -> dict[str, Tensor]:
        """The entries to write for a tensor: itself, or all of its quantized format."""
        choice = self.plan.choice
        weight, quantized = self._read(name)
        if self.plan.merging.changes(name):
            return self._merged(name, weight, quantized)
        if self._is_quantized(name):  # Bit-identical to training. Quantizing dequantized weights is not.
            return to_entries(replace(quantized, dtype=choice.dtype or quantized.dtype), name)
        as_stored = quantized is None or choice.into == "original"
        value = weight.to(choice.dtype or weight.dtype) if as_stored else quantized.dequantize(choice.dtype)
        return {name: self._finite(name, value)}

    def _is_quantized(self, name: str) -> bool:
        """Whether the tensor is written quantized."""
        return self.plan.choice.quantize and name in self.plan.quantized

    def _read(self, name: str) -> tuple[Tensor | None, QuantizedWeight | None]:
        """The weight as the file holds it, and quantized as training saw it. Either may be None."""
        plan, choice = self.plan, self.plan.choice
        name, changed = plan.merging.source(name), plan.merging.changes(name)
        if name in plan.stored.quantized:
            shape, dtype = plan.base_shapes[name], FLOATS[plan.config.dtype]
            return None, plan.stored.read_quantized(name, shape, dtype, "cpu")
        weight = plan.stored.read(name, None, "cpu")
        if plan.merging.replaces(name):
            return weight, None  # training saw the adapter's own weight
        adapted = choice.trained_quantized and changed
        if name in plan.quantized and (choice.quantize or choice.into == "dequantized" or adapted):
            return weight, quantize(weight, choice.quant)
        return weight, None

    def _merged(
        self, name: str, weight: Tensor | None, quantized: QuantizedWeight | None
    ) -> dict[str, Tensor]:
        """The entries to write for an adapted weight."""
        layer, choice = name.removesuffix(".weight"), self.plan.choice
        bases = {}  # choice -> (out, in)
        if weight is not None:
            bases["original"] = weight
        if quantized is not None and choice.trained_quantized:
            bases["dequantized"] = quantized.dequantize(torch.float32)
        sums = {key: self.plan.merging.merged(name, base) for key, base in bases.items()}  # float32
        # A layer that training did not quantize has one sum, whatever the choice for the others.
        into = choice.into if choice.into in sums else "original"
        dtype = choice.dtype or (weight.dtype if quantized is None else quantized.dtype)
        rounded = {key: total.to(dtype) for key, total in sums.items()}
        self._finite(name, rounded[into])
        seen = "dequantized" if "dequantized" in sums else "original"
        if (
            not self.plan.merging.replaces(name) and bases[seen].shape == sums[seen].shape
        ):  # as large as before
            note(self.rounding, "sum", layer, rounded[seen], sums[seen])
            note(self.rounding, "adapter", layer, bases[seen], sums[seen])
        if quantized is None:
            if not self.plan.merging.replaces(name):
                self.exact.append(layer)
            if self._is_quantized(name):
                return to_entries(replace(quantize(sums[into], choice.quant), dtype=dtype), name)
            return {name: rounded[into]}
        again = replace(quantize(sums[into], quant_config_of(quantized)), dtype=dtype)
        values = rounded | {"quantized": again.dequantize(torch.float32), "adapter": bases[seen]}
        for key, value in values.items():
            note(self.errors, key, layer, value, sums[seen])
        return to_entries(again, name) if self._is_quantized(name) else {name: rounded[into]}

    def _finite(self, name: str, value: Tensor) -> Tensor:
        """The tensor to write. Raises UserError if a number in it is infinite or NaN."""
        if not value.isfinite().all():
            reason = "; the adapter or the base model is damaged"
            if self.plan.choice.dtype == torch.float16:
                reason = ", which ends at 65504; choose another --dtype"
            raise UserError(f"{name} is infinite or NaN once merged, in {value.dtype}{reason}")
        return value


def note(errors: dict[str, dict[str, float]], choice: str, layer: str, value: Tensor, seen: Tensor) -> None:
    """Note how far `value` lies from the sum that training saw."""
    errors.setdefault(choice, {})[layer] = ((value - seen).norm() / seen.norm()).item()


def print_table(errors: dict[str, dict[str, float]], choice: Choice) -> None:
    """The worst and the median error of each choice, over the adapted layers that training quantized."""
    rows = {
        "original": "original weights merged",
        "dequantized": "dequantized weights merged",
        "quantized": f"{choice.into} weights merged, quantized",
        "adapter": "for comparison: the adapter itself",
    }
    kind = "int8" if choice.quant.bits == 8 else choice.quant.quant_type
    kind += ", double quantization" * (choice.quant.bits == 4 and choice.quant.double_quant)
    seen = kind if choice.trained_quantized else f"unquantized weights; quantized: {kind}"
    print(f"relative error against what training saw: {seen}")
    print(f"{'':41}   worst   median")
    for key, text in rows.items():
        if key in errors:
            worst, middle = max(errors[key].values()), median(errors[key].values())
            mark = "   <- written" * (key == choice.written)
            print(f"  {text:38}{worst:>9.1e}{middle:>9.1e}{mark}")


def recommend(merger: Merger, plan: Plan) -> list[str]:
    """What follows from the medians of the table, in words; nothing where they leave nothing to decide."""
    distances, rounding = (
        {key: median(of_layers.values()) for key, of_layers in errors.items()}
        for errors in (merger.errors, merger.rounding)
    )
    lines, size = [], distances.get("adapter", 0)
    if plan.choice.quantize:
        if (again := distances.get("quantized", 0)) > size:
            lines.append(
                f"leave out --quantize: so written, weights lie {again:.1e} from the trained ones, and the "
                f"adapter is {size:.1e}"
            )
        return lines
    if {"original", "dequantized"} <= distances.keys():
        near, far = sorted(("original", "dequantized"), key=distances.get)
        times = f"{distances[far] / size:,.1f} times the adapter's size" if size else "and the adapter is 0"
        lines.append(
            f"--into {near} is the model that was trained, within {distances[near]:.1e}; --into {far} is "
            f"{distances[far]:.1e} away, {times}"
        )
        lines.append("evaluate.py --model says which of them answers better, for a merge of each")
    lost, size = rounding.get("sum", 0), rounding.get("adapter", 0)
    if plan.gguf_type is None and size and lost > max(size / 10, FLOAT32_ROUNDING):
        lines.append(
            f"rounding takes {lost:.1e}, and the adapter is {size:.1e}: --dtype float32 keeps all of it"
        )
    return lines


# ---- the files ----


def write_directory(output: Path, plan: Plan, merger: Merger) -> None:
    """Write a model directory, which appears whole."""
    names = tqdm(plan.shapes, unit=" tensors", leave=False, disable=None)
    with whole_output("output", output) as part:
        plan.tokenizer.save(part)
        write_generation_config(plan, part)
        write_config(plan, part)
        write_shards(map(merger.entries, names), part)


def write_generation_config(plan: Plan, directory: Path) -> None:
    """The base model's `generation_config.json`, with the token that ends answers under the chat template."""
    path = plan.base / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    ends = raw.get("eos_token_id") or list(plan.config.eos_token_ids) or [plan.tokenizer.eos_id]
    ends = ends if isinstance(ends, list) else [ends]
    if (end := answer_end(plan.tokenizer)) is not None and end not in ends:
        raw["eos_token_id"] = [*ends, end]
    if raw:
        write_whole(directory / path.name, json.dumps(raw, indent=2) + "\n")


def write_config(plan: Plan, directory: Path) -> None:
    """The base model's `config.json`, with a `quantization_config` only if the weights are quantized."""
    raw = json.loads((plan.base / MODEL_CONFIG_FILE).read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)
    raw["tie_word_embeddings"] = plan.config.tie_word_embeddings  # as the files hold the head
    raw["vocab_size"] = plan.config.vocab_size
    dtype = plan.config.dtype
    if plan.choice.dtype is not None:
        dtype = str(plan.choice.dtype).removeprefix("torch.")
        raw |= {key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"torch_dtype": dtype}
    if plan.choice.quantize:
        raw["quantization_config"] = bitsandbytes_config(plan.choice.quant, plan.plain, dtype)
    write_whole(directory / MODEL_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


# ---- the adapter alone ----


def export_adapter(adapter: Path, output: Path) -> None:
    """Write an adapter as plain LoRA (adapters/export.py). Raises UserError if that cannot express it."""
    file = read_adapter(adapter)
    plain = as_plain(file, read_json(adapter / ADAPTER_CONFIG_FILE))
    with whole_output("output", output) as part:
        part.mkdir()
        for path in filter(Path.is_file, adapter.iterdir()):
            # SGLang reads every safetensors file of a directory, so only the adapter's own is written.
            if path.suffix != ".safetensors" and path.name not in (PICKLED_WEIGHTS_FILE, LOCK_FILE):
                write_whole(part / path.name, path.read_bytes())
        write_adapter(part, plain.config, plain.tensors)
    alphas = f"alpha {file.config.lora_alpha:g} -> {plain.config['lora_alpha']:g}"
    print(f"{output} holds the adapter as plain LoRA: {alphas}, scaling {plain.scaling:g}")
    if file.config.r != plain.config["r"] or file.config.rank_pattern:
        print(f"every layer has rank {plain.config['r']}; zeros fill the smaller ones")
    if plain.rounded:
        print(f"B of {len(plain.rounded)} layers took its alpha: each number rounded once, by 6e-8 at most")
    print(findings_text(lint_adapter(output)))


if __name__ == "__main__":
    run_script(main)
