"""Stop a training and resume it as if nothing had happened.

    checkpoint-40/
      adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format; or a model: full.py
      training_state/                                   everything else
        state.json             numbers and texts, with references to the tensors
        tensors.safetensors    the tensors
        digests.json           SHA-256 of every other file

`training_state` is a folder because servers read every *.safetensors file beside an adapter.

The result of step n + 1 depends on the adapter, the optimizer's state, the loss scale and n itself; the data
order, the learning rate and dropout (random_state.py) are pure functions of n. A checkpoint saves all of
these and restores them bit for bit. The result also depends on the user's settings, model and data. A resume
compares them and refuses any difference by name.

How many processes compute a step changes no more than the order of its sums. So a run may go on with another
number of them, as long as a step has the same micro-batches: gradient_accumulation_steps x processes.

A checkpoint is complete or does not exist. Its files are first written to `checkpoint-40.part` and forced to
disk. Then one atomic rename gives the folder its name. Older checkpoints are deleted after that, and they
lose their name before their files. So after a kill or a full disk at any moment, every folder called
checkpoint-N is complete. A full disk ends the training with one line and exit code 2; free some space and
resume. The digests reveal any later damage.

`torch.save` would take three lines. But it writes a pickle, and reading a pickle runs any program inside it.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minilora import starts
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.adapters.save_load import read_adapter_config
from minilora.config import LoraConfig
from minilora.formats.weights import MODEL_CONFIG_FILE, SINGLE_FILE, save_tensors
from minilora.lora import lora_layers
from minilora.loss_scale import LossScale
from minilora.run.saved_state import check_optimizer, check_state
from minilora.run.settings import TrainConfig
from minilora.system.errors import UserError, summarize
from minilora.system.files import read_json, sync, write_whole
from minilora.system.schema import shown, shown_name
from minilora.wrapping import match_targets, plain_name

STATE_FILE = "training_state/state.json"
TENSORS_FILE = "training_state/tensors.safetensors"
DIGESTS_FILE = "training_state/digests.json"
_STATE_FILES = (STATE_FILE, TENSORS_FILE)
_TRAINED_FILES = (  # an adapter, or a model
    (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE),
    (MODEL_CONFIG_FILE, SINGLE_FILE),
)
_MAX_STATE_BYTES = 4 << 30  # it holds a record for every line of metrics.jsonl
_NUMBER = re.compile("#(0|[1-9][0-9]{0,17})")
# What the file of an adapter says in the words of its settings. Targets it says in its own.
_ADAPTER_FIELDS = """
    r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern modules_to_save lora_bias bias
    trainable_token_indices use_vera projection_prng_key
    """.split()
_PART, _OLD = ".part", ".old"  # suffixes of a checkpoint that is being written, and of one being deleted


# ---- writing and reading -----------------------------------------------------------------------------------


def write_checkpoint(directory: Path, write_adapter: Callable[[Path], None], state: dict) -> None:
    """Write `checkpoint-N` completely or not at all.

    `write_adapter(folder)` writes the adapter; `state` is a tree as `flatten` takes it. Raises UserError if
    the disk is full or not writable; earlier checkpoints stay complete.
    """
    part = directory.with_name(directory.name + _PART)
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_adapter(part)
        (part / STATE_FILE).parent.mkdir()
        tree, tensors = flatten(state)
        save_tensors(tensors, part / TENSORS_FILE)
        write_whole(part / STATE_FILE, json.dumps(tree))
        names = [*next(f for f in _TRAINED_FILES if (part / f[0]).exists()), *_STATE_FILES]
        digests = {name: _digest(part / name) for name in names}
        write_whole(part / DIGESTS_FILE, json.dumps(digests, indent=2) + "\n")
        _sync_and_rename(part, directory)
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"{directory} could not be saved: {reason}; earlier checkpoints are complete"
        raise UserError(message) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_checkpoint(directory: Path) -> dict:
    """Return the saved state, on the CPU. Raises UserError naming a missing or corrupt file."""
    if not _has_state(directory):
        raise UserError(f"{directory} holds no training_state to resume from")
    digests = read_json(directory / DIGESTS_FILE)
    listed = digests.keys() if isinstance(digests, dict) else set()
    kinds = [(*files, *_STATE_FILES) for files in _TRAINED_FILES if listed >= {*files, *_STATE_FILES}]
    if not kinds:
        raise UserError(f"{directory / DIGESTS_FILE} is corrupt: it does not list the files of a checkpoint")
    for name in kinds[0]:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing")
        if _digest(directory / name) != digests[name]:
            raise UserError(
                f"{directory / name} is truncated or corrupt: its SHA-256 is not the one in digests.json"
            )
    try:
        tensors = load_file(directory / TENSORS_FILE)
    except SafetensorError as error:
        raise UserError(f"{directory / TENSORS_FILE} is truncated or corrupt: {error}") from error
    try:
        return unflatten(read_json(directory / STATE_FILE, _MAX_STATE_BYTES), tensors)
    except UserError as error:
        raise UserError(f"{directory / STATE_FILE} is corrupt: {error}") from error


def _has_state(directory: Path) -> bool:
    return (directory / STATE_FILE).parent.is_dir()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_and_rename(part: Path, directory: Path) -> None:
    """Force a folder and everything in it to disk, then give it its final name."""
    for path in (*part.rglob("*"), part):
        sync(path)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)  # deleted only after the new one has its name
    os.replace(part, directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def flatten(tree: object, key: str = "") -> tuple[object, dict[str, Tensor]]:
    """Split a tree of dicts, lists, tensors and plain values into JSON and CPU copies of its tensors.

    {"state": {0: {"m": t}}}  ->  {"state": {"#0": {"m": {"$tensor": "state.#0.m"}}}},  {"state.#0.m": t}

    Optimizers number their parameters, but JSON has no integer keys: hence "#0". Tuples become lists. `key`
    is the dotted path of `tree` within the whole.
    """
    if isinstance(tree, Tensor):
        return {"$tensor": key}, {key: tree.detach().to("cpu", copy=True).contiguous()}
    if not isinstance(tree, (dict, list, tuple)):
        is_plain = tree is None or isinstance(tree, (bool, int, float, str))
        assert is_plain, f"{key} is {type(tree)}, which JSON cannot represent"
        return tree, {}
    items = tree.items() if isinstance(tree, dict) else ((str(i), value) for i, value in enumerate(tree))
    nodes: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in items:
        name = f"#{name}" if isinstance(name, int) else name
        nodes[name], inner = flatten(value, f"{key}.{name}" if key else name)
        tensors |= inner
    return nodes if isinstance(tree, dict) else list(nodes.values()), tensors


def unflatten(tree: object, tensors: dict[str, Tensor]) -> object:
    """Rebuild the tree that `flatten` took apart. Raises UserError for a tree that it did not make."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        name = tree["$tensor"]
        if not isinstance(name, str) or name not in tensors or len(tree) > 1:
            raise UserError(f"it names the tensor {shown(name)}, which is not there")
        return tensors[name]
    return {_key(key): unflatten(value, tensors) for key, value in tree.items()}


