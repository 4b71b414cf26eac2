"""Train with every combination of a few settings, one run after the other or together; compare the runs.

    python scripts/sweep.py --config sweep.yaml
    python scripts/sweep.py --config sweep.yaml --together

The file is a settings file of the trainer with lists of values under `sweep`:

    dataset: my.jsonl
    val_size: 0.1
    output_dir: outputs/ranks
    sweep:
      lora_rank: [4, 8]
      learning_rate: [1e-4, 2e-4]

Each combination is a separate run of scripts/train.py, in `output_dir/lora_rank-4_learning_rate-1e-4` and so
on. Its settings are in a file of the same name beside this directory. There are at most 1,000 runs. All
settings are checked before the first run starts. If you start the sweep again, it says what it found, skips
finished runs and resumes interrupted ones. A failed run does not stop the others; the sweep names it at the
end.

    --together     train runs in one process on one frozen model, where they share the model and the data

Runs that differ in settings of the adapter or of its optimizer are then trained by scripts/train_together.py,
with the same results. One line says which runs go together. What does not fit into memory together is trained
in halves.

A signal that ends the sweep reaches its trainer, which saves a checkpoint. Even if the sweep is killed, the
trainer saves and ends.

Exit codes: 0 all runs are finished, 2 a mistake in the settings or failed runs, 130 interrupted (the runs at
work have saved a checkpoint).
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import io
import itertools
import math
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from minilora.run.checkpoints import list_checkpoints
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import TrainConfig, load_train_config
from minilora.run.together import describe_groups, groups
from minilora.run.tracker import METRICS_FILE
from minilora.run.yaml_file import read_yaml
from minilora.system.children import tied_environment
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, summarize, until_end
from minilora.system.files import check_writable, read_json_lines, refuse_overwrite, write_whole
from minilora.system.locks import check_unlocked, locked
from minilora.system.redaction import without_secrets
from minilora.system.schema import shown
from minilora.system.signals import handled, terminating

TRAINER = Path(__file__).with_name("train.py")
TRAINER_OF_SEVERAL = Path(__file__).with_name("train_together.py")
LAST_FILE = "README.md"  # the file that a run writes last
MOST_RUNS = 1000
LONGEST_NAME = 200  # bytes; file systems allow 255, and files beside a run have longer names than the run
RESERVED_KEYS = {"output", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"}  # set by the sweep


@dataclass(frozen=True)
class Run:
    """One combination of the swept settings."""

    directory: Path
    chosen: dict[str, object]  # swept key -> value
    settings: TrainConfig | None = None  # once they are checked

    @property
    def file(self) -> Path:
        """The file with the run's settings."""
        return self.directory.with_name(self.directory.name + ".yaml")

    @property
    def finished(self) -> bool:
        return (self.directory / LAST_FILE).exists()

    @property
    def state(self) -> str:
        """What an earlier sweep has left of the run."""
        if self.finished:
            return "finished"
        checkpoints = list_checkpoints(self.directory)
        return f"interrupted at {checkpoints[-1].name}" if checkpoints else "not started"


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--config", required=True, type=local_path)
    parser.add_argument("--together", action="store_true")
    options = parser.parse_args()
    runs = prepare_runs(options.config)
    failed = train_all(runs, options.config, options.together)
    print_table(runs)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {summarize(failed)}; their error messages are above; "
            "start the sweep again after fixing them: it skips finished runs"
        )


def prepare_runs(config: Path) -> list[Run]:
    """All runs of the sweep, with their settings checked and written to files. Raises UserError."""
    settings = read_yaml(config)
    refuse_secrets(settings, config)
    grid = combinations(settings.pop("sweep", None), config)
    parent = settings.pop("output", None) or settings.pop("output_dir", None) or TrainConfig.output_dir
    if not isinstance(parent, str):
        raise UserError(f"{config}: output_dir must be text, not {shown(parent)}")
    parent = Path(parent)
    runs = [Run(parent / name, chosen) for name, chosen in grid.items()]
    texts = [
        yaml.safe_dump(settings | run.chosen | {"output_dir": str(run.directory)}, sort_keys=False)
        for run in runs
    ]
    for i, (run, text) in enumerate(zip(runs, texts, strict=True)):
        refuse_overwrite("the sweep's", run.file, [config])
        runs[i] = replace(run, settings=check(run, text, config))
    parent.mkdir(parents=True, exist_ok=True)
    until_end.enter_context(locked("output_dir", parent))
    print_found(runs)
    for run, text in zip(runs, texts, strict=True):
        write_whole(run.file, text)
    return runs


