"""An adapter's two files without a model: its configuration, and its tensors by module.

    adapter_config.json           the LoraConfig, if this implementation honours every key in it
    adapter_model.safetensors     or, from older versions of PEFT, adapter_model.bin (see pickled.py)

The reader, the merger and the linter all begin here. The linter keeps shapes alone: its tensors are on the
meta device.
"""

import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.adapters.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BASE_BIAS,
    BASE_WEIGHT,
    BIAS,
    EMBEDDING_A,
    LORA_KEYS,
    PEFT_CHANGES_NOTHING,
    PEFT_DEFAULTS,
    PEFT_HONOURED,
    PEFT_INIT,
    PICKLED_WEIGHTS_FILE,
    ROWS_WEIGHT,
    SAVED_TWICE,
    STARTS_FROM_W,
    WEIGHT,
    A,
    changes_base,
    split_key,
    tensor_key,
)
from minilora.adapters.peft_rules import refused_values
from minilora.adapters.vera_files import LAMBDA_D, VERA, parse_vera_config
from minilora.config import LoraConfig
from minilora.formats.pickled import read_pickled_tensors
from minilora.system.errors import UserError
from minilora.system.files import write_whole
from minilora.system.schema import Field, read_fields, read_object, shown, shown_name
from minilora.targets import EMBEDDING, OUTPUT_HEAD, saved_modules

# Parts that take the place of a module's own weight and bias.
OWN_WEIGHTS = (WEIGHT, BIAS, BASE_WEIGHT, BASE_BIAS, ROWS_WEIGHT)
_NO_REAL_NUMBERS = ("C64", "F4", "F6_E2M3", "F6_E3M2")  # dtypes of safetensors that PyTorch cannot widen


@dataclass(frozen=True)
class AdapterFile:
    """An adapter without a model."""

    directory: Path
    config: LoraConfig
    modules: dict[str, dict[str, Tensor]]  # full name -> part (A, B, WEIGHT, ROWS, ...) -> tensor
    unread: dict[str, str] = field(default_factory=dict)  # keys that are no part of a module, or why
    shared: tuple[Tensor, Tensor] | None = None  # VeRA's A and B; None: drawn from the seed

    @classmethod
    def of(cls, directory: Path, config: LoraConfig, tensors: Iterable[tuple[str, Tensor]]) -> "AdapterFile":
        """Sort tensors by module. tensors: (key in the file, tensor)."""
        modules: dict[str, dict[str, Tensor]] = {}
        unread = {}
        for key, tensor in sorted(tensors, key=lambda item: item[0]):
            module, part = split_key(key) or ("", "")
            if SAVED_TWICE.search(key):
                continue
            if not module:
                unread[key] = ""
            elif part in modules.get(module, {}):
                unread[tensor_key(module, part)] = f"is there twice, as {shown_name(key)} too"
            else:
                modules.setdefault(module, {})[part] = tensor
        return cls(directory, config, modules, unread)

    @property
    def layers(self) -> list[str]:
        """Names of the modules that have an update A, B."""
        return [name for name, parts in self.modules.items() if parts.keys() & {A, EMBEDDING_A, LAMBDA_D}]

    def own(self, name: str) -> dict[str, Tensor]:
        """Return the weight and the bias that take the place of a module's own, as WEIGHT and BIAS."""
        parts = self.modules.get(name, {})
        return {key.rpartition(".")[2]: parts[key] for key in OWN_WEIGHTS if key in parts}

    def on_tied_base(self) -> "AdapterFile":
        """The same for a base model whose head is its embedding. PEFT gives a weight of one of them to both,
        unless it is a copy of modules_to_save.
        """
        for module, other in ((EMBEDDING, OUTPUT_HEAD), (OUTPUT_HEAD, EMBEDDING)):
            own = self.modules.get(module, {}).get(WEIGHT)
            is_copy = saved_modules([module, other], self.config.modules_to_save)
            if own is not None and not is_copy and other not in self.modules:
                return replace(self, modules={**self.modules, other: {WEIGHT: own}})
        return self


