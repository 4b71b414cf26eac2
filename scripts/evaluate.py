"""How much better is a model with its adapter than without? Loss, perplexity and answers on a set, of the
base and each adapter.

    python scripts/evaluate.py --adapter outputs --dataset held_out.jsonl python scripts/evaluate.py --adapter
    outputs --dataset held_out.jsonl --exact_match_samples 200 --metrics rouge,bleu --samples 5 python
    scripts/evaluate.py --adapter r8=runs/a --adapter r32=runs/b --dataset held_out.jsonl --output result.json
    python scripts/evaluate.py --model mistralai/Mistral-7B-v0.1 --dataset held_out.jsonl --quantization_bit
    none

Keys are the trainer's (`python scripts/train.py --help`); those that are not given are as in the run that
made the first adapter, or the trainer's defaults. And besides

    --model, --adapter [NAME=]DIR, --dataset     default: the model that the adapters name, none, the run's eval_dataset
    --exact_match_samples N                      answer the first N prompts, greedily, and count the expected answers
    --metrics rouge,bleu                         score these answers by words in common as well
    --samples N                                  show N prompts with everybody's answers
    --output FILE                                figures and answers as JSON

Loss is the mean per supervised token over the whole set, so it does not depend on the batch size; perplexity
= exp(loss). All adapters are loaded onto one copy of the base model, and everybody reads the same tokens.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.data.chat import load_chat_template, training_clock
from minilora.data.rows import Row
from minilora.formats.weights import read_config
from minilora.inference.evaluation import answers, evaluate_loss, exact_match, load_metric, perplexity_of
from minilora.inference.load import (
    BASE,
    find_adapters,
    find_base,
    load_adapted,
    load_adapted_tokenizer,
    load_run_config,
)
from minilora.lora import set_adapter
from minilora.run.datasets import read_mixed, token_settings, tokenize_rows
from minilora.system.errors import ArgumentParser, UserError, run_script
from minilora.system.files import check_writable, to_json, write_whole

COLUMNS = {  # what is printed of each model: key of the JSON -> heading, format
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "loss_change": ("loss change", "{:+.4f}"),
    "perplexity_change": ("perpl. change", "{:+.1%}"),
    "exact_match": ("exact", "{:.1%}"),
    "rouge": ("ROUGE-L", "{:.3f}"),
    "bleu": ("BLEU", "{:.1f}"),
}
RECORDED = "template cutoff_len train_on_prompt mask_history quantization_bit quantization_type double_quantization".split()


def main() -> None:
    # ---- everything that can be wrong without a weight in memory -----------------------------------------------------

    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return
    parser = ArgumentParser()
    parser.add_argument("--model", "--model_name_or_path")
    parser.add_argument("--adapter", action="append", default=[])
    for name in ("dataset", "output"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--metrics", default="")
    parser.add_argument("--exact_match_samples", type=int, default=0)
    parser.add_argument("--samples", type=int, default=0)
    options, keys = parser.parse_known_args()
    check(options)
    metrics = {name.strip(): load_metric(name.strip()) for name in options.metrics.split(",") if name.strip()}
    adapters = find_adapters(options.adapter)
    config = load_run_config(
        adapters, keys, max_samples="none"
    )  # a short try of a training is no short evaluation
    base = find_base(options.model, adapters.values())
    tokenizer = load_adapted_tokenizer(base, adapters)
    template = load_chat_template(config.template, tokenizer, now=training_clock)
    place = options.dataset or config.eval_dataset
    if place is None:
        raise UserError("dataset is missing; name the examples to evaluate on with --dataset FILE")
    model_config = read_config(base)
    settings = token_settings(config, model_config)
    dataset = tokenize_rows(read_mixed(place, config), place, settings, model_config, tokenizer, template)
    asked = dataset.rows[: max(options.exact_match_samples, options.samples)]
    if any(row.prompt is None for row in asked):
        raise UserError(f"{place} is plain text: without prompts there are no answers to compare")
    scored = asked[: options.exact_match_samples]
    print(f"{place}: {dataset.summary()}")

    # ---- the base model, then each adapter on it ---------------------------------------------------------------------

    model, batch_size = load_adapted(base, adapters, config), config.per_device_eval_batch_size
    results: dict[str, dict[str, float]] = {}
    texts: dict[str, list[str]] = {}
    for name in (BASE, *adapters):
        set_adapter(model, None if name == BASE else name)
        results[name] = figures = {
            "loss": evaluate_loss(model, dataset.examples, batch_size, tokenizer.pad_id)
        }
        figures["perplexity"] = perplexity_of(figures["loss"])
        if name != BASE:
            figures["loss_change"] = figures["loss"] - results[BASE]["loss"]
            figures["perplexity_change"] = math.expm1(min(figures["loss_change"], 700))
        if asked:
            texts[name] = answers(model, tokenizer, asked, batch_size, template=template)
        if scored:
            figures["exact_match"] = exact_match(texts[name][: len(scored)], scored)
            figures |= {
                metric: score(texts[name][: len(scored)], scored) for metric, score in metrics.items()
            }

    print_samples(asked[: options.samples], texts)
    print_table(results, len(scored))
    if options.output:
        settings = {
            "model": str(base),
            "adapters": {name: str(path) for name, path in adapters.items()},
            "dataset": place,
        }
        settings |= {name: getattr(config, name) for name in RECORDED}
        counts = {"examples": len(dataset), "supervised_tokens": sum(e.supervised for e in dataset.examples)}
        known = {
            name: {k: v if math.isfinite(v) else None for k, v in figures.items()}
            for name, figures in results.items()
        }
        written = {"settings": settings, **counts, "results": known, "answers": answers_of(asked, texts)}
        write_whole(Path(options.output), to_json(written, indent=2) + "\n")
        print(f"figures and answers: {options.output}")


def check(options: argparse.Namespace) -> None:
    """The values of single keys, and what they need of each other."""
    for name in ("exact_match_samples", "samples"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be at least 0, not {getattr(options, name)}")
    if options.metrics and not options.exact_match_samples:
        raise UserError(
            f"--metrics {options.metrics} compares answers: say how many to give with --exact_match_samples N"
        )
    if options.output:
        check_writable("--output", Path(options.output))


def print_table(results: dict[str, dict[str, float]], answered: int) -> None:
    """A row a model, a column a figure."""
    shown = {
        key: column for key, column in COLUMNS.items() if any(key in figures for figures in results.values())
    }
    width = max(len(name) for name in results)
    print("\n" + " " * width + "".join(f"{heading:>15}" for heading, _ in shown.values()))
    for name, figures in results.items():
        cells = (form.format(figures[key]) if key in figures else "" for key, (_, form) in shown.items())
        print(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells).rstrip())
    if answered:
        print(f"answers: to {answered} prompts")


def print_samples(rows: Sequence[Row], texts: dict[str, list[str]]) -> None:
    """Prompts with the answers side by side, a line each."""
    for record in answers_of(rows, texts):
        print(f"\n{record['prompt'].strip()}")
        for name, text in (*record["answers"].items(), ("expected", record["expected"])):
            print(f"  {name:<12} {' '.join(text.split())[:110]}")


def answers_of(rows: Sequence[Row], texts: dict[str, list[str]]) -> list[dict]:
    """A record a row: its prompt, what was expected, and what each model says."""
    return [
        {
            "prompt": row.prompt,
            "expected": row.completion.strip(),
            "answers": {name: said[i] for name, said in texts.items()},
        }
        for i, row in enumerate(rows)
    ]


if __name__ == "__main__":
    run_script(main)
