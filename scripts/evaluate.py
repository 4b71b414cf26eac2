"""How much does an adapter improve its base model? Loss, perplexity and answers of the base and each adapter.

    python scripts/evaluate.py --adapter outputs
    python scripts/evaluate.py --adapter outputs --dataset held_out.jsonl \\
        --exact_match_samples 200 --metrics rouge,bleu --samples 5
    python scripts/evaluate.py --adapter r8=runs/a --adapter r32=runs/b --dataset held_out.jsonl \\
        --output result.json
    python scripts/evaluate.py --model merged --dataset held_out.jsonl

Keys are the trainer's (`python scripts/train.py --help`). Keys that are not given keep the value of the first
adapter's run, or the trainer's default. Two do not: the dtype is the one that is fast on this machine
(--bf16 false: float32), and without a run the weights stay as they are stored (--quantization_bit 4: NF4).
Further options:

    --model DIR                    default: the model that the adapters name
    --adapter [NAME=]DIR           may be repeated; default: the base model alone
    --dataset FILE                 default: the examples that the run held out, by eval_dataset or val_size
    --max_samples N                only the first N examples (of each dataset, if there are several)
    --exact_match_samples N        answer the first N prompts greedily; report the share of exact answers
    --metrics rouge,bleu           also score these answers by the words they share with the expected ones
    --samples N                    show N prompts with the answer of every model
    --max_new_tokens N             of an answer; default: the longest expected answer, and a few more
    --output FILE                  write figures and answers as JSON

Loss is the mean per supervised token over the whole set, so it does not depend on the batch size; perplexity
= exp(loss). All adapters are loaded onto one copy of the base model, and read the data together: the rows of
a batch differ in their adapter. per_device_eval_batch_size counts the rows of all models, so more adapters
take more time, and no more memory beside their own.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.data.chat import ChatTemplate, training_clock
from minilora.data.examples import Dataset
from minilora.data.mixing import parse_datasets
from minilora.data.rows import Row
from minilora.inference.evaluation import (
    Metric,
    answers,
    evaluate_losses,
    exact_match,
    load_metric,
    perplexity_of,
)
from minilora.inference.load import BASE, InferenceSetup, add_model_options, prepare_inference
from minilora.run.datasets import (
    Sources,
    choose_template,
    read_datasets,
    read_mixed,
    token_settings,
    tokenize_rows,
)
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import TrainConfig, parse_arguments, parse_with_keys
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
    max_new_tokens: int | None  # of an answer; None: see `answers`


@dataclass(frozen=True)
class Source:
    """Where the examples come from."""

    datasets: Sources  # as in the keys dataset and eval_dataset
    held_out: bool  # only those that the run held out of them by val_size
    given: bool  # named by the user, and not by the settings beside an adapter
    max_samples: int | None  # only the first ones

    def describe(self, config: TrainConfig) -> str:
        if not self.held_out:
            return str(self.datasets)
        return f"held out of {self.datasets} by val_size = {config.val_size:g} and seed = {config.seed}"


@dataclass(frozen=True)
class Result:
    """One model's figures, by their keys in the JSON, and its answers to the task's prompts."""

    figures: dict[str, float]
    answers: list[str]


def main() -> None:
    options, keys = parse_options()
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    metrics = {name: load_metric(name) for name in names}
    setup = prepare_inference(options.model, options.adapter, keys, now=training_clock)
    source = find_source(options, setup.config, parse_arguments(keys))
    names = [name for name, _ in parse_datasets(source.datasets)]
    if not source.given:
        for name in names:
            refuse_address(name, f"the adapter's {SETTINGS_FILE}", "--dataset")
    if options.output:
        refuse_overwrite("--output", options.output, [*names, *setup.files])
    dataset, template = load_dataset(source, setup)
    setup = replace(setup, template=template)
    answered = dataset.rows[: max(options.exact_match_samples, options.samples)]
    if any(row.prompt is None for row in answered):
        raise UserError(f"{source.datasets} is plain text: without prompts there are no answers to compare")
    scored = min(options.exact_match_samples, len(answered))
    task = Task(dataset, answered, scored, metrics, options.max_new_tokens)
    print(f"{source.describe(setup.config)}: {dataset.summary()}")

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
    for name in ("max_samples", "max_new_tokens"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    for name in ("exact_match_samples", "samples"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options, keys = parse_with_keys(parser)
    for name in ("exact_match_samples", "samples"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be at least 0, not {getattr(options, name)}")
    if options.metrics and not options.exact_match_samples:
        raise UserError(
            f"--metrics {options.metrics} scores answers; choose how many with --exact_match_samples N"
        )
    for name in ("max_samples", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if options.max_new_tokens and not (options.exact_match_samples or options.samples):
        raise UserError("--max_new_tokens limits answers; choose how many with --exact_match_samples N")
    if options.output:
        check_writable("--output", options.output)
    return options, keys


def find_source(options: argparse.Namespace, config: TrainConfig, given: dict[str, object]) -> Source:
    """Where the examples come from: --dataset, or what the run held out. Raises UserError if it held none.

    `given` are the trainer's keys of the command line. With --val_size N, --dataset names the training data.
    """
    by_size = bool(config.val_size) and (not options.dataset or "val_size" in given)
    datasets = options.dataset or (config.dataset if by_size else config.eval_dataset)
    if datasets is None:
        raise UserError("dataset is missing; name the examples to evaluate on with --dataset FILE")
    key = "dataset" if by_size else "eval_dataset"
    given_here = bool(options.dataset) or bool({key, "config"} & given.keys())
    return Source(datasets, by_size, given_here, options.max_samples)


def load_dataset(source: Source, setup: InferenceSetup) -> tuple[Dataset, ChatTemplate | None]:
    """The examples to evaluate on, as in training, and the template that words them."""
    config = setup.config
    if source.held_out:  # with the run's max_samples, which the split depends on
        rows = read_datasets(replace(config, dataset=source.datasets))[1][: source.max_samples]
    else:  # A run that tried something on few samples is still evaluated on the whole set.
        rows = read_mixed(source.datasets, replace(config, max_samples=source.max_samples))
    template = choose_template(config.template, setup.tokenizer, rows)
    encoding = token_settings(config, setup.model_config), setup.model_config, setup.tokenizer, template
    return tokenize_rows(rows, source.datasets, *encoding), template


def evaluate_models(setup: InferenceSetup, task: Task) -> dict[str, Result]:
    """Name -> result, of the base model and then of each adapter on it. All of them read a batch together."""
    model, tokenizer = setup.load_model(), setup.tokenizer
    batch_size, names = setup.config.per_device_eval_batch_size, [BASE, *setup.adapters]
    adapter_ids, who = [None, *setup.adapters], BASE if len(names) == 1 else f"{len(names)} models"
    how = dict(batch_size=batch_size, pad_id=tokenizer.pad_id, progress=f"loss of {who}")
    losses = evaluate_losses(model, task.dataset.examples, adapter_ids, **how)
    texts: list[str] = []
    if task.answered:
        how = dict(template=setup.template, max_new_tokens=task.max_new_tokens)
        how |= dict(adapter_ids=[name for name in adapter_ids for _ in task.answered])
        rows = task.answered * len(names)
        texts = answers(model, tokenizer, rows, batch_size, progress=f"answers of {who}", **how)
    results: dict[str, Result] = {}
    for i, (name, loss) in enumerate(zip(names, losses.values(), strict=True)):
        own = texts[i * len(task.answered) :][: len(task.answered)]
        results[name] = result_of(loss, own, task, base=results.get(BASE))
    return results


def result_of(loss: float, texts: list[str], task: Task, base: Result | None) -> Result:
    """A model's figures, and how they differ from those of `base`, if that is given."""
    figures = {"loss": loss, "perplexity": perplexity_of(loss)}
    if base is not None:
        figures["loss_change"] = loss - base.figures["loss"]
        # exp(loss) / exp(base loss) - 1; the difference is limited because exp overflows above 709
        figures["perplexity_change"] = math.expm1(min(figures["loss_change"], 700))
    if task.scored:
        scored = texts[: task.scored], task.answered[: task.scored]
        figures["exact_match"] = exact_match(*scored)
        figures |= {key: metric(*scored) for key, metric in task.metrics.items()}
    return Result(figures, texts)


