"""Prepare data for training: read it, check every row, split it, count its tokens, and save rows and tokens.

    python scripts/prepare.py --model mistralai/Mistral-7B-v0.1 --dataset my.jsonl --template mistral
    python scripts/prepare.py --config run.yaml --show 3                     show three examples
    python scripts/prepare.py --config run.yaml --to s3://bucket/prepared    send the files there too
    python scripts/train.py --config prepared/train.yaml                     train on them

Keys are those of the trainer (`python scripts/train.py --help`), and also

    --show N                  show N examples as the model sees them: learned tokens in colour, and where cut
    --skip_invalid            skip wrong rows; without it they are listed, and nothing is saved
    --output DIR              default: prepared
    --overwrite_output_dir    replace the files of an earlier preparation in DIR
    --to ADDRESS              send the files to s3://bucket/folder or another storage that fsspec can write

The output directory then holds

    train.jsonl, validation.jsonl                the rows in one form, mixed and split
    train.safetensors, validation.safetensors    their tokens, which training and evaluation then use
    statistics.json, lengths.png                 lengths, learned tokens, and how many rows are cut
    train.yaml                                   settings of a training on these rows, for train.py --config

No weights are read, and no weights of a model on the hub are downloaded.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import yaml

from minilora.config import ModelConfig
from minilora.data.chat import ChatTemplate
from minilora.data.examples import Dataset
from minilora.data.mask_view import highlight_learned
from minilora.data.prepared import save_tokens, tokens_file, tokens_key
from minilora.data.rows import Row, to_record
from minilora.data.tokenizer import Tokenizer
from minilora.formats.weights import read_config
from minilora.run.datasets import (
    choose_template,
    dataset_names,
    describe_template,
    read_datasets,
    template_warnings,
    token_settings,
    tokenize_rows,
)
from minilora.run.plots import plot_lengths
from minilora.run.settings import TrainConfig, load_train_config, parse_with_keys
from minilora.run.vocabulary import choose_vocabulary, load_run_tokenizer
from minilora.system.assets import DEFAULT_RUN, EMBEDDED_MODEL
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import refuse_overwrite, to_json, write_whole
from minilora.system.hub import resolve_model
from minilora.system.outputs import check_output, whole_output
from minilora.system.remote import check_address, write_files

MAX_LISTED = 20  # wrong rows that are listed one by one
RUN_FILE = "train.yaml"
OUTPUT_FILES = (
    "train.jsonl",
    "train.safetensors",
    "validation.jsonl",
    "validation.safetensors",
    "statistics.json",
    "lengths.png",
    RUN_FILE,
)
# Keys whose effect is already in the saved rows. A training on these rows must not apply them again.
APPLIED_KEYS = {
    "eval_dataset",
    "val_size",
    "prompt_column",
    "completion_column",
    "messages_column",
    "text_column",
    "columns",
    "max_samples",
}
# The printed table: key of statistics.json -> label, format.
TABLE = {
    "rows": ("rows", "{:,}"),
    "examples": ("examples", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "supervised_tokens": ("supervised tokens", "{:,}"),
    "median_length": ("tokens in a row, median", "{:,.0f}"),
    "p95_length": ("95 % have at most", "{:,}"),
    "longest": ("longest", "{:,}"),
    "longer_than_cutoff": ("longer than cutoff_len, so cut", "{:,}"),
    "lost_tokens": ("tokens lost there", "{:,}"),
    "lost_thoughts": ("answers that lose thoughts", "{:,}"),
    "dropped": ("nothing to learn, so dropped", "{:,}"),
    "empty_answers": ("empty answers", "{:,}"),
    "repeated": ("the same as an earlier row", "{:,}"),
    "also_in_training": ("the same as a row of training", "{:,}"),
}
IF_ANY = {"lost_thoughts", "also_in_training"}  # lines that are only printed if there is something to count

Sets = dict[str, Dataset]  # "train" and, if rows are held out, "validation"


@dataclass(frozen=True)
class Encoding:
    """Everything that decides which tokens a row becomes."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: dict[str, object]  # cutoff_len, train_on_prompt, mask_history

    def tokenize(
        self, rows: list[Row], source: str | Sequence[str], on_error: Callable[[UserError], None]
    ) -> Dataset:
        return tokenize_rows(
            rows, source, self.settings, self.model_config, self.tokenizer, self.template, on_error
        )

    def key(self, rows: Sequence[Row]) -> str:
        return tokens_key(rows, self.tokenizer, self.template, self.settings)


