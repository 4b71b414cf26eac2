"""Look at data before a model does: read it, check every row, split it, count its tokens; and save it ready
for training.

    python scripts/prepare.py --model mistralai/Mistral-7B-v0.1 --dataset my.jsonl --template mistral --val_size 0.1
    python scripts/prepare.py --config run.yaml --show 3                     three examples, what is learned of them in colour
    python scripts/prepare.py --config run.yaml --to s3://bucket/prepared    the same files there too
    python scripts/train.py --config prepared/train.yaml

Keys are the trainer's (`python scripts/train.py --help`), and besides

    --show N            show N examples as they go into the model: special tokens, and which tokens are learned
    --skip_invalid      leave rows out that are wrong; else they are listed, and nothing is saved
    --output DIR        default: prepared; what is there already is replaced with --overwrite_output_dir
    --to ADDRESS        send the files to s3://bucket/folder or another place that fsspec can write

The directory then holds

    train.jsonl, validation.jsonl                 the rows in one form, mixed and split
    train.safetensors, validation.safetensors     their tokens; training, resuming and evaluating take them from here
    statistics.json, lengths.png                  how long, how much of it is learned, how much is cut
    train.yaml                                    the settings of a training on it, for train.py --config

No weight is read, and of a model on the hub none is downloaded.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import yaml

from minilora.data.chat import load_chat_template, training_clock
from minilora.data.examples import Dataset
from minilora.data.mask_view import highlight_learned
from minilora.data.prepared import save_tokens, tokens_file, tokens_key
from minilora.data.rows import Row, to_record
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.weights import read_config
from minilora.run.datasets import read_datasets, token_settings, tokenize_rows
from minilora.run.plots import plot_lengths
from minilora.run.settings import TrainConfig, load_train_config
from minilora.system.assets import DEFAULT_RUN, EMBEDDED_MODEL
from minilora.system.errors import ArgumentParser, UserError, run_script
from minilora.system.files import to_json, write_whole
from minilora.system.hub import resolve_model
from minilora.system.remote import check_address, redacted, write_files

LISTED = 20  # wrong rows that are listed one by one
DONE_HERE = (  # keys that the saved rows make up for
    "eval_dataset val_size prompt_column completion_column messages_column max_samples".split()
)
RUN_FILE = "train.yaml"
FILES = "train.jsonl train.safetensors validation.jsonl validation.safetensors statistics.json lengths.png train.yaml".split()
ROWS = {  # what is printed of each set: key of statistics.json -> words, format
    "rows": ("rows", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "supervised_tokens": ("supervised tokens", "{:,}"),
    "median_length": ("tokens in a row, median", "{:,.0f}"),
    "p95_length": ("95 % have at most", "{:,}"),
    "longest": ("longest", "{:,}"),
    "longer_than_cutoff": ("longer than cutoff_len, so cut", "{:,}"),
    "dropped": ("nothing to learn, so dropped", "{:,}"),
    "empty_answers": ("empty answers", "{:,}"),
    "repeated": ("the same as an earlier row", "{:,}"),
    "also_in_training": ("the same as a row of training", "{:,}"),
}


def main() -> None:
    # ---- what to do, and may it be done ------------------------------------------------------------------------------

    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return
    parser = ArgumentParser()
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--skip_invalid", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("prepared"))
    parser.add_argument("--overwrite_output_dir", action="store_true")
    parser.add_argument("--to")
    options, keys = parser.parse_known_args()
    check(options)
    config = load_train_config(keys, DEFAULT_RUN)
    model = config.model_name_or_path
    model_dir = (
        EMBEDDED_MODEL if model is None else resolve_model(model, config.model_revision, weights=False)
    )
    model_config, tokenizer = read_config(model_dir), load_tokenizer(model_dir)
    template = load_chat_template(config.template, tokenizer, now=training_clock)
    settings = token_settings(config, model_config)

    # ---- every row, as training will see it --------------------------------------------------------------------------

    faults: list[UserError] = []
    train_rows, held_out = read_datasets(config, faults.append)
    sets = {
        name: tokenize_rows(rows, place, settings, model_config, tokenizer, template, faults.append)
        for name, rows, place in (
            ("train", train_rows, config.dataset),
            ("validation", held_out, config.eval_dataset or config.dataset),
        )
        if rows or name == "train"
    }
    if faults and not (options.skip_invalid and sets["train"].examples):
        refuse(faults, config.dataset)
    sets = {
        name: dataset for name, dataset in sets.items() if dataset.examples
    }  # every held-out row may have been a wrong one
    show(sets["train"], tokenizer, options.show)
    statistics = {name: count(dataset) for name, dataset in sets.items()}
    if "validation" in sets:
        known = set(map(content, sets["train"].rows))
        statistics["validation"]["also_in_training"] = sum(
            content(row) in known for row in sets["validation"].rows
        )
    in_turns = any(row.messages is not None for dataset in sets.values() for row in dataset.rows)
    wording = f"template {template.name}" if in_turns else "no template"
    print_statistics(config, wording, settings["cutoff_len"], statistics, faults)

    # ---- all files, or none ------------------------------------------------------------------------------------------

    with TemporaryDirectory(
        dir=options.output.absolute().parent, prefix=options.output.name + "."
    ) as passing:
        part = Path(passing)
        for name, dataset in sets.items():
            write_whole(
                part / f"{name}.jsonl", "".join(to_json(to_record(row)) + "\n" for row in dataset.rows)
            )
            save_tokens(
                tokens_file(part / f"{name}.jsonl"),
                dataset,
                tokens_key(dataset.rows, tokenizer, template, settings),
            )
        write_whole(part / "statistics.json", json.dumps(statistics, indent=2) + "\n")
        write_whole(part / RUN_FILE, run_settings(config, options.output, settings["cutoff_len"], set(sets)))
        supervised = [example.supervised for example in sets["train"].examples]
        plot_lengths(sets["train"].uncut_lengths, supervised, settings["cutoff_len"], part / "lengths.png")
        options.output.mkdir(exist_ok=True)
        for name in FILES:
            if (part / name).exists():
                os.replace(part / name, options.output / name)
            else:
                (options.output / name).unlink(missing_ok=True)  # held-out rows of an earlier time
    print(
        f"\nprepared: {options.output}\nto train: python scripts/train.py --config {options.output / RUN_FILE}"
    )
    if options.to:
        write_files(
            options.to, {name: options.output / name for name in FILES if (options.output / name).is_file()}
        )
        print(f"sent to {redacted(options.to)}")


def check(options: argparse.Namespace) -> None:
    """The values of single keys, and whether the files may be written."""
    output = options.output
    if options.show < 0:
        raise UserError(f"--show must be at least 0, not {options.show}")
    if options.to:
        check_address("--to", options.to)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, not a directory")
    if not os.access(output if output.exists() else output.absolute().parent, os.W_OK):
        raise UserError(f"--output {output}: {output.absolute().parent} is no directory that may be written")
    if not options.overwrite_output_dir and (found := [name for name in FILES if (output / name).exists()]):
        raise UserError(
            f"--output {output} already holds {found[0]}; choose another, or add --overwrite_output_dir"
        )


def refuse(faults: list[UserError], dataset: str | Sequence[str]) -> None:
    """List the rows that are wrong, and end."""
    for fault in sorted(faults, key=_natural_order)[:LISTED]:
        print(fault, file=sys.stderr)
    more = f", {LISTED} of them listed above" if len(faults) > LISTED else ""
    rows = "1 row is" if len(faults) == 1 else f"{len(faults):,} rows are"
    raise UserError(f"{rows} wrong in {dataset}{more}; correct them, or leave them out with --skip_invalid")


def _natural_order(fault: UserError) -> list[str]:
    return [
        part.rjust(12, "0") if part.isdigit() else part for part in re.split(r"(\d+)", str(fault))
    ]  # line 9 before line 10


def show(dataset: Dataset, tokenizer: Tokenizer, count: int) -> None:
    """Some examples from all over the set, as they go into the model."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for i in range(0, len(dataset) if count else 0, max(1, len(dataset) // max(count, 1)))[:count]:
        example, row = dataset.examples[i], dataset.rows[i]
        print(f"--- {row.location}: {len(example.input_ids):,} tokens, {example.supervised:,} of them learned")
        print(highlight_learned(example, tokenizer, colours), end="\n\n")


