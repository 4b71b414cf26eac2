"""Compare several training runs, or look at one: a table, a picture, and a page for the browser.

    python scripts/compare.py runs/a runs/b runs/c
    python scripts/compare.py runs/* --output compare.png    the picture's file; default: compare.png
    python scripts/compare.py runs/* --html compare.html     also write a page for the browser into this file

Each directory is the output_dir of a training run.
The table has a line for each run: the number of steps, the last training loss, the lowest held-out loss and
its step, the speed (a median, so that a slow first step does not matter), the peak memory, the time that the
steps took, the share of exact answers, and the settings that differ. A dash marks a figure that the run did
not record. Where a setting is left to a preset, the table shows the value that the run used.

The page has the same table, curves to point at, the settings, and the answers of the runs side by side. It is
one file that needs no network. The script reads only `metrics.jsonl`, `training_config.yaml`,
`adapter_config.json` and `answers.jsonl`, and skips directories without `metrics.jsonl`.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import io
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from minilora.adapters.file import read_adapter_config
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE
from minilora.config import LoraConfig
from minilora.initialize import takes_part_of_base
from minilora.run.answers import read_answers
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.page import make_page
from minilora.run.plots import plot_runs, series
from minilora.run.settings import MAY_CHANGE, load_train_config
from minilora.run.tracker import METRICS_FILE, minutes, short_number
from minilora.run.yaml_file import read_yaml
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import check_page, check_picture, read_json_lines, write_whole
from minilora.system.redaction import without_secrets
from minilora.system.schema import Field, read_fields, shown_name
from minilora.system.terminal import printable

# A resumed run may change the settings in MAY_CHANGE; most of them only say where and how often it writes.
# The table hides those, but not the ones that tell a reader what was trained and how.
SHOWN = set("model_name_or_path model_revision dataset eval_dataset bf16 fp16 gradient_checkpointing".split())
HIDDEN = MAY_CHANGE - SHOWN
RECORD = {"step": Field(int, "finished optimizer steps", required=True, low=0, high=10**12)}


@dataclass(frozen=True)
class Run:
    """What a run wrote into its directory."""

    records: list[dict]  # the lines of metrics.jsonl
    settings: dict  # training_config.yaml, with the values of its preset; empty if there is none
    answers: list[dict[str, str]] = field(default_factory=list)  # answers.jsonl, if there is one


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY")
    parser.add_argument("--output", type=local_path, default="compare.png")
    parser.add_argument("--html", type=local_path)
    options = parser.parse_args()
    check_picture("--output", options.output)
    if options.html:
        check_page("--html", options.html)
    runs = read_runs([Path(directory) for directory in options.directories])
    print(comparison(runs))
    plot_runs({name: run.records for name, run in runs.items()}, options.output)
    print(f"\npicture: {options.output}")
    if options.html:
        write_whole(options.html, page(runs))
        print(f"page: {options.html}")


def read_runs(directories: list[Path]) -> dict[str, Run]:
    """Name -> run; the names are the shortest ends of the paths that are all different.

    A directory that is given twice is one run. Raises UserError if there is no run at all.
    """
    runs: dict[Path, Run] = {}
    for directory in directories:
        if not directory.exists():
            raise UserError(f"{directory} does not exist; name the output_dir of a training run")
        if (directory / METRICS_FILE).is_file():
            runs[directory.resolve()] = read_run(directory)
        else:  # runs/* matches pictures and other files too
            print(f"note: {directory} is skipped: it has no {METRICS_FILE}", file=sys.stderr)
    if not runs:
        raise UserError(f"there is no training run; name an output_dir that contains {METRICS_FILE}")
    for length in range(1, max(len(path.parts) for path in runs) + 1):
        names = [printable("/".join(path.parts[-length:])) for path in runs]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs.values(), strict=True))


def read_run(directory: Path) -> Run:
    """The run in a directory. Raises UserError if one of its files is not valid."""
    path, settings_path = directory / METRICS_FILE, directory / SETTINGS_FILE
    records = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        try:
            read_fields(record, RECORD)
            for name, value in record.items():
                if type(value) is not float:  # of which even NaN is a measurement
                    Field(float, "a measurement").read(shown_name(name), value)
        except UserError as error:
            raise UserError(f"{path}, line {number} is not a record: {error}") from error
    if not records:
        raise UserError(f"{path} is empty: the run has recorded nothing yet")
    settings = read_yaml(settings_path) if settings_path.exists() else {}
    return Run(records, settings | preset_values(directory, settings), read_answers(directory))


def preset_values(directory: Path, settings: dict) -> dict:
    """The values that a run used of the adapter's settings that are left to a preset."""
    lora = used_lora(directory, settings)
    if lora is None:
        return {}
    targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    values = dict(lora_rank=lora.r, lora_dropout=lora.lora_dropout, lora_target=targets)
    if not lora.use_vera:  # which is not scaled
        values["lora_alpha"] = lora.lora_alpha
    return {name: value for name, value in values.items() if settings.get(name) is None}