def main() -> None:
    options, keys = parse_options()
    check_options(options)
    config = load_train_config(keys, DEFAULT_RUN)
    check_sources(config, options.output)
    encoding = load_encoding(config)

    errors: list[UserError] = []
    rows, held_out = read_datasets(config, errors.append)
    encoding = replace(encoding, template=choose_template(config.template, encoding.tokenizer, rows))
    sets = tokenize_sets(config, encoding, rows, held_out, errors)
    if errors and not (options.skip_invalid and "train" in sets):
        refuse(errors, config.dataset)
    show_examples(sets["train"], encoding.tokenizer, options.show)
    statistics = compute_statistics(sets)
    print_summary(config, encoding, sets, errors)
    print_table(statistics)

    save(sets, statistics, config, encoding, options.output)
    print(f"\nprepared: {options.output}")
    print(f"to train: python scripts/train.py --config {options.output / RUN_FILE}")
    if options.to:
        paths = {name: options.output / name for name in OUTPUT_FILES}
        write_files(options.to, {name: path for name, path in paths.items() if path.is_file()})
        print(f"sent to {options.to}")


# ---- options ----


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and the remaining arguments: keys of the trainer."""
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--skip_invalid", action="store_true")
    parser.add_argument("--output", type=local_path, default=Path("prepared"))
    parser.add_argument("--overwrite_output_dir", action="store_true")
    parser.add_argument("--to")
    return parse_with_keys(parser)


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for a wrong value, and for an output directory that cannot be written."""
    output = options.output
    if options.show < 0:
        raise UserError(f"--show must be at least 0, not {options.show}")
    if options.to:
        check_address("--to", options.to)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, not a directory")
    parent = Path(os.path.realpath(output)).parent  # The new folder is made beside an old one.
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is not a writable directory; choose another")
    check_output("--output", output)
    existing = [name for name in OUTPUT_FILES if (output / name).exists()]
    if existing and not options.overwrite_output_dir:
        raise UserError(
            f"--output {output} already holds {existing[0]}; choose another, or add --overwrite_output_dir"
        )


def check_sources(config: TrainConfig, output: Path) -> None:
    """Raise UserError if the model or the data of this preparation would be replaced by its results."""
    refuse_overwrite("--output", output, [config.model_name_or_path or EMBEDDED_MODEL])
    for file in OUTPUT_FILES:
        refuse_overwrite("--output", output / file, dataset_names(config))


def load_encoding(config: TrainConfig) -> Encoding:
    """Load the tokenizer of the model that a run trains. The rows decide on the template later."""
    model_dir = EMBEDDED_MODEL
    if config.model_name_or_path is not None:
        model_dir = resolve_model(config.model_name_or_path, config.model_revision, weights=False)
    base_config, tokenizer = (
        read_config(model_dir, config.accepted_fields()),
        load_run_tokenizer(config, model_dir),
    )
    _, model_config = choose_vocabulary(config, config.lora_config(), base_config, tokenizer)
    return Encoding(model_config, tokenizer, None, token_settings(config, model_config))


# ---- rows to tokens ----


def tokenize_sets(
    config: TrainConfig, encoding: Encoding, rows: list[Row], held_out: list[Row], errors: list[UserError]
) -> Sets:
    """Return the sets as training sees them, without empty ones; append the errors of rows to `errors`."""
    rows_of = {"train": (rows, config.dataset)}
    if held_out:
        rows_of["validation"] = (held_out, config.eval_dataset or config.dataset)
    sets = {name: encoding.tokenize(rows, source, errors.append) for name, (rows, source) in rows_of.items()}
    return {name: dataset for name, dataset in sets.items() if dataset.examples}


def refuse(errors: list[UserError], dataset: str | Sequence[str]) -> None:
    """List the wrong rows on stderr, the first MAX_LISTED of them, and raise UserError with their number."""
    for error in sorted(errors, key=_natural_order)[:MAX_LISTED]:
        print(error, file=sys.stderr)
    listed = f", {MAX_LISTED} of them listed above" if len(errors) > MAX_LISTED else ""
    rows = "1 row is" if len(errors) == 1 else f"{len(errors):,} rows are"
    raise UserError(f"{rows} wrong in {dataset}{listed}; correct them, or skip them with --skip_invalid")


def _natural_order(error: UserError) -> list[str]:
    """Return a sort key that puts line 9 before line 10."""
    parts = re.split(r"(\d+)", str(error))
    return [part.rjust(12, "0") if part.isdigit() else part for part in parts]


