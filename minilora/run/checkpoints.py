"""Stopping a training and going on as if nothing had happened.

    checkpoint-40/
      adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
      training_state/                                   the rest; a folder below, for servers read every *.safetensors of an adapter
        state.json             numbers and texts, and where in them the tensors belong
        tensors.safetensors    the tensors
        digests.json           SHA-256 of every other file

What step n + 1 computes depends on the adapter, the optimizer's state, the loss scale, the random generators
(dropout) and n itself, of which the data order and the learning rate are pure functions. All that is saved
and restored bit for bit. It also depends on what the user gives: settings, model, data. That is compared, and
a resume under anything else is refused by its name.

A checkpoint is whole or not there. Its files are written into `checkpoint-40.part` and forced to the disk
before the folder gets its name, which is one atomic step; older checkpoints are deleted after that, and lose
their name before their files. So a kill or a full disk at any moment leaves every folder called checkpoint-N
whole. What happens to files later, the digests tell.

`torch.save` would be three lines. It writes a pickle, and reading a pickle runs whatever program lies in it.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from minilora.formats.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.formats.weights import save_tensors
from minilora.system.errors import UserError, summarize
from minilora.system.files import read_json, write_whole

STATE_FILE = "training_state/state.json"
TENSORS_FILE = "training_state/tensors.safetensors"
DIGESTS_FILE = "training_state/digests.json"
_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, STATE_FILE, TENSORS_FILE)
_PASSING = (".part", ".old")  # name endings of checkpoints that are being written, and of those being deleted


# ---- writing and reading ---------------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, write_adapter: Callable[[Path], None], state: dict) -> None:
    """Write `checkpoint-N`, whole or not at all. `write_adapter(folder)` writes the adapter; `state`: see
    `flatten`.

    Raises UserError where the disk is full or cannot be written; nothing that was there before is lost then.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_adapter(part)
        (part / STATE_FILE).parent.mkdir()
        tree, tensors = flatten(state)
        save_tensors(tensors, part / TENSORS_FILE)
        write_whole(part / STATE_FILE, json.dumps(tree))
        write_whole(
            part / DIGESTS_FILE, json.dumps({name: _digest(part / name) for name in _FILES}, indent=2) + "\n"
        )
        _give_name(part, directory)
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{directory} could not be saved: {reason}; the checkpoints before it are whole"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_checkpoint(directory: Path) -> dict:
    """The state that `write_checkpoint` was given, on the CPU. Raises UserError naming a file that is missing
    or corrupt.
    """
    if not (directory / STATE_FILE).parent.is_dir():
        raise UserError(f"{directory} holds no training_state to go on from")
    digests = _read_whole_json(directory / DIGESTS_FILE)
    if not isinstance(digests, dict) or not digests.keys() >= set(_FILES):
        raise UserError(f"{directory / DIGESTS_FILE} is corrupt: it does not list the files of a checkpoint")
    for name in _FILES:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing")
        if _digest(directory / name) != digests[name]:
            raise UserError(
                f"{directory / name} is truncated or corrupt: its SHA-256 is not the one in digests.json"
            )
    return unflatten(_read_whole_json(directory / STATE_FILE), load_file(directory / TENSORS_FILE))


def _read_whole_json(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return read_json(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _give_name(part: Path, directory: Path) -> None:
    """Force a folder with all that is in it to the disk, then rename it."""
    for path in (*part.rglob("*"), part):
        _force_to_disk(path)
    if directory.exists():
        delete_checkpoint(directory)
    os.replace(part, directory)
    _force_to_disk(directory.parent)


def _force_to_disk(path: Path) -> None:
    """fsync a file, or a directory: the names in it. Windows cannot do that to what was opened for reading."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(tree: object) -> tuple[object, dict[str, Tensor]]:
    """A tree of dicts, lists, tensors and plain values as JSON, and its tensors (copied to the CPU) by their
    places.

    {"state": {0: {"exp_avg": t}}}  ->  {"state": {"#0": {"exp_avg": {"$tensor": "state.#0.exp_avg"}}}},
    {"state.#0.exp_avg": t}

    Optimizers number their parameters, and JSON knows no numbers as keys: hence "#0". Tuples come back as
    lists.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: object, place: str) -> object:
        if isinstance(node, Tensor):
            tensors[place] = node.detach().to("cpu", copy=True).contiguous()
            return {"$tensor": place}
        if isinstance(node, dict):
            named = {f"#{key}" if isinstance(key, int) else key: value for key, value in node.items()}
            return {key: walk(value, f"{place}.{key}" if place else key) for key, value in named.items()}
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{place}.{i}") for i, value in enumerate(node)]
        assert node is None or isinstance(node, (bool, int, float, str)), (
            f"{place} is {type(node)}, which JSON does not know"
        )
        return node

    return walk(tree, ""), tensors


def unflatten(tree: object, tensors: dict[str, Tensor]) -> object:
    """The tree that `flatten` took apart."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    return {
        int(key[1:]) if key.startswith("#") else key: unflatten(value, tensors) for key, value in tree.items()
    }


# ---- the checkpoints of a run -------------------------------------------------------------------------------------------------


def list_checkpoints(directory: Path, up_to: float = math.inf) -> list[Path]:
    """The `checkpoint-N` folders of a run with N <= up_to, oldest first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal() and int(step) <= up_to}
    return sorted(found, key=found.__getitem__)


