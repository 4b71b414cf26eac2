"""How much does an adapter improve its base model? Loss, perplexity and answers of the base and each adapter.

    python scripts/evaluate.py --adapter outputs --dataset held_out.jsonl
    python scripts/evaluate.py --adapter outputs --dataset held_out.jsonl \\
        --exact_match_samples 200 --metrics rouge,bleu --samples 5
    python scripts/evaluate.py --adapter r8=runs/a --adapter r32=runs/b --dataset held_out.jsonl \\
        --output result.json
    python scripts/evaluate.py --model mistralai/Mistral-7B-v0.1 --dataset held_out.jsonl \\
        --quantization_bit none

Keys are the trainer's (`python scripts/train.py --help`). Keys that are not given keep the value of the first
adapter's run, or the trainer's default. Further options:

    --model DIR                    default: the model that the adapters name
    --adapter [NAME=]DIR           may be repeated; default: the base model alone
    --dataset FILE                 default: the run's eval_dataset
    --exact_match_samples N        answer the first N prompts greedily; report the share of exact answers
    --metrics rouge,bleu           also score these answers by the words they share with the expected ones
    --samples N                    show N prompts with the answer of every model
    --output FILE                  write figures and answers as JSON

Loss is the mean per supervised token over the whole set, so it does not depend on the batch size; perplexity
= exp(loss). All adapters are loaded onto one copy of the base model, and all models read the same tokens.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.data.chat import ChatTemplate, training_clock
from minilora.data.examples import Dataset
from minilora.data.rows import Row, parse_datasets
from minilora.inference.evaluation import (
    Metric,
    answers,
    evaluate_loss,
    exact_match,
    load_metric,
    perplexity_of,
)
from minilora.inference.load import BASE, InferenceSetup, add_model_options, prepare_inference
from minilora.lora import set_adapter
from minilora.model import CausalLM
from minilora.run.datasets import choose_template, read_mixed, token_settings, tokenize_rows
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import parse_arguments
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import check_writable, refuse_overwrite, to_json, write_whole
from minilora.system.remote import refuse_address
from minilora.system.terminal import visible

COLUMNS = {  # of the printed table: key in the JSON -> heading, format
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "loss_change": ("loss change", "{:+.4f}"),
    "perplexity_change": ("perpl. change", "{:+.1%}"),
    "exact_match": ("exact", "{:.1%}"),
    "rouge": ("ROUGE-L", "{:.3f}"),
    "bleu": ("BLEU", "{:.1f}"),
}
RECORDED_SETTINGS = (
    "template cutoff_len train_on_prompt mask_history quantization_bit quantization_type double_quantization "
    "accept_config_fields"
).split()


@dataclass(frozen=True)
class Task:
    """What every model is measured on."""

    dataset: Dataset
    answered: list[Row]  # every model answers the prompts of these rows
    scored: int  # the answers to this many of them are scored
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Result:
    """One model's figures, by their keys in the JSON, and its answers to the task's prompts."""

    figures: dict[str, float]
    answers: list[str]


def main() -> None:
    options, keys = parse_options()
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    metrics = {name: load_metric(name) for name in names}
    # A run that tried something on few samples is still evaluated on the whole set.
    setup = prepare_inference(options.model, options.adapter, keys, now=training_clock, max_samples="none")
    source = options.dataset or setup.config.eval_dataset
    if source is None:
        raise UserError("dataset is missing; name the examples to evaluate on with --dataset FILE")
    names = [name for name, _ in parse_datasets(source)]
    if not options.dataset and not {"eval_dataset", "config"} & parse_arguments(keys).keys():
        for name in names:
            refuse_address(name, f"the adapter's {SETTINGS_FILE}", "--dataset")
    if options.output:
        refuse_overwrite("--output", options.output, [*names, *setup.files])
    dataset, template = load_dataset(source, setup)
    setup = replace(setup, template=template)
    answered = dataset.rows[: max(options.exact_match_samples, options.samples)]
    if any(row.prompt is None for row in answered):
        raise UserError(f"{source} is plain text: without prompts there are no answers to compare")
    task = Task(dataset, answered, min(options.exact_match_samples, len(answered)), metrics)
    print(f"{source}: {dataset.summary()}")

    results = evaluate_models(setup, task)
    print_samples(answered[: options.samples], results)
    print_table(results, task.scored)
    if options.output:
        write_results(options.output, setup, source, task, results)
        print(f"figures and answers: {options.output}")


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, checked, and the trainer's keys."""
    parser = ArgumentParser(help_text=__doc__)
    add_model_options(parser)
    parser.add_argument("--dataset")
    parser.add_argument("--output", type=local_path)
    parser.add_argument("--metrics", default="")
    for name in ("exact_match_samples", "samples"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options, keys = parser.parse_known_args()
    for name in ("exact_match_samples", "samples"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be at least 0, not {getattr(options, name)}")
    if options.metrics and not options.exact_match_samples:
        raise UserError(
            f"--metrics {options.metrics} scores answers; choose how many with --exact_match_samples N"
        )
    if options.output:
        check_writable("--output", options.output)
    return options, keys


def load_dataset(source: str | list[str], setup: InferenceSetup) -> tuple[Dataset, ChatTemplate | None]:
    """The examples to evaluate on, and the template that words them: read and tokenized as in training."""
    settings = token_settings(setup.config, setup.model_config)
    rows = read_mixed(source, setup.config)
    template = choose_template(setup.config.template, setup.tokenizer, rows)
    return tokenize_rows(rows, source, settings, setup.model_config, setup.tokenizer, template), template


def evaluate_models(setup: InferenceSetup, task: Task) -> dict[str, Result]:
    """Name -> result, of the base model and then of each adapter on it."""
    model = setup.load_model()
    results: dict[str, Result] = {}
    for name in (BASE, *setup.adapters):
        set_adapter(model, None if name == BASE else name)
        results[name] = evaluate_model(model, setup, task, base=results.get(BASE))
    return results


def evaluate_model(model: CausalLM, setup: InferenceSetup, task: Task, base: Result | None) -> Result:
    """Measure the model with its active adapter, and how it differs from `base`, if that is given."""
    tokenizer, batch_size = setup.tokenizer, setup.config.per_device_eval_batch_size
    loss = evaluate_loss(model, task.dataset.examples, batch_size, tokenizer.pad_id)
    figures = {"loss": loss, "perplexity": perplexity_of(loss)}
    if base is not None:
        figures["loss_change"] = loss - base.figures["loss"]
        # exp(loss) / exp(base loss) - 1; the difference is limited because exp overflows above 709
        figures["perplexity_change"] = math.expm1(min(figures["loss_change"], 700))
    texts: list[str] = []
    if task.answered:
        texts = answers(model, tokenizer, task.answered, batch_size, template=setup.template)
    if task.scored:
        scored = texts[: task.scored], task.answered[: task.scored]
        figures["exact_match"] = exact_match(*scored)
        figures |= {name: metric(*scored) for name, metric in task.metrics.items()}
    return Result(figures, texts)


def print_samples(rows: Sequence[Row], results: dict[str, Result]) -> None:
    """Print each prompt, then the answer of every model and the expected one, a line each."""
    for record in answer_records(rows, results):
        print(f"\n{visible(record['prompt'].strip())}")
        for name, text in (*record["answers"].items(), ("expected", record["expected"])):
            print(f"  {name:<12} {visible(' '.join(text.split())[:110])}")


def answer_records(rows: Sequence[Row], results: dict[str, Result]) -> list[dict]:
    """For each row its prompt, the expected answer, and the answer of every model."""
    return [
        {
            "prompt": row.prompt,
            "expected": row.completion.strip(),
            "answers": {name: result.answers[i] for name, result in results.items()},
        }
        for i, row in enumerate(rows)
    ]


def print_table(results: dict[str, Result], scored: int) -> None:
    """Print one line for each model and one column for each figure."""
    measured = {key for result in results.values() for key in result.figures}
    columns = {key: column for key, column in COLUMNS.items() if key in measured}
    width = max(len(name) for name in results)
    print("\n" + " " * width + "".join(f"{heading:>15}" for heading, _ in columns.values()))
    for name, result in results.items():
        cells = (
            form.format(result.figures[key]) if key in result.figures else ""
            for key, (_, form) in columns.items()
        )
        print(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells).rstrip())
    if scored:
        print(f"scored answers: {scored}")


def write_results(
    path: Path, setup: InferenceSetup, source: str | list[str], task: Task, results: dict[str, Result]
) -> None:
    """Write settings, figures and answers as JSON; a figure that is not finite becomes null."""
    settings = {
        "model": str(setup.base),
        "adapters": {name: str(directory) for name, directory in setup.adapters.items()},
        "dataset": source,
        **{name: getattr(setup.config, name) for name in RECORDED_SETTINGS},
    }
    figures = {
        name: {key: value if math.isfinite(value) else None for key, value in result.figures.items()}
        for name, result in results.items()
    }
    document = {
        "settings": settings,
        "examples": len(task.dataset),
        "supervised_tokens": sum(e.supervised for e in task.dataset.examples),
        "results": figures,
        "answers": answer_records(task.answered, results),
    }
    write_whole(path, to_json(document, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