# ---- the configuration ----


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Read `adapter_config.json`. Raises UserError naming the file and the key that cannot be honoured."""
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.exists():
        is_model = "; it is a model, so name it with --model" * path.with_name("config.json").is_file()
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}{is_model}")
    raw = read_object(path)
    try:
        return parse_adapter_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_adapter_config(raw: dict) -> LoraConfig:
    """The adapter that the contents of an `adapter_config.json` describe. Raises UserError."""
    if raw.get("peft_type") == VERA:
        return parse_vera_config(raw)
    fields = read_fields(raw, PEFT_HONOURED)
    read_fields(raw, PEFT_CHANGES_NOTHING)
    for key, value in raw.items():
        _check_honoured(key, value)
    for key, kind in (("rank_pattern", PEFT_HONOURED["r"]), ("alpha_pattern", PEFT_HONOURED["lora_alpha"])):
        read_fields(fields[key], dict.fromkeys(fields[key], kind), f"{key}.")
    if isinstance(rows := fields["trainable_token_indices"], dict):
        read_fields(rows, dict.fromkeys(rows, Field(list, "rows", items=int)), "trainable_token_indices.")
    given = {key: fields[key] for key in LORA_KEYS if fields[key] is not None}
    if not given["target_modules"]:
        raise UserError("target_modules is empty")
    if wrong := refused_values(raw):
        raise UserError(wrong[0])
    if str(init := raw.get(PEFT_INIT)).lower() in STARTS_FROM_W:
        given[PEFT_INIT] = init.lower()
    return LoraConfig(**given)


def _check_honoured(key: str, value: object) -> None:
    """Raise UserError for a key outside the tables whose value this implementation does not honour."""
    if key in PEFT_HONOURED or key in PEFT_CHANGES_NOTHING:
        return
    if key == PEFT_INIT:
        repeatable = isinstance(value, str) and value.lower() in STARTS_FROM_W
        if not isinstance(value, bool) and changes_base(str(value)) and not repeatable:
            raise UserError(
                f"{key} = {shown(value)} changed the base weights; convert it to plain LoRA first"
            )
    elif key in PEFT_DEFAULTS:
        if value not in (None, False, []) and value != PEFT_DEFAULTS[key]:
            raise UserError(f"{key} = {shown(value)} is not supported")
    elif value:
        raise UserError(f"{shown_name(key)} = {shown(value)} is not supported")


# ---- the tensors ----


def check_has_weights(directory: str | Path) -> Path:
    """Return the file of an adapter's weights, without reading it. Raises UserError if there is none.

    As in PEFT, a pickled file is read only where no safetensors file lies beside it.
    """
    path = Path(directory) / ADAPTER_WEIGHTS_FILE
    pickled = path.with_name(PICKLED_WEIGHTS_FILE)
    if not path.is_file() and not pickled.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    return path if path.is_file() else pickled


def stored_tensors(
    directory: str | Path, wanted: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) for every tensor in an adapter's file, or the wanted ones, one at a time.

    Raises UserError for a file that is missing, damaged, or holds dtypes that are no real numbers.
    """
    path = check_has_weights(directory)
    if path.name == PICKLED_WEIGHTS_FILE:
        tensors = read_pickled_tensors(path).items()
        yield from ((key, tensor) for key, tensor in tensors if wanted is None or key in wanted)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for key in (key for key in file.keys() if wanted is None or key in wanted):
                if (dtype := file.get_slice(key).get_dtype()) in _NO_REAL_NUMBERS:
                    raise UserError(f"{shown_name(key)} in {path} is of the dtype {dtype}")
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error


def is_base_weight(base: Tensor, own: Tensor) -> bool:
    """Whether a weight in an adapter's file is the base's own, which PEFT writes beside A and B.

    Either of the two may be rounded to the other's dtype.
    """
    if base.shape != own.shape:
        return False
    own = own.to(base.device)
    return torch.equal(base.to(own.dtype), own) or torch.equal(base, own.to(base.dtype))


def write_adapter(directory: str | Path, raw: dict, tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files. raw: its configuration; tensors by their keys in the file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")
