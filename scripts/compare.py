"""Several training runs in one table and one picture, straight from their directories.

    python scripts/compare.py runs/a runs/b runs/c
    python scripts/compare.py runs/* --output compare.png

A line for each run: how far it went, its last training loss, its lowest held-out loss and where, its speed
(the median of what was recorded, so that a slow first step has no say), its peak memory, the time its steps
took, and the settings that differ. A dash stands for what a run did not record. Nothing but `metrics.jsonl`
and `training_config.yaml` is read, and what has no `metrics.jsonl` is passed over.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.plots import plot_runs, series
from minilora.run.settings import MAY_CHANGE
from minilora.run.tracker import METRICS_FILE, minutes, short_number
from minilora.system.errors import ArgumentParser, UserError, run_script
from minilora.system.files import check_writable, read_json_lines

TELLING = set(
    "model_name_or_path model_revision dataset eval_dataset bf16 fp16 gradient_checkpointing".split()
)
IRRELEVANT = (
    MAY_CHANGE - TELLING
)  # where a run leaves what, and how often: settings that differ and change no number


@dataclass(frozen=True)
class Run:
    """What a run left in its directory."""

    records: list[dict]
    settings: dict


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY", help="output_dir of a training run")
    parser.add_argument(
        "--output", default="compare.png", help="where the picture goes (default: %(default)s)"
    )
    options = parser.parse_args()
    output = Path(options.output)
    check_writable("--output", output)
    runs = read_runs([Path(directory) for directory in options.directories])
    print(comparison(runs))
    plot_runs({name: run.records for name, run in runs.items()}, output)
    print(f"\npicture: {output}")


def read_runs(directories: list[Path]) -> dict[str, Run]:
    """The runs by name: the shortest tail of the path that tells them apart. The same directory twice is one
    run.

    Raises UserError where there is none.
    """
    found = {}
    for directory in directories:
        if not directory.exists():
            raise UserError(f"{directory} does not exist; name the output_dir of a training run")
        if (directory / METRICS_FILE).is_file():
            found[directory.resolve()] = read_run(directory)
        else:  # runs/* names pictures and other things too
            print(f"note: {directory} is passed over: it holds no {METRICS_FILE}", file=sys.stderr)
    if not found:
        raise UserError(f"no training run is there; name the output_dir of one, in which {METRICS_FILE} lies")
    for length in range(1, max(len(path.parts) for path in found) + 1):
        names = ["/".join(path.parts[-length:]) for path in found]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, found.values(), strict=True))


def read_run(directory: Path) -> Run:
    """Raises UserError if what is there cannot be read."""
    path, settings_path = directory / METRICS_FILE, directory / SETTINGS_FILE
    records = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        if not (
            isinstance(record, dict)
            and "step" in record
            and all(isinstance(v, (int, float)) for v in record.values())
        ):
            raise UserError(f"{path}, line {number} is not a record: a step and numbers are expected")
    if not records:
        raise UserError(f"{path} is empty: the run has recorded nothing yet")
    try:
        settings = (
            yaml.safe_load(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{settings_path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{settings_path} must hold `key: value` lines")
    return Run(records, settings)


def comparison(runs: dict[str, Run]) -> str:
    """The table."""
    rows = [
        figures(run) | differences
        for run, differences in zip(runs.values(), differing_settings(runs), strict=True)
    ]
    table = [["run", *rows[0]]] + [[name, *row.values()] for name, row in zip(runs, rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    first, *others = widths
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {text:>{width}}" for text, width in zip(row, others, strict=True))
        for name, *row in table
    )


def figures(run: Run) -> dict[str, str]:
    """Column: text."""
    losses, speeds, memory, seconds = (
        series(run.records, name)[1] for name in ("loss", "tokens_per_second", "memory", "seconds")
    )
    steps, held_out = series(run.records, "eval_loss")
    best = min(zip(held_out, steps, strict=True), default=None)
    return {
        "steps": str(max(record["step"] for record in run.records)),
        "final loss": f"{losses[-1]:.4f}" if losses else "-",
        "held-out": f"{best[0]:.4f}" if best else "-",
        "at step": str(best[1]) if best else "-",
        "tokens/s": short_number(statistics.median(speeds)) if speeds else "-",
        "memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "-",
        "time": minutes(seconds[-1]) if seconds else "-",
    }


def differing_settings(runs: dict[str, Run]) -> list[dict[str, str]]:
    """For each run, its values of the settings that are not the same in all of them."""
    every = [run.settings for run in runs.values()]
    names = [
        name
        for name in dict.fromkeys(name for settings in every for name in settings)
        if name not in IRRELEVANT
    ]
    differing = [
        name for name in names if any(settings.get(name) != every[0].get(name) for settings in every)
    ]
    return [
        {name: _setting(settings[name]) if name in settings else "-" for name in differing}
        for settings in every
    ]


def _setting(value: object) -> str:
    if value is None:
        return "none"
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    run_script(main)
