"""Merge a LoRA adapter into its base model: out comes a plain model directory that transformers, vLLM and minilora load.

    python scripts/merge.py --adapter outputs --output merged
    python scripts/merge.py --adapter outputs --output merged --quantize          in 4 bits again, if you must

An adapter corrects the weights it was trained on. QLoRA's are not W but what 4 bits leave of it, Q = dequantize(quantize(W)), so
there are two weights to add it to:

    --into original      W + scaling B A      nearer to the base model: what quantizing took away is back (the default)
    --into dequantized   Q + scaling B A      what training saw, in every linear layer of the decoder, adapted or not

Neither is right in all cases, so the table shows how far each lies from Q + scaling B A, as the norm of the difference over the
norm, beside the adapter's own size on that scale. So it does for merged weights that are quantized anew, which may lose more than
the adapter had to give: done only if asked. (An adapter trained without quantization saw W: merge it into the original weights.)

Sums are taken in float32 and rounded once, to the dtype of the file. One tensor passes at a time, and one file of about 1 GB is
held until it is written: a 7B model needs less than 4 GB of memory. The output directory appears complete or not at all.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from minilora import adapter as adapters
from minilora.config import QuantConfig
from minilora.errors import UserError, run_script
from minilora.files import write_whole
from minilora.hub import resolve_model
from minilora.lora import OUTPUT_HEAD, match_targets
from minilora.model import CausalLM
from minilora.quantization import QUANT_TYPES, quantize_4bit, to_bitsandbytes
from minilora.tokenizer import load_tokenizer
from minilora.weights import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensors,
    bitsandbytes_config,
    is_redundant,
    read_config,
    save_tensors,
)

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "base"
SHARD_BYTES = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="its directory, or its hub id")
    parser.add_argument("--output", required=True, help="directory to write; it must not exist yet")
    parser.add_argument("--model", help="base model, directory or hub id; default: the one that the adapter names")
    parser.add_argument("--into", choices=("original", "dequantized"), help="default: original, unless the files are quantized")
    parser.add_argument("--quantize", action="store_true", help="write the merged weights in 4 bits, in bitsandbytes' format")
    parser.add_argument("--quantization_type", choices=QUANT_TYPES, help="as in training; default: nf4")
    parser.add_argument("--double_quantization", choices=("true", "false"), help="as in training; default: true")
    options = parser.parse_args()

    # ---- everything that can be wrong without a weight in memory -----------------------------------------------------

    output = Path(options.output)
    if output.exists():
        raise UserError(f"output {output} exists; choose another directory, or remove it first")
    adapter = resolve_model(options.adapter)
    lora, factors = adapters.read_adapter(adapter)
    base = find_base(options.model, adapter)
    config, tokenizer, stored = read_config(base), load_tokenizer(base), StoredTensors(base)
    if OUTPUT_HEAD in factors and config.tie_word_embeddings:
        raise UserError(f"{adapter} adapts {OUTPUT_HEAD}, whose weight is also the embedding in {base}: use the adapter unmerged")
    with torch.device("meta"):
        model = CausalLM(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linear = {f"{layer}.weight" for layer in match_targets(model, "all-linear")}  # what QLoRA quantizes
    adapters.load_adapter(model, adapter)  # onto weights without memory: finds every name and shape that does not fit
    stored.check(wanted, ignore=is_redundant(config))
    into, quant = choose(options, stored, wanted)

    # ---- one tensor, then all of them --------------------------------------------------------------------------------

    settings = quant.quant_type, quant.blocksize, quant.double_quant
    errors: dict[str, dict[str, float]] = {}  # choice -> layer -> relative error

    def merged(name: str) -> dict[str, Tensor]:
        """The entries to write for a tensor: itself, or all of its 4-bit format. Notes the errors of an adapted one."""
        layer, in_4_bits = name.removesuffix(".weight"), options.quantize and name in linear
        q = stored.read_quantized(name, wanted[name], "cpu") if name in stored.quantized else None
        weight = stored.read(name, None, "cpu") if q is None else None
        if q is None and name in linear and (layer in factors or in_4_bits or into == "dequantized"):
            q = quantize_4bit(weight, *settings)
        if layer not in factors:
            if in_4_bits:
                return to_bitsandbytes(q, name)  # what training saw to the bit; by way of dequantized weights it would not be
            return {name: weight if q is None or into == "original" else q.dequantize()}

        A, B = factors[layer]
        delta = (B @ A) * lora.scaling  # (out, in) float32, and so are its sums with weights of any dtype
        sums = {} if weight is None else {"original": delta + weight}
        if q is not None:
            sums["dequantized"] = q.dequantize(torch.float32).add_(delta)
        target, dtype = (into, q.dtype) if q is not None else ("original", weight.dtype)  # the output head is not quantized
        rounded = {choice: total.to(dtype) for choice, total in sums.items()}
        if not rounded[target].isfinite().all():
            raise UserError(f"{name} is infinite or NaN once merged, in {dtype}; the adapter or the base model is damaged")
        if q is None:
            return {name: rounded[target]}
        seen, again = sums["dequantized"], replace(quantize_4bit(sums[target], *settings), dtype=dtype)
        for choice, value in (rounded | {"quantized": again.dequantize(torch.float32)}).items():
            errors.setdefault(choice, {})[layer] = ((value - seen).norm() / seen.norm()).item()
        errors.setdefault("adapter", {})[layer] = (delta.norm() / seen.norm()).item()
        return to_bitsandbytes(again, name) if in_4_bits else {name: rounded[target]}

    print(f"merging {adapter} (r {lora.r}, scaling {lora.scaling:g}, {len(factors)} layers) into the {into} weights of {base}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=output.name + ".") as passing:
            part = Path(passing) / "model"
            tokenizer.save(part)
            if (base / "generation_config.json").is_file():
                shutil.copyfile(base / "generation_config.json", part / "generation_config.json")
            write_config(base, part, config.dtype, quant if options.quantize else None)
            size = write_shards(map(merged, tqdm(wanted, unit=" tensors", leave=False, disable=None)), part)
            os.replace(part, output)
    except (FileExistsError, NotADirectoryError) as error:  # a file in the way
        raise UserError(f"output {output} cannot be written: {error}") from error
    if errors:  # none of the head alone, which training did not quantize
        print_table(errors, quant, into, written="quantized" if options.quantize else into)
    print(f"{output} holds the merged model, {size / 1e6:,.0f} MB")


def find_base(asked: str | None, adapter: Path) -> Path:
    """The directory of the base model: the one asked for, or the one that the adapter was trained on."""
    raw = json.loads((adapter / adapters.CONFIG_FILE).read_text(encoding="utf-8"))
    name = asked or raw.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter} does not say which model it was trained on; name it with --model")
    return EMBEDDED_MODEL if name == "assets/base" else resolve_model(name, None if asked else raw.get("revision"))


def choose(options: argparse.Namespace, stored: StoredTensors, wanted: dict[str, tuple[int, ...]]) -> tuple[str, QuantConfig]:
    """Which weights to merge into, and how training quantized them: as asked, but files in 4 bits leave no choice."""
    if not (names := [name for name in wanted if name in stored.quantized]):
        quant = QuantConfig(4, options.quantization_type or "nf4", options.double_quantization != "false")
        return options.into or "original", quant
    if options.into == "original" or options.quantization_type or options.double_quantization:
        raise UserError(f"the files in {stored.directory} hold 4 bits a weight: leave out --into original and how to quantize")
    print("the base model's files hold 4 bits a weight, so only merging into the dequantized weights is possible")
    q = stored.read_quantized(names[0], wanted[names[0]], "cpu")
    return "dequantized", QuantConfig(4, q.quant_type, q.nested_absmax is not None, q.blocksize)


def write_shards(entries: Iterable[dict[str, Tensor]], directory: Path) -> int:
    """Write tensors as they come, into one file or into several and an index. Returns their bytes."""
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
    return total


def write_config(base: Path, output: Path, dtype: str, quant: QuantConfig | None) -> None:
    """The base model's `config.json`, which says that the weights are quantized if and only if they are."""
    raw = json.loads((base / CONFIG_FILE).read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)
    if quant is not None:
        raw["quantization_config"] = bitsandbytes_config(quant.quant_type, quant.double_quant, dtype)
    write_whole(output / CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def print_table(errors: dict[str, dict[str, float]], quant: QuantConfig, into: str, written: str) -> None:
    """The worst and the median error of each choice over the adapted layers, those in 4 bits in training."""
    rows = {"original": "original weights merged", "dequantized": "dequantized weights merged"}
    rows |= {"quantized": f"{into} weights merged, quantized", "adapter": "for comparison: the adapter itself"}
    print(f"relative error against what training saw: {quant.quant_type}{', double quantization' * quant.double_quant}")
    print(f"{'':41}   worst   median")
    for choice in (choice for choice in rows if choice in errors):
        worst, middle = max(errors[choice].values()), median(errors[choice].values())
        print(f"  {rows[choice]:38}{worst:>9.1e}{middle:>9.1e}" + "   <- written" * (choice == written))


if __name__ == "__main__":
    run_script(main)