def used_lora(directory: Path, settings: dict) -> LoraConfig | None:
    """A run's adapter: as it is saved, or as the settings say. None if they do not tell.

    Raises UserError if the adapter's file is not valid. Settings may be those of another version.
    """
    rank_is_doubled = takes_part_of_base(str(settings.get("init_lora_weights")))  # in the file
    if (directory / ADAPTER_CONFIG_FILE).exists() and not rank_is_doubled:
        return read_adapter_config(directory)
    try:
        with redirect_stdout(io.StringIO()):  # notes on single keys
            config = load_train_config(["--config", str(directory / SETTINGS_FILE)])
    except UserError:
        return None
    return None if config.adapter_name_or_path else config.lora_config()


def comparison(runs: dict[str, Run]) -> str:
    """The table as text: one line for each run below a line of headings."""
    settings = [line for line in all_settings(runs) if line["differs"]]
    rows = figures_of(runs)
    for setting in settings:
        for row, value in zip(rows, setting["values"], strict=True):
            row[setting["name"]] = value
    table = [["run", *rows[0]]] + [[name, *row.values()] for name, row in zip(runs, rows, strict=True)]
    name_width, *widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *row in table:
        cells = (f"  {text:>{width}}" for text, width in zip(row, widths, strict=True))
        lines.append(f"{name:<{name_width}}" + "".join(cells))
    return "\n".join(lines)


def page(runs: dict[str, Run]) -> str:
    """The page for the browser, as HTML."""
    return make_page(
        names=[without_secrets(name) for name in runs],
        records=[run.records for run in runs.values()],
        figures=figures_of(runs),
        settings=all_settings(runs),
        answers=[run.answers for run in runs.values()],
    )


def figures_of(runs: dict[str, Run]) -> list[dict[str, str]]:
    """Heading -> text, of each run. The share of exact answers is left out if no run has any."""
    rows = [figures(run) for run in runs.values()]
    answered = any(run.answers for run in runs.values())
    return [{name: text for name, text in row.items() if answered or name != "exact"} for row in rows]


def figures(run: Run) -> dict[str, str]:
    """Heading -> text, of one run."""
    losses, speeds, memory, seconds = (
        series(run.records, name)[1] for name in ("loss", "tokens_per_second", "memory", "seconds")
    )
    steps, held_out = series(run.records, "eval_loss")
    best = min(zip(held_out, steps, strict=True), default=None)
    exact = [answer["adapted"] == answer["expected"] for answer in run.answers]
    return {
        "steps": str(max(record["step"] for record in run.records)),
        "final loss": f"{losses[-1]:.4f}" if losses else "-",
        "held-out": f"{best[0]:.4f}" if best else "-",
        "at step": str(best[1]) if best else "-",
        "tokens/s": short_number(statistics.median(speeds)) if speeds else "-",
        "memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "-",
        "time": minutes(seconds[-1]) if seconds else "-",
        "exact": f"{statistics.mean(exact):.1%}" if exact else "-",
    }


def all_settings(runs: dict[str, Run]) -> list[dict]:
    """For each setting its name, its values in all runs as text, and whether they differ."""
    every = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for settings in every for name in settings if name not in HIDDEN)
    return [
        {
            "name": name,
            "values": [_as_text(settings[name]) if name in settings else "-" for settings in every],
            "differs": any(each.get(name) != every[0].get(name) for each in every),
        }
        for name in names
    ]


def _as_text(value: object) -> str:
    """A setting's value as in the table: none, a,b or 0.1."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else without_secrets(str(value))


if __name__ == "__main__":
    run_script(main)