def print_samples(rows: Sequence[Row], results: dict[str, Result]) -> None:
    """Print each prompt, then the answer of every model and the expected one, whole and side by side."""
    width = max(map(len, (*results, "expected"))) + 2
    room = max(40, min(shutil.get_terminal_size((110, 24)).columns, 110) - width - 3)
    for record in answer_records(rows, results):
        print(f"\n{visible(record['prompt'].strip())}")
        for name, text in (*record["answers"].items(), ("expected", record["expected"])):
            first, *rest = wrap(visible(text), room)
            print(f"  {name:<{width}} {first}")
            for line in rest:
                print(" " * (width + 3) + line if line else "")


def wrap(text: str, room: int) -> list[str]:
    """The lines of a text, long ones broken between words; at least one."""
    lines = [textwrap.wrap(line, room, replace_whitespace=False) or [""] for line in text.splitlines()]
    return [part for line in lines for part in line] or [""]


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
    path: Path, setup: InferenceSetup, source: Source, task: Task, results: dict[str, Result]
) -> None:
    """Write settings, figures and answers as JSON; a figure that is not finite becomes null."""
    settings = {
        "model": str(setup.base),
        "adapters": {name: str(directory) for name, directory in setup.adapters.items()},
        "dataset": source.datasets,
        "max_samples": source.max_samples,
        **{name: getattr(setup.config, name) for name in RECORDED_SETTINGS},
        "val_size": setup.config.val_size if source.held_out else None,
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