def content(row: Row) -> str:
    """What makes two rows the same one."""
    return json.dumps(to_record(row))


def count(dataset: Dataset) -> dict[str, int | float]:
    """The figures of one set. Lengths are those before the cut."""
    lengths = sorted(dataset.uncut_lengths)
    return {
        "rows": len(dataset),
        "tokens": sum(len(example.input_ids) for example in dataset.examples),
        "supervised_tokens": sum(example.supervised for example in dataset.examples),
        "median_length": median(lengths),
        "p95_length": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "longest": lengths[-1],
        "longer_than_cutoff": dataset.truncated,
        "dropped": dataset.dropped,
        "empty_answers": sum(not row.completion.strip() for row in dataset.rows),
        "repeated": len(dataset) - len(set(map(content, dataset.rows))),
    }


def print_statistics(
    config: TrainConfig, wording: str, cutoff_len: int, statistics: dict[str, dict], faults: list[UserError]
) -> None:
    """A column a set, a row a figure."""
    print(
        f"dataset    {config.dataset}, for {config.model_name_or_path or 'assets/base'}, {wording}, cutoff_len {cutoff_len:,}"
    )
    if faults:
        rows = "1 row that is" if len(faults) == 1 else f"{len(faults):,} rows that are"
        print(f"left out   {rows} wrong; the first: {min(faults, key=_natural_order)}")
    print("\n" + " " * 30 + "".join(f"{name:>14}" for name in statistics))
    for key, (words, form) in ROWS.items():
        if any(key in figures for figures in statistics.values()):
            cells = (form.format(figures[key]) if key in figures else "" for figures in statistics.values())
            print(f"{words:<30}" + "".join(f"{cell:>14}" for cell in cells))


def run_settings(config: TrainConfig, output: Path, cutoff_len: int, sets: set[str]) -> str:
    """What the run was given, but for what is done now, with the rows that were saved in place of those that
    were read.
    """
    given = {
        field.name: value
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    given = {name: value for name, value in given.items() if name not in DONE_HERE}
    given |= {"dataset": str(output / "train.jsonl"), "cutoff_len": cutoff_len}
    if "validation" in sets:
        given["eval_dataset"] = str(output / "validation.jsonl")
    heading = f"# A training on this data: python scripts/train.py --config {output / RUN_FILE}\n"
    return heading + yaml.safe_dump(given, sort_keys=False)


if __name__ == "__main__":
    run_script(main)
