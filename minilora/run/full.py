"""Full training, `finetuning_type: full`: all weights learn, and the result is a model instead of an adapter.

The trainer sees an adapter all the same: float32 copies of all modules (`adapted.TrainedCopy`), beside the
original weights in the compute dtype. So mixed precision, recompute, resuming and the comparison with the
base model work as they do for LoRA, and cost as much as elsewhere: 4 bytes a number for the copy, 4 for its
gradient, 8 for AdamW's moments, 2 for the original in 16 bits.

Only the files differ. Checkpoints and the result are model directories, which transformers and `--model`
load: checkpoints in float32, the result in the dtype of the model that training began with.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from minilora.adapted import TrainedCopy
from minilora.adapters.save_load import load_adapter, save_adapter
from minilora.formats.config_json import to_config_json
from minilora.formats.weights import MODEL_CONFIG_FILE, SINGLE_FILE, save_tensors
from minilora.lora import add_lora, remove_lora
from minilora.model import CausalLM
from minilora.parallel.passes import gathered_on_reading
from minilora.quantization import FLOATS
from minilora.run.plan import Plan
from minilora.system.errors import UserError
from minilora.system.files import write_whole
from minilora.wrapping import adapted_layers, adapter_names, plain_name


def save_trained(plan: Plan, model: CausalLM, directory: Path, is_checkpoint: bool = False) -> None:
    """Write what the run trains: the active adapter in PEFT's format, or a model. Only rank 0 writes."""
    if not plan.processes.main:
        return None
    if not plan.trains_all:
        return save_adapter(model, directory, active_adapter(model) or "default", plan.base_model)
    dtype = torch.float32 if is_checkpoint else FLOATS[plan.base_config.dtype]
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in trained_weights(model).items()}
    raw = to_config_json(plan.model_config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, directory / SINGLE_FILE)
    write_whole(directory / MODEL_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def load_trained(plan: Plan, model: CausalLM, directory: Path, name: str | None = None) -> None:
    """Put on a frozen model what `save_trained` wrote, or go on with what is on it. Raises UserError.

    An adapter becomes the one called `name`; None: it replaces the active one.
    """
    if not plan.trains_all:
        name = name or active_adapter(model) or "default"
        if name in adapter_names(model):
            remove_lora(model, name)
        with gathered_on_reading(model):
            return load_adapter(model, directory, name, **plan.as_trained)
    if not adapted_layers(model):
        add_lora(model, plan.lora)
    stored, weights = load_file(directory / SINGLE_FILE), trained_weights(model)
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in weights.items()}:
        raise UserError(f"{directory / SINGLE_FILE} holds other weights than the model of this training")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored[name])


def active_adapter(model: CausalLM) -> str | None:
    """Return the name of the adapter that forward applies."""
    return next((layer.active for layer in adapted_layers(model).values() if layer.active), None)


def trained_weights(model: CausalLM) -> dict[str, Tensor]:
    """Return the trained copies by the names that their originals have in the model's files.

    A tied head is left out.
    """
    weights, seen = {}, set()
    for path, layer in adapted_layers(model).items():
        assert isinstance(layer, TrainedCopy), "full training has no other kind of adapter"
        for kind, parameter in layer.parts("default").items():
            if id(parameter) not in seen:
                weights[f"{plain_name(path)}.{kind.removeprefix('saved_')}"] = parameter
            seen.add(id(parameter))
    return weights
