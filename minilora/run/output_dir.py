"""The directory that a run leaves its results in: may it, and what of an earlier run has to go.

Only files under the names that a run writes are ever removed, whatever else lies there. Nothing is written by
`check_output_dir`: a run that is refused leaves no trace.
"""

import os
from pathlib import Path

from minilora.formats.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.run.checkpoints import delete_checkpoint, delete_leftovers, list_checkpoints
from minilora.run.settings import TrainConfig
from minilora.run.tracker import METRICS_FILE
from minilora.system.errors import UserError
from minilora.system.files import write_whole

SETTINGS_FILE = "training_config.yaml"
RUN_FILES = (
    SETTINGS_FILE,
    METRICS_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    "loss.png",
    "training.png",
    "README.md",
)


def files_of_a_run(directory: Path) -> list[Path]:
    """What a run writes under names that another one would overwrite."""
    return [path for name in RUN_FILES if (path := directory / name).exists()] + list_checkpoints(directory)


def check_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuse a directory that cannot be written or holds another run. `checkpoint`: the one that this run
    goes on from.
    """
    directory = Path(config.output_dir)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir {directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir {directory} cannot be written: no permission in {existing}")
    killed_early = (
        config.resume_from_checkpoint == "latest" and not (directory / ADAPTER_WEIGHTS_FILE).exists()
    )
    if config.overwrite_output_dir or killed_early or _holds(directory, checkpoint):
        return
    if found := files_of_a_run(directory):
        raise UserError(
            f"output_dir {directory} already holds a run ({found[0].name}); choose another, or add --overwrite_output_dir, or "
            "--resume_from_checkpoint latest to go on with it"
        )


def open_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """Make the directory, clear what another run left (and nothing else), and write down this run's settings."""
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        delete_leftovers(directory)
        if not _holds(directory, checkpoint):
            for path in files_of_a_run(directory):
                delete_checkpoint(path) if path.is_dir() else path.unlink()
        write_whole(directory / SETTINGS_FILE, config.to_yaml())
    except OSError as error:
        raise UserError(f"output_dir {directory} cannot be written: {error.strerror}") from error


def _holds(directory: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == directory.resolve()
