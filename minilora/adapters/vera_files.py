"""VeRA in PEFT 0.21's files, as `save_load.py` reads and writes them (see minilora/vera.py).

`adapter_config.json` has `peft_type: VERA`. `adapter_model.safetensors` holds two vectors a layer:

    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d            float32 (r,)
    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b            float32 (out,)
    base_model.vera_A    base_model.vera_B                                    (r, widest in), (widest out, r)

A file with `save_projection: false` lacks the last two; `projection_prng_key` is the seed that draws them
again. Here they are always written: then the file does not depend on a generator. No server loads VeRA.
`plain.plain_factors` makes LoRA of it, the same function in a larger file.
"""

import re

from torch import Tensor

from minilora.adapters.peft_format import PEFT_CHANGES_NOTHING, PEFT_HONOURED
from minilora.config import LoraConfig
from minilora.system.errors import UserError
from minilora.system.schema import Field, read_fields, shown, shown_name

VERA = "VERA"  # the value of `peft_type`
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"
LAMBDA_D, LAMBDA_B = "vera_lambda_d", "vera_lambda_b"

_KEY = re.compile(rf"base_model\.model\.(.+)\.({LAMBDA_D}|{LAMBDA_B})")
_BOOKKEEPING = ("auto_mapping", "inference_mode", "peft_version", "task_type")
_CHANGES_NOTHING = {key: PEFT_CHANGES_NOTHING[key] for key in _BOOKKEEPING} | {
    "d_initial": Field(float, "where lambda_d started", 0.1),
    "fan_in_fan_out": Field(bool, "of GPT-2's layers; PEFT turns it off for others", False, nullable=True),
    "init_weights": Field(bool, "whether lambda_b started at 0", True, nullable=True),
}
_NAMES = ("target_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision")
_HONOURED = {key: PEFT_HONOURED[key] for key in _NAMES} | {
    "peft_type": Field(str, "the kind of adapter", VERA, required=True, choices=(VERA,)),
    "r": Field(int, "rank of the shared matrices", 256, required=True, low=1, high=65_536),
    "projection_prng_key": Field(int, "seed of the shared matrices", 0, low=-(2**63), high=2**64 - 1),
    "save_projection": Field(bool, "whether the file holds the shared matrices", True),
    "vera_dropout": Field(float, "dropout on the adapter's input in training", 0.0, low=0, below=1),
}
_MUST_BE_OFF = {"bias": "none", "modules_to_save": None}


def parse_vera_config(raw: dict) -> LoraConfig:
    """The adapter that the contents of an `adapter_config.json` describe. Raises UserError."""
    fields = read_fields(raw, _HONOURED)
    read_fields(raw, _CHANGES_NOTHING)
    for key, value in raw.items():
        known = key in _HONOURED or key in _CHANGES_NOTHING
        if not known and value and value != _MUST_BE_OFF.get(key):
            raise UserError(f"{shown_name(key)} = {shown(value)} is not supported in a VeRA adapter")
    same = ("r", "target_modules", "layers_to_transform", "layers_pattern", "projection_prng_key")
    given = {key: fields[key] for key in same if fields[key] is not None}
    return LoraConfig(use_vera=True, lora_dropout=fields["vera_dropout"], **given)


def vera_config_json(config: LoraConfig, target_modules: list[str]) -> dict:
    """PEFT's `adapter_config.json` of an adapter, without the base model's name."""
    tables = _HONOURED | _CHANGES_NOTHING
    raw = {name: field.default for name, field in tables.items()} | _MUST_BE_OFF
    raw |= dict(r=config.r, target_modules=target_modules, vera_dropout=config.lora_dropout)
    raw |= dict(projection_prng_key=config.projection_prng_key)
    return dict(sorted(raw.items()))


def sort_vera(
    tensors: dict[str, Tensor], raw: dict, config: LoraConfig
) -> tuple[dict[str, dict[str, Tensor]], tuple[Tensor, Tensor] | None, list[str]]:
    """Return the vectors by module and part, the shared A and B, and a sentence for each tensor that does not
    fit. None: the seed draws A and B. Like PEFT, it passes over those that `save_projection` denies.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in sorted(tensors.items()):
        if key in (SHARED_A, SHARED_B):
            continue
        if (match := _KEY.fullmatch(key)) is None:
            problems.append(f"{shown_name(key)} is no part of a VeRA adapter")
        elif tensor.dim() != 1 or (match[2] == LAMBDA_D and len(tensor) != config.r) or not len(tensor):
            length = f"{config.r} numbers" if match[2] == LAMBDA_D else "numbers, one an output"
            problems.append(f"{shown_name(key)} is {tuple(tensor.shape)}, not a vector of {length}")
        else:
            modules.setdefault(match[1], {})[match[2]] = tensor.float()
    for module, parts in modules.items():
        missing = [part for part in (LAMBDA_D, LAMBDA_B) if part not in parts]
        problems += [f"missing {shown_name(module)}.{part}" for part in missing]
    if not modules:
        problems.append(f"no tensor is a {LAMBDA_D}")
    if raw.get("save_projection") is False:
        return modules, None, problems
    problems += _wrong_projections(tensors, config.r)
    shared = tuple(tensors[key].float() for key in (SHARED_A, SHARED_B) if key in tensors)
    return modules, shared, problems


def _wrong_projections(tensors: dict[str, Tensor], r: int) -> list[str]:
    problems = []
    for dimension, key in enumerate((SHARED_A, SHARED_B)):
        if (tensor := tensors.get(key)) is None:
            problems.append(f"missing {key}, which save_projection announces")
        elif tensor.dim() != 2 or tensor.shape[dimension] != r:
            problems.append(f"{key} is {tuple(tensor.shape)}, not of rank r = {r}")
    return problems


def check_projections(A: Tensor, B: Tensor, widest_in: int, widest_out: int) -> None:
    """Raise UserError for shared matrices that are too small for a layer."""
    if A.shape[1] < widest_in or B.shape[0] < widest_out:
        raise UserError(
            f"the shared matrices are {tuple(A.shape)} and {tuple(B.shape)}, "
            f"too small for {widest_in} inputs and {widest_out} outputs; take the base model of training"
        )