def refuse_secrets(settings: dict[str, object], config: Path) -> None:
    """Raise UserError for an address with a password, which would be written to the file of every run."""
    for key, value in settings.items():
        if without_secrets(text := str(value)) != text:
            raise UserError(
                f"{config}: {key} holds a password, a signature or a token, which the sweep would write into "
                "the file of every run; put credentials into the environment, or fetch the file first"
            )


def print_found(runs: list[Run]) -> None:
    """Print in a line what an earlier sweep has left, if there was one."""
    if any(run.directory.exists() for run in runs):
        states = [f"{run.directory.name} {run.state}" for run in runs if run.state.startswith("interrupted")]
        for state in ("finished", "not started"):
            if count := sum(run.state == state for run in runs):
                states.append(f"{count} {state}")
        print(f"found      {', '.join(states)}, of {len(runs)} runs")


def combinations(swept: object, config: Path) -> dict[str, dict[str, object]]:
    """Name -> swept settings, of every combination; the last key changes fastest. Raises UserError."""
    if not isinstance(swept, dict) or not swept:
        raise UserError(f"{config} has no lists under sweep, such as lora_rank: [4, 8]")
    swept = {str(key).replace("-", "_"): values for key, values in swept.items()}
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{config}: under sweep, {key} must be a list of values, not {shown(values)}")
        if key in RESERVED_KEYS:
            raise UserError(f"{config}: {key} cannot be swept; the sweep sets it for every run")
        for value in values:
            check_value(key, value, config)
    if math.prod(map(len, swept.values())) > MOST_RUNS:
        raise UserError(f"{config}: the sweep has more than {MOST_RUNS:,} runs; give fewer keys or values")
    grid = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        name = "_".join(f"{key}-{file_name_part(value)}" for key, value in chosen.items())
        if name in grid:
            raise UserError(f"{config}: two runs of the sweep would be called {name}; give each value once")
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"{config}: a run of the sweep would be called {shown(name)}, which has more than "
                f"{LONGEST_NAME} bytes; sweep fewer keys, or shorter values"
            )
        grid[name] = chosen
    return grid


def check_value(key: str, value: object, config: Path) -> None:
    """Raise UserError for a swept value that is no number, no text and no list of them."""
    parts = value if isinstance(value, list) else [value]
    is_nan = any(isinstance(part, float) and math.isnan(part) for part in parts)
    if is_nan or any(isinstance(part, (dict, list)) for part in parts):
        raise UserError(f"{config}: under sweep, {key} holds {shown(value)}, which is no value of a setting")


