"""Train with every combination of a few settings, one after the other, and compare.

    python scripts/sweep.py --config sweep.yaml

The file is one of the trainer's, and has lists under `sweep`:

    dataset: my.jsonl
    val_size: 0.1
    output_dir: outputs/ranks
    sweep:
      lora_rank: [4, 8]
      learning_rate: [1e-4, 2e-4]

Each combination is a run of scripts/train.py of its own in `output_dir/lora_rank-4_learning_rate-1e-4`, with
its settings in a file of that name beside it. All of them are checked before the first one starts. Start the
sweep again, and finished runs are passed over and interrupted ones go on. A run that fails does not stop the
others; it is named at the end.

Exit codes: 0 all runs are finished, 2 a mistake of yours or runs that failed, 130 interrupted (the run at
work has saved).
"""

import argparse
import io
import itertools
import math
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import TrainConfig, load_train_config, read_yaml
from minilora.run.tracker import METRICS_FILE
from minilora.system.errors import ArgumentParser, UserError, run_script, summarize
from minilora.system.files import check_writable, read_json_lines, write_whole

TRAINER = Path(__file__).with_name("train.py")
LAST_FILE = "README.md"  # what a run writes when all else is done
PLACES = {
    "output",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
}  # which the sweep sets itself


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    directory: Path
    chosen: dict[str, object]  # its values of the swept keys

    @property
    def file(self) -> Path:
        """Its settings."""
        return self.directory.with_name(self.directory.name + ".yaml")

    @property
    def finished(self) -> bool:
        return (self.directory / LAST_FILE).exists()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    place = parser.parse_args().config
    settings = read_yaml(place)
    grid = combinations(settings.pop("sweep", None), place)
    parent = Path(settings.pop("output", None) or settings.pop("output_dir", None) or TrainConfig.output_dir)
    runs = [Run(parent / name, chosen) for name, chosen in grid.items()]
    texts = [
        yaml.safe_dump(settings | run.chosen | {"output_dir": str(run.directory)}, sort_keys=False)
        for run in runs
    ]
    for run, text in zip(runs, texts, strict=True):
        check(run, text, place)
    parent.mkdir(parents=True, exist_ok=True)
    for run, text in zip(runs, texts, strict=True):
        write_whole(run.file, text)

    failed = []
    for i, run in enumerate(runs, start=1):
        print(
            f"\n==== run {i} of {len(runs)}: {run.directory.name}{'  (finished before)' * run.finished}",
            flush=True,
        )
        if run.finished:
            continue
        code = train(run)
        if code == 130:
            print(f"interrupted; to go on: python scripts/sweep.py --config {place}")
            raise KeyboardInterrupt
        if code:
            failed.append(f"{run.directory.name} (exit code {code})")
    print_table(runs)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {summarize(failed)}; what they said stands above; when it is mended, "
            "start the sweep again: finished runs are passed over"
        )


def combinations(swept: object, place: Path) -> dict[str, dict[str, object]]:
    """Name: settings of each point of the grid; the last key changes fastest."""
    if not isinstance(swept, dict) or not swept:
        raise UserError(f"{place} has no lists under sweep, such as lora_rank: [4, 8]")
    swept = {str(key).replace("-", "_"): values for key, values in swept.items()}
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{place}: under sweep, {key} must be a list of values, not {values!r}")
        if key in PLACES:
            raise UserError(
                f"{place}: {key} cannot be swept; every run has a directory of its own in output_dir"
            )
    grid = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        name = "_".join(f"{key}-{short(value)}" for key, value in chosen.items())
        if name in grid:
            raise UserError(f"{place}: two runs of the sweep would be called {name}; give each value once")
        grid[name] = chosen
    return grid


def short(value: object) -> str:
    """A value as part of a file's name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text)


def check(run: Run, text: str, place: Path) -> None:
    """Raise UserError for a run that cannot be, or that was finished with other settings. Nothing is written
    where it will be.
    """
    check_writable("output_dir", run.file, parents=True)
    with (
        TemporaryDirectory() as passing,
        redirect_stdout(io.StringIO()),
    ):  # the run will say what there is to say about its keys
        file = Path(passing) / run.file.name
        file.write_text(text, encoding="utf-8")
        try:
            config = load_train_config(["--config", str(file)])
        except UserError as error:
            raise UserError(f"{run.directory.name}: {str(error).replace(str(file), str(place))}") from error
    if run.finished:
        try:
            saved = read_yaml(run.directory / SETTINGS_FILE)
        except UserError as error:
            raise UserError(
                f"{run.directory} is finished, but {error}; choose another output_dir, or remove it"
            ) from error
        free = config.may_change() - {"model_name_or_path", "model_revision", "dataset", "eval_dataset"}
        wanted = {key: value for key, value in asdict(config).items() if key not in free}
        changed = [f"{key} {saved.get(key)!r}" for key, value in wanted.items() if saved.get(key) != value]
        if changed:
            raise UserError(
                f"{run.directory} was finished with {summarize(changed)}; choose another output_dir, or remove it"
            )


def train(run: Run) -> int:
    """The exit code of the trainer, or 130 if the sweep is to end.

    Ctrl-C reaches the trainer from the terminal; SIGTERM is passed on. It saves, and then ends; but while it
    is starting yet it ends as any program does, with another exit code than 130.
    """
    command = [sys.executable, str(TRAINER), "--config", str(run.file), "--resume_from_checkpoint", "latest"]
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGTERM and trainer is not None:
            trainer.terminate()

    trainer = None
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer = subprocess.Popen(command)
        if received:  # in between
            trainer.terminate()
        code = trainer.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if received else code


def print_table(runs: list[Run]) -> None:
    """The settings of each run and what came of them, the best one first: lowest held-out loss, or training
    loss without one.
    """
    keys, rows = list(runs[0].chosen), []
    for run in runs:
        metrics = run.directory / METRICS_FILE
        records = read_json_lines(metrics) if metrics.is_file() else []
        training = [record["loss"] for record in records if "loss" in record]
        held_out = [record["eval_loss"] for record in records if "eval_loss" in record and record["step"] > 0]
        order = (not run.finished, min(held_out, default=math.inf), training[-1] if training else math.inf)
        steps = max((record["step"] for record in records), default=0)
        losses = [
            f"{values[-1]:.4f}" if values else "" for values in (training, sorted(held_out, reverse=True))
        ]
        chosen = [
            ",".join(map(str, value)) if isinstance(value, list) else str(value)
            for value in run.chosen.values()
        ]
        rows.append((order, [*chosen, str(steps), *losses, "finished" if run.finished else "not finished"]))
    table = [
        [*keys, "steps", "training loss", "lowest held-out loss", ""],
        *(cells for _, cells in sorted(rows)),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


if __name__ == "__main__":
    run_script(main)
