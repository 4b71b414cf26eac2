"""Merge a LoRA adapter into its base model, for whatever is to run it.

    python scripts/merge.py --adapter outputs --output merged                     a model directory: transformers, vLLM, minilora
    python scripts/merge.py --adapter outputs --output merged --quantize          the same in 4 bits again, if you must
    python scripts/merge.py --adapter outputs --output model.gguf --outtype q8_0  one file: llama.cpp, Ollama, LM Studio
    python scripts/merge.py --adapter outputs --export_adapter plain              the adapter alone, as every server loads it

An adapter corrects the weights it was trained on. QLoRA's are not W but what 4 bits leave of it, Q =
dequantize(quantize(W)), so there are two weights to add it to:

    --into original      W + scaling B A      nearer to the base model: what quantizing took away is back (the default)
    --into dequantized   Q + scaling B A      what training saw, in every linear layer of the decoder, adapted or not

Neither is right in all cases, so the table shows how far each lies from Q + scaling B A, as the norm of the
difference over the norm, beside the adapter's own size on that scale. So it does for merged weights that are
quantized anew, which may lose more than the adapter had to give: done only if asked. (An adapter trained
without quantization saw W, and goes into the original weights.)

Sums are taken in float32 and rounded once, to the dtype of the file. One tensor passes at a time, and one
file of about 1 GB is held until it is written: a 7B model needs less than 4 GB of memory. The output appears
complete or not at all.

--export_adapter merges nothing. It writes rsLoRA's scaling alpha / sqrt(r) as plain LoRA's alpha' / r, alpha'
= alpha sqrt(r), since SGLang knows no other, and says for each server whether the adapter loads there, as
scripts/lint_adapter.py does.
"""

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from minilora.config import LoraConfig, QuantConfig
from minilora.data.chat import answer_end
from minilora.data.tokenizer import Tokenizer
from minilora.dora import row_factors
from minilora.formats import adapter as adapters
from minilora.formats.bnb import to_bitsandbytes
from minilora.formats.lint import lint_adapter, table
from minilora.formats.weights import (
    INDEX_FILE,
    MODEL_CONFIG_FILE,
    SINGLE_FILE,
    StoredTensors,
    bitsandbytes_config,
    is_redundant,
    read_config,
    save_tensors,
)
from minilora.inference.load import find_base, load_adapted_tokenizer
from minilora.lora import OUTPUT_HEAD, match_targets
from minilora.model import CausalLM
from minilora.quantization import QUANT_TYPES, quantize_4bit
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import read_yaml
from minilora.system.errors import ArgumentParser, UserError, run_script
from minilora.system.files import check_writable, read_json, write_whole
from minilora.system.hub import resolve_model

