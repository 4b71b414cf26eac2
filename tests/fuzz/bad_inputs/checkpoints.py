"""Checkpoints that were damaged, made up, or belong to another training."""

import json
from collections.abc import Callable, Iterator
from math import nan

import numpy as np

from fuzz.bad_inputs.commands import TRAIN
from fuzz.case import Case, make_case
from fuzz.edits import (
    DROP,
    Edit,
    both,
    cut,
    edit_bytes,
    edit_header,
    edit_json,
    edit_tensors,
    fifo,
    folder,
    link,
    remove,
    seal,
    set_keys,
    write,
)  # fmt: skip

KIND = "checkpoint"
CHECKPOINT = "run/checkpoint-1"
RESUME = f"train --config run.yaml --output_dir out --resume_from_checkpoint {CHECKPOINT}"
STATE = f"{CHECKPOINT}/training_state/state.json"
TENSORS = f"{CHECKPOINT}/training_state/tensors.safetensors"
DIGESTS = f"{CHECKPOINT}/training_state/digests.json"
CONFIG, WEIGHTS = f"{CHECKPOINT}/adapter_config.json", f"{CHECKPOINT}/adapter_model.safetensors"

DAMAGED = {  # without right digests
    "state.json is cut": cut(STATE, 0.5),
    "state.json is absent": remove(STATE),
    "state.json is a directory": folder(STATE),
    "state.json is a pipe": fifo(STATE),
    "state.json is /dev/zero": link(STATE, "/dev/zero"),
    "the tensors are cut": cut(TENSORS, 0.9),
    "a bit of the tensors is flipped": edit_bytes(TENSORS, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "the tensors are absent": remove(TENSORS),
    "digests.json is absent": remove(DIGESTS),
    "digests.json is a list": write(DIGESTS, "[]"),
    "digests.json is empty": write(DIGESTS, ""),
    "digests.json is a pipe": fifo(DIGESTS),
    "digests.json lacks a file": edit_json(DIGESTS, lambda raw: dict(list(raw.items())[:2])),
    "digests.json holds numbers": edit_json(DIGESTS, lambda raw: dict.fromkeys(raw, 5)),
    "the adapter's weights are cut": cut(WEIGHTS, 0.5),
    "the adapter's configuration is absent": remove(CONFIG),
}
VALUES = {  # key of state.json: values that it cannot have
    "step": (-1, 10**18, 1.5, "1", True, nan, None, [], DROP, 5, 0),
    "best": (5, None, [], {}, {"loss": "x", "step": 0, "waited": 0}, {"loss": 1.0, "step": "x", "waited": 0}, DROP,
             {"loss": nan, "step": -1, "waited": 0}, {"loss": 1.0, "step": 0, "waited": "x"}),
    "seconds": ("x", nan, -1, None, [], DROP),
    "optimizer": (5, None, [], {}, {"state": 5, "param_groups": []}, {"state": {}, "param_groups": 5}, DROP),
    "loss_scale": (5, None, [], {"scale": "x"}),
    "tracker": (5, None, [], {"records": 5}, {"records": [5]}, {"records": [{"step": "x"}]}, {"window": 5},
                {"window": [[1]]}, {"seconds": "x"}, DROP),
    "training": (5, None, [], {}, DROP),
}  # fmt: skip
WHOLE = {  # content of state.json, with right digests
    "is a list": "[]",
    "is null": "null",
    "is a number": "5",
    "is empty": "",
    "is an empty object": "{}",
    "is nested 100,000 deep": "[" * 100_000,
    "names a tensor that is absent": '{"step": {"$tensor": "nothing"}}',
    "names a tensor by a number": '{"step": {"$tensor": 5}}',
    "has a key that is no number": '{"#x": 1}',
}


def _first(change: Callable[[dict, str], object], word: str) -> Edit:
    """An edit of the tensors: `change` gets their dictionary and the first name that contains `word`."""
    return edit_tensors(
        TENSORS, lambda tensors: change(tensors, next(n for n in sorted(tensors) if word in n))
    )


TENSOR_EDITS = {  # with right digests
    "a tensor is missing": _first(lambda tensors, name: tensors.pop(name), "optimizer"),
    "a moment has another shape": _first(lambda t, name: t.update({name: np.zeros(3, np.float32)}), "exp_avg"),
    "a moment is of whole numbers": _first(lambda t, name: t.update({name: t[name].astype(np.int32)}), "exp_avg"),
    "a moment is NaN": _first(lambda t, name: t[name].fill(np.nan), "exp_avg"),
    "the header lies": edit_header(TENSORS, lambda header: b"{nonsense"),
}  # fmt: skip
ADAPTERS = {  # with right digests
    "its adapter has another rank": (set_keys(CONFIG, r=3), "r = 3"),
    "its adapter has other targets": (set_keys(CONFIG, target_modules=["o_proj"]), "o_proj|target"),
    "its adapter is no LoRA": (set_keys(CONFIG, peft_type="LOHA"), "peft_type"),
    "its adapter's alpha is NaN": (set_keys(CONFIG, lora_alpha=nan), "lora_alpha"),
    "its adapter's weights are NaN": (
        edit_tensors(WEIGHTS, lambda tensors: [tensor.fill(np.nan) for tensor in tensors.values()]), "NaN"),
    "its adapter's weights are of another model": (
        edit_tensors(WEIGHTS, lambda t: t.update({name: t[name][:, :1].copy() for name in t})), "adapter|lora_"),
}  # fmt: skip
OTHERS = {  # command: a word
    f"{RESUME} --learning_rate 1": "learning_rate",
    f"{RESUME} --seed 1": "seed",
    f"{RESUME} --lora_rank 4": "lora_rank",
    f"{RESUME} --dataset table.csv": "training examples|dataset",
    f"{RESUME} --model words": "examples",
    f"{RESUME} --max_steps 1 --lr_scheduler_type constant": "lr_scheduler_type|max_steps",
    f"{RESUME} --quantization_bit 4": "quantization_bit",
    f"{TRAIN} --resume_from_checkpoint train.jsonl": "train.jsonl",
    f"{TRAIN} --resume_from_checkpoint adapter": "adapter",
    f"{TRAIN} --resume_from_checkpoint model": "model",
    f"{TRAIN} --resume_from_checkpoint run/checkpoint-7": "checkpoint-7",
    f"{TRAIN} --resume_from_checkpoint /dev/zero": "/dev/zero",
}


def cases() -> Iterator[Case]:
    for name, change in DAMAGED.items():
        yield _case(name, change)
    for key, values in VALUES.items():
        for value in values:
            text = "absent" if value is DROP else json.dumps(value)
            yield _case(f"{key} = {text[:60]}", both(set_keys(STATE, **{key: value}), seal(CHECKPOINT)))
    for name, text in WHOLE.items():
        yield _case(f"state.json {name}", both(write(STATE, text), seal(CHECKPOINT)))
    for name, change in TENSOR_EDITS.items():
        yield _case(name, both(change, seal(CHECKPOINT)))
    for name, (change, word) in ADAPTERS.items():
        yield make_case(KIND, name, RESUME, word, change=both(change, seal(CHECKPOINT)))
    for command, word in OTHERS.items():
        yield make_case(KIND, f"{' '.join(command.split()[-4:])}", command, word)


def _case(name: str, change: Edit) -> Case:
    return make_case(KIND, name, RESUME, "checkpoint-1", change=change)
