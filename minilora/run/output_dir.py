"""The directory of a run's results: check that the run may use it, then clear what an earlier run left.

Only files that a run itself writes are ever deleted; any other file there stays. `check_output_dir` writes
nothing, so a refused run leaves no trace. `open_output_dir` locks the directory until the script ends.
"""

import os
from pathlib import Path

from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.formats.weights import MODEL_CONFIG_FILE, SINGLE_FILE
from minilora.run.answers import ANSWERS_FILE
from minilora.run.checkpoints import delete_checkpoint, delete_leftovers, list_checkpoints
from minilora.run.datasets import dataset_names
from minilora.run.settings import TrainConfig
from minilora.run.tracker import METRICS_FILE
from minilora.system.errors import UserError, until_end
from minilora.system.files import refuse_overwrite, write_whole
from minilora.system.locks import locked

SETTINGS_FILE = "training_config.yaml"
RUN_FILES = (
    SETTINGS_FILE,
    METRICS_FILE,
    ANSWERS_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    "loss.png",
    "training.png",
    "README.md",
)
MODEL_FILES = (MODEL_CONFIG_FILE, SINGLE_FILE)  # of a full training, in place of the adapter's
KEPT_HERE = {ANSWERS_FILE}  # files of a run that are sent nowhere: rows of the dataset are its owner's


def files_of_a_run(directory: Path) -> list[Path]:
    """The existing files and checkpoints of a run: everything that another run there would overwrite."""
    # A model without settings beside it is somebody else's.
    names = RUN_FILES + MODEL_FILES * (directory / SETTINGS_FILE).is_file()
    paths = [directory / name for name in names]
    return [path for path in paths if path.exists()] + list_checkpoints(directory)


def check_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """Raise UserError if output_dir is not writable or holds a run that does not contain `checkpoint`."""
    directory = Path(config.output_dir)
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"output_dir {directory}: {parent} is a file, not a directory")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir {directory} cannot be written: no permission in {parent}")
    if config.finetuning_type == "full" and not (directory / SETTINGS_FILE).exists():
        for name in MODEL_FILES:
            if (directory / name).exists():
                raise UserError(f"output_dir {directory} holds a model ({name}); choose another directory")
    if config.overwrite_output_dir or _contains(directory, checkpoint):
        return
    finished = any((directory / name).exists() for name in (ADAPTER_WEIGHTS_FILE, SINGLE_FILE))
    if config.resume_from_checkpoint == "latest" and not finished:
        return  # The run was killed before its first checkpoint; it starts again.
    if files := files_of_a_run(directory):
        resume = ", or --resume_from_checkpoint latest to resume it"
        if config.resume_from_checkpoint == "latest":  # finished, and no checkpoint was left
            resume = "; it is finished, without a checkpoint to resume from"
        raise UserError(
            f"output_dir {directory} already holds a run ({files[0].name}); choose another, "
            f"or add --overwrite_output_dir{resume}"
        )


def check_inputs(config: TrainConfig, model_dir: Path) -> None:
    """Raise UserError if the run would overwrite what it reads: its base model, or its own examples."""
    directory = Path(config.output_dir)
    refuse_overwrite("output_dir", directory, [model_dir])
    for file in RUN_FILES:
        refuse_overwrite("the run's", directory / file, dataset_names(config))


def open_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """Make and lock the directory, delete another run's files and no others, and save this run's settings."""
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        until_end.enter_context(locked("output_dir", directory))
        delete_leftovers(directory)
        for name in (*RUN_FILES, *MODEL_FILES, *TOKENIZER_FILES):
            (directory / f"{name}.part").unlink(missing_ok=True)
        if not _contains(directory, checkpoint):
            for path in files_of_a_run(directory):
                if path.is_dir():
                    delete_checkpoint(path)
                elif path.name != SETTINGS_FILE:  # It may be the --config of this run; it is replaced whole.
                    path.unlink()
        (directory / ANSWERS_FILE).unlink(missing_ok=True)  # given by the adapter before a resume
        write_whole(directory / SETTINGS_FILE, config.to_yaml(), private=config.names_an_address())
    except OSError as error:
        raise UserError(f"output_dir {directory} cannot be written: {error.strerror}") from error


def _contains(directory: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == directory.resolve()