SHARD_BYTES = 1_000_000_000


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, help="its directory, or its hub id")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--output", help="directory to write, or a file that ends in .gguf; it must not exist yet"
    )
    target.add_argument(
        "--export_adapter",
        metavar="DIRECTORY",
        help="write the adapter as plain LoRA instead, without merging",
    )
    parser.add_argument(
        "--model", help="base model, directory or hub id; default: the one that the adapter names"
    )
    parser.add_argument(
        "--into",
        choices=("original", "dequantized"),
        help="default: original, unless the files are quantized",
    )
    parser.add_argument(
        "--outtype", choices=("f16", "q8_0"), help="of the matrices of a .gguf file; default: f16"
    )
    parser.add_argument(
        "--quantize", action="store_true", help="write the merged weights in 4 bits, in bitsandbytes' format"
    )
    parser.add_argument("--quantization_type", choices=QUANT_TYPES, help="as in training; default: nf4")
    parser.add_argument(
        "--double_quantization", choices=("true", "false"), help="as in training; default: true"
    )
    options = parser.parse_args()
    output, to_gguf = Path(options.export_adapter or options.output), (options.output or "").endswith(".gguf")
    if options.outtype and not to_gguf:
        raise UserError("--outtype is of a .gguf file: let --output end in .gguf, or leave it out")
    if options.quantize and to_gguf:
        raise UserError(
            "--quantize writes bitsandbytes' 4 bits, which no .gguf file holds: leave it out, or choose --outtype q8_0"
        )
    if output.exists():
        raise UserError(f"output {output} exists; choose another directory, or remove it first")
    check_writable("output", output, parents=True)
    adapter = resolve_model(options.adapter)
    if options.export_adapter:
        return export_adapter(adapter, output, options)
    if to_gguf:
        from minilora.formats.gguf import write_gguf

    # ---- everything that can be wrong without a weight in memory -----------------------------------------------------

    lora, factors = adapters.read_adapter(adapter)
    base = find_base(options.model, [adapter])
    config, stored = read_config(base), StoredTensors(base)
    tokenizer = load_adapted_tokenizer(
        base, {"adapter": adapter}
    )  # with the chat template that training worded rows by
    if OUTPUT_HEAD in factors and config.tie_word_embeddings:
        raise UserError(
            f"{adapter} adapts {OUTPUT_HEAD}, whose weight is also the embedding in {base}: use the adapter unmerged"
        )
    with torch.device("meta"):
        model = CausalLM(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linear = {f"{layer}.weight" for layer in match_targets(model, "all-linear")}  # what QLoRA quantizes
    adapters.load_adapter(
        model, adapter
    )  # onto weights without memory: finds every name and shape that does not fit
    stored.check(wanted, ignore=is_redundant(config))
    trained, into, quant = choose(options, stored, wanted, adapter)

    # ---- one tensor, then all of them --------------------------------------------------------------------------------

    settings = quant.quant_type, quant.blocksize, quant.double_quant
    errors: dict[str, dict[str, float]] = {}  # choice -> layer -> relative error

    def merged(name: str) -> dict[str, Tensor]:
        """The entries to write for a tensor: itself, or all of its 4-bit format. Notes the errors of an
        adapted one.
        """
        layer, in_4_bits = name.removesuffix(".weight"), options.quantize and name in linear
        q = stored.read_quantized(name, wanted[name], "cpu") if name in stored.quantized else None
        weight = stored.read(name, None, "cpu") if q is None else None
        if (
            q is None
            and name in linear
            and (in_4_bits or into == "dequantized" or (trained and layer in factors))
        ):
            q = quantize_4bit(weight, *settings)
        if layer not in factors:
            if in_4_bits:
                return to_bitsandbytes(
                    q, name
                )  # what training saw to the bit; by way of dequantized weights it would not be
            return {name: weight if q is None or into == "original" else q.dequantize()}

        sums = {} if weight is None else {"original": merged_weight(weight, factors[layer], lora.scaling)}
        if q is not None:
            sums["dequantized"] = merged_weight(q.dequantize(torch.float32), factors[layer], lora.scaling)
        target, dtype = (
            (into, q.dtype) if q is not None else ("original", weight.dtype)
        )  # the output head is not quantized
        rounded = {choice: total.to(dtype) for choice, total in sums.items()}
        if not rounded[target].isfinite().all():
            raise UserError(
                f"{name} is infinite or NaN once merged, in {dtype}; the adapter or the base model is damaged"
            )
        if q is None:
            return {name: rounded[target]}
        seen, again = sums["dequantized"], replace(quantize_4bit(sums[target], *settings), dtype=dtype)
        for choice, value in (rounded | {"quantized": again.dequantize(torch.float32)}).items():
            errors.setdefault(choice, {})[layer] = ((value - seen).norm() / seen.norm()).item()
        errors.setdefault("adapter", {})[layer] = (
            (seen - q.dequantize(torch.float32)).norm() / seen.norm()
        ).item()
        return to_bitsandbytes(again, name) if in_4_bits else {name: rounded[target]}

    print(
        f"merging {adapter} (r {lora.r}, scaling {lora.scaling:g}, {len(factors)} layers) into the {into} weights of {base}"
    )
    differences = []
    output.parent.mkdir(parents=True, exist_ok=True)
    if to_gguf:
        read, outtype = (lambda name: merged(name)[name]), options.outtype or "f16"
        differences = write_gguf(output, tokenizer.directory, config, wanted, read, outtype)
    else:
        entries = map(merged, tqdm(wanted, unit=" tensors", leave=False, disable=None))
        write_directory(output, base, tokenizer, entries, config.dtype, quant if options.quantize else None)
    if errors:  # none of the head alone, which training did not quantize
        print_table(errors, quant, into, written="quantized" if options.quantize else into)
    elif not trained:
        print(
            "training saw the original weights, unquantized: what is written is exactly that with the adapter, rounded once"
        )
    for difference in differences:
        print(f"note: {difference}")
    size = sum(file.stat().st_size for file in ([output] if to_gguf else output.glob("*.safetensors")))
    print(f"{output} holds the merged model, {size / 1e6:,.0f} MB")


def merged_weight(weight: Tensor, factors: tuple[Tensor, ...], scaling: float) -> Tensor:
    """W + scaling B A of one layer, for DoRA with each row of its magnitude; (out, in) in float32, whatever
    the dtype of W.
    """
    A, B, *magnitude = factors
    V = ((B @ A) * scaling).add_(weight)
    return V.mul_(row_factors(V, *magnitude)) if magnitude else V


def choose(
    options: argparse.Namespace, stored: StoredTensors, wanted: dict[str, tuple[int, ...]], adapter: Path
) -> tuple[bool, str, QuantConfig]:
    """Whether training saw weights in 4 bits, which ones to merge into, and how 4 bits are made of them.

    As asked, else as the run's settings beside the adapter say, else as QLoRA does it. Files in 4 bits leave
    no choice.
    """
    if not (names := [name for name in wanted if name in stored.quantized]):
        run = read_yaml(adapter / SETTINGS_FILE) if (adapter / SETTINGS_FILE).is_file() else {}
        asked = options.quantization_type is not None or options.double_quantization is not None
        trained = asked or run.get("quantization_bit", 4) == 4
        if options.into == "dequantized" and not trained:
            raise UserError(
                f"{adapter} was not trained on weights in 4 bits (see its {SETTINGS_FILE}): leave out --into dequantized"
            )
        quant_type = options.quantization_type or run.get("quantization_type", "nf4")
        double_quant = options.double_quantization or run.get("double_quantization", True)
        return (
            trained,
            options.into or "original",
            QuantConfig(4, quant_type, str(double_quant).lower() == "true"),
        )
    if options.into == "original" or options.quantization_type or options.double_quantization:
        raise UserError(
            f"the files in {stored.directory} hold 4 bits a weight: leave out --into original and how to quantize"
        )
    print(
        "the base model's files hold 4 bits a weight, so only merging into the dequantized weights is possible"
    )
    q = stored.read_quantized(names[0], wanted[names[0]], "cpu")
    return True, "dequantized", QuantConfig(4, q.quant_type, q.nested_absmax is not None, q.blocksize)


def write_directory(
    output: Path,
    base: Path,
    tokenizer: Tokenizer,
    entries: Iterable[dict[str, Tensor]],
    dtype: str,
    quant: QuantConfig | None,
) -> None:
    """Write a model directory: everything under another name first, which becomes `output` when it is
    complete.
    """
    with TemporaryDirectory(dir=output.parent, prefix=output.name + ".") as passing:
        part = Path(passing) / "model"
        tokenizer.save(part)
        write_generation_config(base, part, tokenizer)
        write_config(base, part, dtype, quant)
        write_shards(entries, part)
        os.replace(part, output)


def write_shards(entries: Iterable[dict[str, Tensor]], directory: Path) -> None:
    """Write tensors as they come, into one file or into several and an index."""
    held, shards, weight_map, total = {}, [], {}, 0
    for tensors in chain(entries, [{}]):  # the empty one is the end
        if held and (not tensors or sum(t.nbytes for t in (held | tensors).values()) > SHARD_BYTES):
            save_tensors(held, directory / f"{len(shards)}.safetensors")
            shards.append(list(held))
            total, held = total + sum(t.nbytes for t in held.values()), {}
        held |= tensors
    for i, names in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(directory / f"{i}.safetensors", directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def write_generation_config(base: Path, output: Path, tokenizer: Tokenizer) -> None:
    """The base model's `generation_config.json`, and in it the token that answers end with under the chat
    template.
    """
    path = base / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    ends = raw.get("eos_token_id") or list(read_config(base).eos_token_ids) or [tokenizer.eos_id]
    ends = ends if isinstance(ends, list) else [ends]
    if (end := answer_end(tokenizer)) is not None and end not in ends:
        raw["eos_token_id"] = [*ends, end]
    if raw:
        write_whole(output / path.name, json.dumps(raw, indent=2) + "\n")


def write_config(base: Path, output: Path, dtype: str, quant: QuantConfig | None) -> None:
    """The base model's `config.json`, which says that the weights are quantized if and only if they are."""
    raw = json.loads((base / MODEL_CONFIG_FILE).read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)
    if quant is not None:
        raw["quantization_config"] = bitsandbytes_config(quant.quant_type, quant.double_quant, dtype)
    write_whole(output / MODEL_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def print_table(errors: dict[str, dict[str, float]], quant: QuantConfig, into: str, written: str) -> None:
    """The worst and the median error of each choice over the adapted layers, those in 4 bits in training."""
    rows = {"original": "original weights merged", "dequantized": "dequantized weights merged"}
    rows |= {
        "quantized": f"{into} weights merged, quantized",
        "adapter": "for comparison: the adapter itself",
    }
    print(
        f"relative error against what training saw: {quant.quant_type}{', double quantization' * quant.double_quant}"
    )
    print(f"{'':41}   worst   median")
    for choice in (choice for choice in rows if choice in errors):
        worst, middle = max(errors[choice].values()), median(errors[choice].values())
        print(f"  {rows[choice]:38}{worst:>9.1e}{middle:>9.1e}" + "   <- written" * (choice == written))


def export_adapter(adapter: Path, output: Path, options: argparse.Namespace) -> None:
    """Write an adapter as plain LoRA with the same effect: rsLoRA's alpha times sqrt(r), all else as it was."""
    merging = ("model", "into", "quantize", "quantization_type", "double_quantization")
    if stray := [f"--{name}" for name in merging if getattr(options, name)]:
        raise UserError(f"--export_adapter merges nothing: leave out {', '.join(stray)}")
    lora, _ = adapters.read_adapter(adapter)
    if lora.use_dora:
        raise UserError(
            f"{adapter} is a DoRA adapter, which plain LoRA cannot express: merge it, with --output"
        )
    plain = as_plain_lora(lora)
    raw = read_json(adapter / adapters.ADAPTER_CONFIG_FILE) | {
        "use_rslora": plain.use_rslora,
        "lora_alpha": plain.lora_alpha,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=output.name + ".") as passing:
        part = Path(passing) / "adapter"
        part.mkdir()
        for file in adapter.iterdir():  # but no other tensors: SGLang reads every one of a directory
            if file.is_file() and (
                file.suffix != ".safetensors" or file.name == adapters.ADAPTER_WEIGHTS_FILE
            ):
                write_whole(part / file.name, file.read_bytes())
        write_whole(part / adapters.ADAPTER_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")
        os.replace(part, output)
    print(
        f"{output} holds the adapter as plain LoRA: alpha {lora.lora_alpha:g} -> {plain.lora_alpha:g}, scaling {lora.scaling:g}"
    )
    print(table(lint_adapter(output)))


def as_plain_lora(lora: LoraConfig) -> LoraConfig:
    """The same scaling without rsLoRA: alpha / sqrt(r) = alpha sqrt(r) / r. A whole alpha stays a whole
    number.
    """
    if not lora.use_rslora:
        return lora
    alpha = lora.lora_alpha * lora.r**0.5
    return replace(lora, use_rslora=False, lora_alpha=int(alpha) if alpha == int(alpha) else alpha)


if __name__ == "__main__":
    run_script(main)
