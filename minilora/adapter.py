"""Adapters on disk, in the format of PEFT 0.21: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    float32 (r, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    float32 (out, r)

The adapter's own name is not in the file, so it can be loaded under any. The configuration holds PEFT's full set of keys with plain
leaf names as targets, which is what PEFT, vLLM and SGLang all read. When reading, a key that asks for something that this
implementation does not do (DoRA, trained biases, an initialisation that rewrote the base weights) is refused by name.
"""

import json
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.config import LoraConfig
from minilora.errors import UserError, describe
from minilora.files import read_json, write_whole
from minilora.lora import add_lora, lora_layers, match_targets, remove_lora

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")

# Every key that PEFT 0.21 writes for a plain LoRA, with the value that means "nothing special".
_PEFT_DEFAULTS = {
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

_HONOURED = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
_CHANGES_NOTHING = set(
    """
    auto_mapping base_model_name_or_path revision peft_version task_type inference_mode megatron_core
    ensure_weight_tying layers_pattern eva_config qalora_group_size runtime_config
    """.split()
)
# How A and B began says nothing about the result, unless the base weights were changed along with them (PiSSA, OLoRA, LoftQ, ...).
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Write one adapter as PEFT does. Each file appears whole or not at all. Raises UserError if the model has no such adapter."""
    layers = lora_layers(model, name)
    if not layers:
        raise UserError(f"the model has no adapter called {name!r} to save")
    config = next(iter(layers.values())).configs[name]
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach().cpu().contiguous()
    written = _PEFT_DEFAULTS | {
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _plain_targets(model, list(layers)),
        "use_rslora": config.use_rslora,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / CONFIG_FILE, json.dumps(written, indent=2) + "\n")


def _plain_targets(model: nn.Module, wrapped: list[str]) -> list[str]:
    """Leaf names if they name exactly the wrapped layers, else full names: a regular expression is read by no server."""
    leaves = sorted({path.rpartition(".")[2] for path in wrapped})
    return leaves if match_targets(model, leaves) == wrapped else wrapped


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Read a PEFT `adapter_config.json`. Raises UserError naming the file and the key that cannot be honoured."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not an adapter: it has no {CONFIG_FILE}")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; it must be 'LORA'")
    for key in ("r", "lora_alpha", "target_modules"):
        if raw.get(key) is None:
            raise UserError(f"{path}: the key {key} is missing")
    for key, value in raw.items():
        if key in _HONOURED | _CHANGES_NOTHING:
            continue
        if key == "init_lora_weights":
            if value not in _HARMLESS_INITS:
                raise UserError(f"{path}: init_lora_weights = {value!r} changed the base weights; convert it to plain LoRA first")
        elif value and value != _PEFT_DEFAULTS.get(key):
            raise UserError(f"{path}: {key} = {value!r} is not supported")
    return LoraConfig(
        r=raw["r"],
        lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout", 0.0),
        target_modules=raw["target_modules"],
        use_rslora=raw.get("use_rslora", False),
    )


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """An adapter without a model: its configuration, and full layer name -> (A, B), float32 (r, in) and (out, r).

    Raises UserError as `read_adapter_config` does, and lists all tensors that are no A or B, lack their partner, or contradict r.
    """
    config, problems = read_adapter_config(directory), []
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(_read_tensors(Path(directory) / WEIGHTS_FILE).items()):
        if not (match := _FACTOR.fullmatch(key)):
            problems.append(f"{key} is no lora_A.weight or lora_B.weight")
            continue
        layer, side = match.groups()
        pairs.setdefault(layer, {})[side] = tensor.float()
        if tensor.dim() != 2 or tensor.shape["AB".index(side)] != config.r:
            problems.append(f"{key} is {tuple(tensor.shape)}, not of rank r = {config.r}")
    for layer, pair in pairs.items():
        problems += [f"missing {_PREFIX}{layer}.lora_{side}.weight" for side in "AB" if side not in pair]
    if problems:
        raise UserError(f"{directory} is not a sound adapter: {describe(problems)}")
    return config, {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Read an adapter that was written here or by PEFT, put it on the model under `name`, and make it active.

    Raises UserError for a configuration that cannot be honoured, and lists all missing, unexpected and wrongly shaped tensors in
    one error; the model is then left as it was.
    """
    config = read_adapter_config(directory)
    tensors = _read_tensors(Path(directory) / WEIGHTS_FILE)
    add_lora(model, config, name)
    targets: dict[str, Tensor] = {}
    for path, layer in lora_layers(model, name).items():
        targets[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A[name]
        targets[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B[name]
    problems = [f"missing {key}" for key in sorted(targets.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - targets.keys())]
    for key in sorted(targets.keys() & tensors.keys()):
        if tensors[key].shape != targets[key].shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, the model needs {tuple(targets[key].shape)}")
    if problems:
        remove_lora(model, name)
        raise UserError(f"{directory} does not fit the model: {describe(problems)}")
    with torch.no_grad():
        for key, parameter in targets.items():
            parameter.copy_(tensors[key])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = f" ({pickled.name} is pickled and never read; save it again as safetensors)" if pickled.exists() else ""
        raise UserError(f"{path.parent} has no {path.name}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error