def find_checkpoint(place: Path) -> tuple[Path | None, dict, list[str]]:
    """A checkpoint, or the newest whole one of a run: its folder, its state, and what is wrong with newer
    ones, a line each.

    (None, {}, []) if there is none. Raises UserError if there are some and none of them is whole.
    """
    if (place / STATE_FILE).parent.is_dir():
        return place, read_checkpoint(place), []
    faults: list[str] = []
    for candidate in reversed(list_checkpoints(place)):
        try:
            return candidate, read_checkpoint(candidate), faults
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError(f"{place} has no whole checkpoint: {summarize(faults)}")
    return None, {}, []


def delete_checkpoint(directory: Path) -> None:
    """Take its name first, so that no half of it looks whole."""
    passing = directory.with_name(directory.name + ".old")
    shutil.rmtree(passing, ignore_errors=True)
    os.replace(directory, passing)
    shutil.rmtree(passing)


def delete_old_checkpoints(directory: Path, step: int, keep: int, spare: int | None = None) -> None:
    """Of those up to `step` delete all but the newest `keep` and that of step `spare`. Later ones, of an
    earlier life, stay.
    """
    for old in list_checkpoints(directory, up_to=step)[:-keep]:
        if old.name != f"checkpoint-{spare}":
            delete_checkpoint(old)


def delete_leftovers(directory: Path) -> None:
    """Remove what a kill left half written or half deleted."""
    for ending in _PASSING:
        for path in directory.glob(f"checkpoint-*{ending}"):
            shutil.rmtree(path)


def copy_checkpoint(source: Path, directory: Path) -> None:
    """Copy a checkpoint into a run's folder, unless it is there: of a run that goes on elsewhere."""
    target = directory / source.name
    if not target.is_dir():
        part = target.with_name(target.name + ".part")
        for path in source.rglob("*"):
            if path.is_file():
                (part / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(
                    path, part / path.relative_to(source)
                )  # contents alone: the source may be read-only
        _give_name(part, target)


# ---- what else belongs to the state of a training -----------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators of this process: PyTorch's on the CPU and on its GPU, numpy's, Python's. Always of the
    same shapes.
    """
    _, keys, *counters, normal = np.random.get_state()
    _, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), *counters, _bits(normal)]),
        "python": torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)]),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    *keys, position, has_normal, normal = state["numpy"].tolist()
    np.random.set_state(("MT19937", keys, position, has_normal, _number(normal)))
    *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(words), _number(gauss) if has_gauss else None))


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def sample_model(directory: Path, samples: int = 64, size: int = 4096) -> Iterator[bytes]:
    """What tells one model from another, for `fingerprint`: config.json, and of every weights file its length
    and some places.
    """
    yield (directory / "config.json").read_bytes()
    for path in sorted(directory.glob("*.safetensors")):
        length = path.stat().st_size
        yield length.to_bytes(8, "little")
        with path.open("rb") as file:
            for i in range(samples):
                file.seek(
                    i * max(0, length - size) // (samples - 1)
                )  # the first place is the start, the last one ends the file
                yield file.read(size)


def check_same_training(saved: dict, now: dict, may_change: set[str], checkpoint: Path) -> None:
    """Raise UserError naming all settings with both values that differ and may not."""
    now = json.loads(json.dumps(now))
    names = sorted((saved.keys() | now.keys()) - may_change)
    changed = [
        f"{name} is {now.get(name)!r} here, {saved.get(name)!r} there"
        for name in names
        if now.get(name) != saved.get(name)
    ]
    if changed:
        mend = "set it back, or start anew in another output_dir without resume_from_checkpoint"
        raise UserError(f"{checkpoint} is of another training: {summarize(changed)}; {mend}")


class StopSignal:
    """Ctrl-C, or SIGTERM as schedulers send it, asks for a stop after the present step, so that what is saved
    is whole.

    A second Ctrl-C stops at once. A second SIGTERM does not: one often comes twice, to a process and to its
    group.
    """

    def __init__(self, say: Callable[[str], None]):
        self.asked, self.say = False, say
        self._before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.say("stopping after this step; Ctrl-C again to stop at once without saving")

    def release(self) -> None:
        """Give both signals back the meaning they had."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
