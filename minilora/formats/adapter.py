"""Adapters on disk, as PEFT 0.21 reads and writes them (see `peft_format.py` for the names in the files).

`adapter_config.json` holds PEFT's full set of keys, with plain leaf names as targets. PEFT, vLLM and SGLang
all read this form. Reading refuses, by name, every key that asks for something that is not implemented here:
trained biases, other ranks for some layers, an initialisation that rewrote the base weights. LoRA-FA has no
key, since a frozen A matters in training only.
"""

import json
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.config import LoraConfig
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MAGNITUDE,
    PEFT_CHANGES_NOTHING,
    PEFT_DEFAULTS,
    PEFT_HONOURED,
    PEFT_INIT,
    PICKLED_WEIGHTS_FILE,
    A,
    B,
    changes_base,
    split_key,
    tensor_key,
)
from minilora.lora import add_lora, lora_layers, match_targets, remove_lora
from minilora.system.errors import UserError, summarize
from minilora.system.files import write_whole
from minilora.system.patterns import match_names
from minilora.system.schema import read_fields, read_object, shown, shown_name

_PARTS = {"lora_A": A, "lora_B": B, "lora_magnitude_vector": MAGNITUDE}  # LoraLinear's name -> the file's

_LORA_CONFIG = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")


def save_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", base_model_name_or_path: str | None = None
) -> None:
    """Write one adapter in PEFT's two files, each of them complete or not at all.

    Raises UserError if the model has no such adapter.
    """
    layers = lora_layers(model, name)
    if not layers:
        raise UserError(f"the model has no adapter called {name!r} to save")
    config = next(iter(layers.values())).configs[name]
    raw = PEFT_DEFAULTS | {
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _plain_targets(model, list(layers)),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    tensors = {key: p.detach().cpu().contiguous() for key, p in _parameters(model, name).items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their keys in the file."""
    return {
        tensor_key(path, _PARTS[attribute]): parameter
        for path, layer in lora_layers(model, name).items()
        for attribute, parameter in layer.parts(name).items()
    }


def _plain_targets(model: nn.Module, wrapped: list[str]) -> list[str]:
    """Leaf names if they name exactly the wrapped layers, else full names. Servers read no regex."""
    leaves = sorted({path.rpartition(".")[2] for path in wrapped})
    return leaves if match_targets(model, leaves) == wrapped else wrapped


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Read `adapter_config.json`. Raises UserError naming the file and the key that cannot be honoured."""
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.exists():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    raw = read_object(path)
    try:
        fields = read_fields(raw, PEFT_HONOURED)
        read_fields(raw, PEFT_CHANGES_NOTHING)
        for key, value in raw.items():
            _check_honoured(key, value)
        return LoraConfig(**{key: fields[key] for key in _LORA_CONFIG})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_honoured(key: str, value: object) -> None:
    """Raise UserError for a key outside the tables whose value this implementation does not honour."""
    if key in PEFT_HONOURED or key in PEFT_CHANGES_NOTHING:
        return
    if key == PEFT_INIT:
        if not isinstance(value, bool) and changes_base(str(value)):
            raise UserError(
                f"{key} = {shown(value)} changed the base weights; convert it to plain LoRA first"
            )
    elif key in PEFT_DEFAULTS:
        if value not in (None, False, []) and value != PEFT_DEFAULTS[key]:
            raise UserError(f"{key} = {shown(value)} is not supported")
    elif value:
        raise UserError(f"{shown_name(key)} = {shown(value)} is not supported")


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, tuple[Tensor, ...]]]:
    """An adapter without a model: its configuration, and for each layer, by full name, its float32 tensors.

    The tensors are A (r, in) and B (out, r), and for DoRA m (out,). Raises UserError as `read_adapter_config`
    does. One UserError lists all tensors that are none of these, lack their partners, or contradict r.
    """
    config = read_adapter_config(directory)
    parts = [A, B, MAGNITUDE] if config.use_dora else [A, B]
    layers: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in sorted(_read_tensors(Path(directory) / ADAPTER_WEIGHTS_FILE).items()):
        layer, part = split_key(key) or ("", "")
        if part not in parts:
            problems.append(f"{key} is no {' or '.join(parts)}")
            continue
        layers.setdefault(layer, {})[part] = tensor.float()
        if part == MAGNITUDE:
            if tensor.dim() != 1:
                problems.append(f"{key} is {tuple(tensor.shape)}, not a vector")
        elif tensor.dim() != 2 or tensor.shape[parts.index(part)] != config.r:  # A's rows, B's columns
            problems.append(f"{key} is {tuple(tensor.shape)}, not of rank r = {config.r}")
    for layer, tensors in layers.items():
        problems += [f"missing {tensor_key(layer, part)}" for part in parts if part not in tensors]
    if problems:
        raise UserError(f"{directory} is not a sound adapter: {summarize(problems)}")
    return config, {layer: tuple(tensors[part] for part in parts) for layer, tensors in layers.items()}


def load_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", lora_fa: bool = False
) -> None:
    """Put an adapter that PEFT or `save_adapter` wrote on the model under `name`, and make it active.

    lora_fa: whether further training keeps A fixed; no file says so. Raises UserError for a configuration
    that cannot be honoured. One UserError lists all missing, unexpected and wrongly shaped tensors. After an
    error the model is as it was.
    """
    config = replace(read_adapter_config(directory), lora_fa=lora_fa)
    tensors = _read_tensors(Path(directory) / ADAPTER_WEIGHTS_FILE)
    _check_pattern(model, config, Path(directory) / ADAPTER_CONFIG_FILE)
    add_lora(model, config, name)
    parameters = _parameters(model, name)
    problems = [f"missing {key}" for key in sorted(parameters.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - parameters.keys())]
    for key in sorted(parameters.keys() & tensors.keys()):
        stored, needed = tuple(tensors[key].shape), tuple(parameters[key].shape)
        if stored != needed:
            problems.append(f"{key} is {stored}, the model needs {needed}")
    if problems:
        remove_lora(model, name)
        raise UserError(f"{directory} does not fit the model: {summarize(problems)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _check_pattern(model: nn.Module, config: LoraConfig, path: Path) -> None:
    """Raise UserError if the file's pattern for the names of layers takes too long to match."""
    if isinstance(config.target_modules, str):
        try:
            match_names([config.target_modules], [name for name, _ in model.named_modules()])
        except UserError as error:
            raise UserError(f"{path}: target_modules {error}") from error


def check_has_weights(directory: str | Path) -> None:
    """Raise UserError if an adapter's directory lacks its weights, without reading them."""
    path = Path(directory) / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        pickled = path.with_name(PICKLED_WEIGHTS_FILE).exists()
        hint = f" ({PICKLED_WEIGHTS_FILE} is pickled and never read; save it again as safetensors)" * pickled
        raise UserError(f"{path.parent} has no {path.name}{hint}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, by key. Raises UserError if it is missing, or holds infinities or NaN."""
    check_has_weights(path.parent)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error
    problems = [
        f"{key} is {t.dtype}, not floating point" for key, t in tensors.items() if not t.is_floating_point()
    ]
    problems = problems or [
        f"{key} is infinite or NaN in places" for key, t in tensors.items() if not t.float().isfinite().all()
    ]
    if problems:
        raise UserError(f"{path} is damaged, or its training diverged: {summarize(problems, 3)}")
    return tensors