def show_examples(dataset: Dataset, tokenizer: Tokenizer, count: int) -> None:
    """Print `count` examples, evenly spread over the set, as the model sees them."""
    if count == 0:
        return
    use_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    stride = max(1, len(dataset) // count)
    for i in range(0, len(dataset), stride)[:count]:
        example, row = dataset.examples[i], dataset.rows[dataset.row_indices[i]]
        kept, uncut = len(example.input_ids), dataset.uncut_lengths[i]
        cut = f"; cut at cutoff_len, from {uncut:,}" if uncut > kept else ""
        print(f"--- {row.location}: {kept:,} tokens, {example.supervised:,} of them learned{cut}")
        print(highlight_learned(example, tokenizer, use_colours, lost=uncut - kept), end="\n\n")


# ---- statistics ----


def compute_statistics(sets: Sets) -> dict[str, dict[str, int | float]]:
    """Return the figures of every set, as in statistics.json."""
    statistics = {name: _count(dataset) for name, dataset in sets.items()}
    if "validation" in sets:
        training_rows = set(map(_identity, sets["train"].rows))
        repeated = sum(_identity(row) in training_rows for row in sets["validation"].rows)
        statistics["validation"]["also_in_training"] = repeated
    return statistics


def _count(dataset: Dataset) -> dict[str, int | float]:
    lengths = sorted(dataset.uncut_lengths)
    return {
        "rows": len(dataset.rows),
        "examples": len(dataset),
        "tokens": sum(len(example.input_ids) for example in dataset.examples),
        "supervised_tokens": sum(example.supervised for example in dataset.examples),
        "median_length": median(lengths),
        "p95_length": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "longest": lengths[-1],
        "longer_than_cutoff": dataset.truncated,
        "lost_tokens": dataset.lost_tokens,
        "lost_thoughts": dataset.lost_thoughts,
        "dropped": dataset.dropped,
        "empty_answers": sum(not row.completion.strip() for row in dataset.rows),
        "repeated": len(dataset.rows) - len(set(map(_identity, dataset.rows))),
    }


def _identity(row: Row) -> str:
    """Return a text that is equal for two rows with the same content."""
    return json.dumps(to_record(row))


def print_summary(config: TrainConfig, encoding: Encoding, sets: Sets, errors: list[UserError]) -> None:
    """Print which dataset was encoded for which model, and how many rows were skipped."""
    model, cutoff_len = config.model_name_or_path or "assets/base", encoding.settings["cutoff_len"]
    template = describe_template(encoding.template, encoding.tokenizer, sets["train"].rows)
    print(f"dataset    {config.dataset}, for {model}, cutoff_len {cutoff_len:,}")
    print(f"template   {template}")
    for line in template_warnings(sets["train"], encoding.tokenizer, encoding.template, config.mask_history):
        print(line)
    if errors:
        rows = "1 wrong row" if len(errors) == 1 else f"{len(errors):,} wrong rows"
        print(f"skipped    {rows}; the first: {min(errors, key=_natural_order)}")


def print_table(statistics: dict[str, dict[str, int | float]]) -> None:
    """Print the figures: one column per set, one line per figure."""
    print("\n" + " " * 30 + "".join(f"{name:>14}" for name in statistics))
    for key, (label, number_format) in TABLE.items():
        if any(figures.get(key, 0) for figures in statistics.values()) or key not in IF_ANY:
            cells = [number_format.format(f[key]) if key in f else "" for f in statistics.values()]
            print(f"{label:<30}" + "".join(f"{cell:>14}" for cell in cells))


# ---- files ----


def save(
    sets: Sets, statistics: dict[str, dict], config: TrainConfig, encoding: Encoding, output: Path
) -> None:
    """Write all files or none: the folder appears whole, in place of an earlier one."""
    cutoff_len, train_set = encoding.settings["cutoff_len"], sets["train"]
    with whole_output("--output", output, replaced=OUTPUT_FILES) as part:
        part.mkdir()
        for name, dataset in sets.items():
            rows_file = part / f"{name}.jsonl"
            write_whole(rows_file, "".join(to_json(to_record(row)) + "\n" for row in dataset.rows))
            save_tokens(tokens_file(rows_file), dataset, encoding.key(dataset.rows))
        write_whole(part / "statistics.json", json.dumps(statistics, indent=2) + "\n")
        settings = run_settings(config, output, cutoff_len, "validation" in sets)
        write_whole(part / RUN_FILE, settings, private=config.names_an_address())
        supervised = [example.supervised for example in train_set.examples]
        plot_lengths(train_set.uncut_lengths, supervised, cutoff_len, part / "lengths.png")


def run_settings(config: TrainConfig, output: Path, cutoff_len: int, has_validation: bool) -> str:
    """Return train.yaml: the settings that differ from the defaults, with the saved rows as the data."""
    defaults = {field.name: field.default for field in fields(config)}
    settings = {
        name: value
        for name, value in asdict(config).items()
        if value != defaults[name] and name not in APPLIED_KEYS
    }
    settings |= {"dataset": str(output / "train.jsonl"), "cutoff_len": cutoff_len}
    if has_validation:
        settings["eval_dataset"] = str(output / "validation.jsonl")
    heading = f"# A training on this data: python scripts/train.py --config {output / RUN_FILE}\n"
    return heading + yaml.safe_dump(settings, sort_keys=False)


if __name__ == "__main__":
    run_script(main)