def file_name_part(value: object) -> str:
    """A value without characters that do not belong in a file name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text)


def check(run: Run, text: str, config: Path) -> TrainConfig:
    """Return a run's settings. Raises UserError if they are not valid, or if it was finished with others.

    `text` are the settings as YAML. Nothing is written to the output directory.
    """
    check_writable("output_dir", run.file, parents=True)
    check_unlocked("output_dir", run.directory.parent)  # another sweep
    check_unlocked("output_dir", run.directory)  # a trainer
    # The run itself prints the trainer's notes on its keys.
    with TemporaryDirectory() as temporary, redirect_stdout(io.StringIO()):
        file = Path(temporary) / run.file.name
        file.write_text(text, encoding="utf-8")
        try:
            settings = load_train_config(["--config", str(file)])
        except UserError as error:
            raise UserError(f"{run.directory.name}: {str(error).replace(str(file), str(config))}") from error
    if run.finished:
        check_finished(run, settings)
    return settings


def check_finished(run: Run, settings: TrainConfig) -> None:
    """Raise UserError if a finished run had other settings, apart from those that change no number."""
    remedy = "choose another output_dir, or remove it"
    try:
        saved = read_yaml(run.directory / SETTINGS_FILE)
    except UserError as error:
        raise UserError(f"{run.directory} is finished, but {error}; {remedy}") from error
    free = settings.may_change() - {"model_name_or_path", "model_revision", "dataset", "eval_dataset"}
    changed = [
        f"{key} {saved.get(key)!r}"
        for key, value in asdict(settings).items()
        if key not in free and saved.get(key) != value
    ]
    if changed:
        raise UserError(f"{run.directory} was finished with {summarize(changed)}; {remedy}")


def train_all(runs: list[Run], config: Path, together: bool = False) -> list[str]:
    """Train every run that is not finished, and return the names of those that failed.

    Exits with 130 if the sweep is interrupted.
    """
    settings, failed = [run.settings for run in runs], []
    if together:
        print(f"together   {describe_groups(settings)}")
    for indices in groups(settings) if together else [[i] for i in range(len(runs))]:
        group = [runs[i] for i in indices]
        waiting = [run for run in group if not run.finished]
        numbers, names = (
            ", ".join(str(i + 1) for i in indices),
            ", ".join(run.directory.name for run in group),
        )
        before = "finished before" if not waiting else "some finished before"
        note = f"  ({before})" if waiting != group else ""
        print(f"\n==== run{'s' * (len(group) > 1)} {numbers} of {len(runs)}: {names}{note}", flush=True)
        code = (train(waiting[0]) if len(waiting) == 1 else train_together(waiting)) if waiting else 0
        if code == 130:
            words = f"--config {config}" + " --together" * together
            print(f"interrupted; to resume: python scripts/sweep.py {words}")
            sys.exit(130)
        if code:
            at_fault = [run for run in waiting if not run.finished] or waiting
            failed += [f"{run.directory.name} (exit code {code})" for run in at_fault]
    return failed


def train(run: Run) -> int:
    """Train one run and return the trainer's exit code, or 130 if a signal ends the sweep."""
    return start(TRAINER, "--config", run.file, "--resume_from_checkpoint", "latest")


def train_together(runs: list[Run]) -> int:
    """The same for several runs in one process."""
    return start(TRAINER_OF_SEVERAL, *(run.file for run in runs), "--resume")


def start(program: Path, *words: object) -> int:
    """Run a trainer and return its exit code, or 130 if a signal ends the sweep.

    The terminal sends Ctrl-C to the trainer too; other signals go to the sweep, which forwards them. The
    trainer then saves and exits with 130. While it is still starting, any signal ends it with another code.
    """
    command = [sys.executable, str(program), *map(str, words)]
    received: list[int] = []
    trainer = None

    def receive(number: int, _: object) -> None:
        received.append(number)
        if number != signal.SIGINT and trainer is not None:
            trainer.terminate()

    with handled(dict.fromkeys([signal.SIGINT, *terminating()], receive)):
        trainer = subprocess.Popen(command, env=tied_environment())
        if received:  # before `trainer` was set
            trainer.terminate()
        code = trainer.wait()
    return 130 if received else code


def print_table(runs: list[Run]) -> None:
    """Print the settings and the losses of each run, the best run first.

    Finished runs come first, then the lowest held-out loss, then the lowest training loss.
    """
    rows = sorted(map(table_row, runs))
    headings = [*runs[0].chosen, "steps", "training loss", "lowest held-out loss", ""]
    table = [headings, *(cells for _, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def table_row(run: Run) -> tuple[tuple[bool, float, float], list[str]]:
    """What orders the run among the others, and its cells in the table."""
    metrics = run.directory / METRICS_FILE
    records = read_json_lines(metrics) if metrics.is_file() else []
    training = [record["loss"] for record in records if "loss" in record]
    # Step 0 is the untrained model.
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record and record["step"] > 0]
    cells = [
        *(
            ",".join(map(str, value)) if isinstance(value, list) else str(value)
            for value in run.chosen.values()
        ),
        str(max((record["step"] for record in records), default=0)),
        f"{training[-1]:.4f}" if training else "",
        f"{min(held_out):.4f}" if held_out else "",
        "finished" if run.finished else "not finished",
    ]
    order = (not run.finished, min(held_out, default=math.inf), training[-1] if training else math.inf)
    return order, cells


if __name__ == "__main__":
    run_script(main)
