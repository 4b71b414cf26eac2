"""Adapters on disk, in the format of PEFT 0.21: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            float32 (r, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight            float32 (out, r)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector    float32 (out,), of DoRA

The adapter's own name is not in the file, so it can be loaded under any. The configuration holds PEFT's full
set of keys with plain leaf names as targets, which is what PEFT, vLLM and SGLang all read. When reading, a
key that asks for something that this implementation does not do (trained biases, other ranks for some layers,
an initialisation that rewrote the base weights) is refused by name. That A was frozen (LoRA-FA) is a matter
of training, and no key of PEFT's.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.config import LoraConfig
from minilora.lora import add_lora, lora_layers, match_targets, remove_lora
from minilora.system.errors import UserError, summarize
from minilora.system.files import read_json, write_whole

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, _NAMES.values()))})")

# Every key that PEFT 0.21 writes for a plain LoRA, with the value that means "nothing special".
PEFT_DEFAULTS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

_HONOURED = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"}
_CHANGES_NOTHING = set(
    """
    auto_mapping base_model_name_or_path revision peft_version task_type inference_mode megatron_core
    ensure_weight_tying layers_pattern eva_config qalora_group_size runtime_config
    """.split()
)
# How A and B began says nothing about the result, unless the base weights were changed along with them
# (PiSSA, OLoRA, LoftQ, ...).
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Write one adapter as PEFT does. Each file appears whole or not at all. Raises UserError if the model
    has no such adapter.
    """
    layers = lora_layers(model, name)
    if not layers:
        raise UserError(f"the model has no adapter called {name!r} to save")
    config = next(iter(layers.values())).configs[name]
    tensors = {
        key: parameter.detach().cpu().contiguous() for key, parameter in _parameters(model, name).items()
    }
    written = PEFT_DEFAULTS | {
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _plain_targets(model, list(layers)),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(written, indent=2) + "\n")


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's tensors by their keys in the file."""
    layers = lora_layers(model, name).items()
    return {
        f"{_PREFIX}{path}.{_NAMES[kind]}": p
        for path, layer in layers
        for kind, p in layer.parts(name).items()
    }


def _plain_targets(model: nn.Module, wrapped: list[str]) -> list[str]:
    """Leaf names if they name exactly the wrapped layers, else full names: a regular expression is read by no
    server.
    """
    leaves = sorted({path.rpartition(".")[2] for path in wrapped})
    return leaves if match_targets(model, leaves) == wrapped else wrapped


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Read a PEFT `adapter_config.json`. Raises UserError naming the file and the key that cannot be
    honoured.
    """
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; it must be 'LORA'")
    for key in ("r", "lora_alpha", "target_modules"):
        if raw.get(key) is None:
            raise UserError(f"{path}: the key {key} is missing")
    for key in ("base_model_name_or_path", "revision"):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            raise UserError(f"{path}: {key} must be text, not {raw[key]!r}")
    for key, value in raw.items():
        if key in _HONOURED | _CHANGES_NOTHING:
            continue
        if key == "init_lora_weights":
            if value not in _HARMLESS_INITS:
                raise UserError(
                    f"{path}: init_lora_weights = {value!r} changed the base weights; convert it to plain LoRA first"
                )
        elif value and value != PEFT_DEFAULTS.get(key):
            raise UserError(f"{path}: {key} = {value!r} is not supported")
    try:
        return LoraConfig(**{key: raw[key] for key in _HONOURED & raw.keys()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, tuple[Tensor, ...]]]:
    """An adapter without a model: its configuration, and full layer name -> A (r, in), B (out, r), of DoRA
    also m (out,); float32.

    Raises UserError as `read_adapter_config` does, and lists all tensors that are none of these, lack their
    partners, or contradict r.
    """
    config, problems = read_adapter_config(directory), []
    wanted = [name for kind, name in _NAMES.items() if config.use_dora or kind != "lora_magnitude_vector"]
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(_read_tensors(Path(directory) / ADAPTER_WEIGHTS_FILE).items()):
        match = _KEY.fullmatch(key)
        if not match or match[2] not in wanted:
            problems.append(f"{key} is no {' or '.join(wanted)}")
            continue
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
        if match[2] == "lora_magnitude_vector":
            if tensor.dim() != 1:
                problems.append(f"{key} is {tuple(tensor.shape)}, not a vector")
        elif tensor.dim() != 2 or tensor.shape[wanted.index(match[2])] != config.r:
            problems.append(f"{key} is {tuple(tensor.shape)}, not of rank r = {config.r}")
    for layer, tensors in layers.items():
        problems += [f"missing {_PREFIX}{layer}.{name}" for name in wanted if name not in tensors]
    if problems:
        raise UserError(f"{directory} is not a sound adapter: {summarize(problems)}")
    return config, {layer: tuple(tensors[name] for name in wanted) for layer, tensors in layers.items()}


def load_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", lora_fa: bool = False
) -> None:
    """Read an adapter that was written here or by PEFT, put it on the model under `name`, and make it active.

    lora_fa: whether A stays as it is in further training, which no file says. Raises UserError for a
    configuration that cannot be honoured, and lists all missing, unexpected and wrongly shaped tensors in one
    error; the model is then left as it was.
    """
    config = replace(read_adapter_config(directory), lora_fa=lora_fa)
    tensors = _read_tensors(Path(directory) / ADAPTER_WEIGHTS_FILE)
    add_lora(model, config, name)
    targets = _parameters(model, name)
    problems = [f"missing {key}" for key in sorted(targets.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - targets.keys())]
    for key in sorted(targets.keys() & tensors.keys()):
        if tensors[key].shape != targets[key].shape:
            problems.append(
                f"{key} is {tuple(tensors[key].shape)}, the model needs {tuple(targets[key].shape)}"
            )
    if problems:
        remove_lora(model, name)
        raise UserError(f"{directory} does not fit the model: {summarize(problems)}")
    with torch.no_grad():
        for key, parameter in targets.items():
            parameter.copy_(tensors[key])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = (
            f" ({pickled.name} is pickled and never read; save it again as safetensors)"
            if pickled.exists()
            else ""
        )
        raise UserError(f"{path.parent} has no {path.name}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error
    problems = [
        f"{key} is {tensor.dtype}, not floating point"
        for key, tensor in tensors.items()
        if not tensor.is_floating_point()
    ]
    problems = problems or [
        f"{key} is infinite or NaN in places" for key, t in tensors.items() if not t.float().isfinite().all()
    ]
    if problems:
        raise UserError(f"{path} is damaged or of a training that diverged: {summarize(problems, 3)}")
    return tensors