def _key(key: str) -> str | int:
    """The key that `flatten` wrote as this text."""
    if not key.startswith("#"):
        return key
    if not _NUMBER.fullmatch(key):
        raise UserError(f"it holds the key {shown(key)}, which is no number")
    return int(key[1:])


# ---- the checkpoints of a run ------------------------------------------------------------------------------


def list_checkpoints(directory: Path, up_to: float = math.inf) -> list[Path]:
    """The `checkpoint-N` folders of a run with N <= up_to, oldest first."""
    names = {path: path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")}
    steps = {path: int(name) for path, name in names.items() if name.isdecimal()}
    return sorted((path for path, step in steps.items() if step <= up_to), key=steps.__getitem__)


def find_checkpoint(directory: Path) -> tuple[Path | None, dict, list[str]]:
    """Find a checkpoint, or the newest complete one of a run: folder, state, and the faults of newer ones.

    Returns (None, {}, []) if there is none. Raises UserError if there are some and all of them are damaged.
    """
    if _has_state(directory):
        return directory, read_checkpoint(directory), []
    faults: list[str] = []
    for candidate in reversed(list_checkpoints(directory)):
        try:
            return candidate, read_checkpoint(candidate), faults
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError(f"{directory} has no complete checkpoint: {summarize(faults)}")
    return None, {}, []


def find_resumed(
    config: TrainConfig, lora: LoraConfig, training: dict, total_steps: int
) -> tuple[Path | None, dict]:
    """Return the checkpoint to resume from and its state, or (None, {}) for a run that starts at step 0.

    `training` must equal the checkpoint's own; see `check_same_training`. Raises UserError for a checkpoint
    that does not exist, is damaged, belongs to another training or lies beyond `total_steps`.
    """
    requested = config.resume_from_checkpoint
    if requested is None:
        return None, {}
    directory = Path(config.output_dir if requested == "latest" else requested)
    checkpoint, state, faults = find_checkpoint(directory)
    if checkpoint is None:
        if requested != "latest":
            raise UserError(
                f"resume_from_checkpoint = {requested}: no checkpoint with a training_state is there"
            )
        print(f"no checkpoint in {directory} yet: starting at the beginning")
        return None, {}
    for fault in faults:
        print(f"skipped: {fault}")
    try:
        check_state(state)
    except UserError as error:
        raise UserError(f"{checkpoint / STATE_FILE} is corrupt: {error}") from error
    check_same_training(state["training"], training, config.may_change(), checkpoint)
    if config.finetuning_type == "lora":
        _check_adapter(checkpoint, lora)
    if state["step"] > total_steps:
        raise UserError(
            f"{checkpoint} is beyond the {total_steps} steps of this training; "
            "raise max_steps or num_train_epochs"
        )
    best = best_checkpoint(checkpoint, state)
    if config.keeps_best and best is not None and not best.is_dir():
        raise UserError(f"{best} is missing, the best adapter so far, which load_best_model_at_end needs")
    print(f"resuming from {checkpoint}, after step {state['step']} of {total_steps}")
    return checkpoint, state


def best_checkpoint(checkpoint: Path, state: dict) -> Path | None:
    """The checkpoint, beside this one, of the lowest held-out loss so far; None if there is none yet."""
    step = state["best"]["step"]
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def check_same_training(saved: dict, now: dict, may_change: set[str], checkpoint: Path) -> None:
    """Raise UserError if settings differ that may not, naming each one with both values.

    A setting that is newer than the checkpoint had its default there.
    """
    now = json.loads(json.dumps(now))  # as `saved` went through JSON: tuples are lists
    saved = asdict(TrainConfig()) | saved
    may_change = may_change | _check_micro_batches(saved, now, checkpoint)
    changed = [
        f"{shown_name(name)} is {shown(now.get(name))} here, {shown(saved.get(name))} there"
        for name in sorted((saved.keys() | now.keys()) - may_change)
        if now.get(name) != saved.get(name)
    ]
    if changed:
        fix = "set it back, or start anew in another output_dir without resume_from_checkpoint"
        raise UserError(f"{checkpoint} belongs to another training: {summarize(changed)}; {fix}")


def _check_micro_batches(saved: dict, now: dict, checkpoint: Path) -> set[str]:
    """Return the keys that may change while a step has the same micro-batches. Raises UserError if not."""
    keys = ("gradient_accumulation_steps", "the number of processes")
    values = [training.get(key) for training in (saved, now) for key in keys]
    if any(type(value) is not int for value in values):  # a damaged state: the comparison names it
        return set()
    there, here, processes = values[0] * values[1], values[2] * values[3], values[3]
    if there == here or values[1] == processes:
        return set(keys) if there == here else set()
    mend = f"set gradient_accumulation_steps to {there // processes}"
    if there % processes or not there:
        mend = f"start a number of processes that divides {there}"
    raise UserError(
        f"{checkpoint} has {there} micro-batches in a step, of {values[1]} processes, and this run "
        f"{values[2]} x {processes}: {mend}"
    )


def _check_adapter(checkpoint: Path, lora: LoraConfig) -> None:
    """Raise UserError if the saved adapter is not the one that the settings describe."""
    saved, lora = read_adapter_config(checkpoint), starts.in_files(lora)
    for name in _ADAPTER_FIELDS:
        if getattr(saved, name) != getattr(lora, name):
            raise UserError(
                f"{checkpoint / ADAPTER_CONFIG_FILE} says {name} = {getattr(saved, name)}, and the settings "
                f"of this training {getattr(lora, name)}; take another checkpoint"
            )


def check_fits(
    state: dict,
    config: TrainConfig,
    lora: LoraConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale,
) -> None:
    """Raise UserError if a state is not of the active adapter and its optimizer. {}: there is none."""
    if not state:
        return
    problem = f"{config.resume_from_checkpoint}: the checkpoint does not fit"
    adapted = [plain_name(name) for name, layer in lora_layers(model).items() if layer.active]
    if adapted != match_targets(model, lora):
        raise UserError(f"{problem}: its adapter is on other layers than lora_target names")
    if state["loss_scale"]["scaler"].keys() != loss_scale.state_dict()["scaler"].keys():
        raise UserError(f"{problem}: its loss scale is of another dtype")
    try:
        check_optimizer(state["optimizer"], optimizer)
    except UserError as error:
        raise UserError(f"{problem}: {error}") from error


def delete_checkpoint(directory: Path) -> None:
    """Rename a checkpoint, then delete it, so that a half-deleted one never looks complete."""
    renamed = directory.with_name(directory.name + _OLD)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(directory, renamed)
    shutil.rmtree(renamed)


def delete_old_checkpoints(directory: Path, step: int, keep: int, best_step: int | None = None) -> None:
    """Of the checkpoints up to `step`, keep the newest `keep` and the one of `best_step`; delete the others.

    Checkpoints after `step` stay: an older checkpoint was resumed, and they will be overwritten.
    """
    for old in list_checkpoints(directory, up_to=step)[:-keep]:
        if old.name != f"checkpoint-{best_step}":
            delete_checkpoint(old)


def delete_leftovers(directory: Path) -> None:
    """Delete the half-written and half-deleted checkpoints that a killed run left."""
    for suffix in (_PART, _OLD):
        for path in directory.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(path)


def copy_checkpoint(source: Path, directory: Path) -> None:
    """Copy a checkpoint into another run's directory, unless it is already there."""
    target = directory / source.name
    if target.is_dir():
        return
    part = target.with_name(target.name + _PART)
    for path in source.rglob("*"):
        if path.is_file():
            copy = part / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # without permissions: the source may be read-only
    _sync_and_rename(part, target)


# ---- the model's fingerprint -------------------------------------------------------------------------------


def sample_model(directory: Path, samples: int = 64, size: int = 4096) -> Iterator[bytes]:
    """Yield config.json, then the length of every weights file and `samples` evenly spaced blocks of it.

    Their `fingerprint` identifies a model without reading all of its weights.
    """
    yield (directory / "config.json").read_bytes()
    weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    for path in weights:
        length = path.stat().st_size
        yield length.to_bytes(8, "little")
        with path.open("rb") as file:
            for i in range(samples):
                file.seek(i * max(0, length - size) // (samples - 1))  # from the file's start to its end
                yield file.read(size)
