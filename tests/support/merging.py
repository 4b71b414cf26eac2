"""Base models and adapters on disk, for tests that merge, export and lint them."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from minilora import LoraConfig, add_lora, load_adapter, load_model, save_adapter
from support.families import transformers_model
from support.tiny import randomize


def make_base(directory, model_dir, dtype=torch.float32, family="llama-gqa"):
    """Write a base model with transformers, and the tokenizer of `model_dir` beside it."""
    theirs = transformers_model(family, vocab_size=320).to(dtype)
    theirs.generation_config.max_length = 33
    theirs.save_pretrained(directory)
    shutil.copy(model_dir / "tokenizer.model", directory)


def make_adapter(base, directory, **changes):
    """Write a random adapter for the model in `base`. changes: to the fields of its LoraConfig."""
    lora = dict(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
    )
    model = load_model(base)
    add_lora(model, LoraConfig(**lora | changes))
    randomize(model)
    save_adapter(model, directory, base_model_name_or_path=str(base))


def adapted(place, quant=None):
    """The model of `base` with the adapter of `adapter`, both directories in `place`."""
    model = load_model(place / "base", quant)
    load_adapter(model, place / "adapter")
    return model


def change_config(place, **changes):
    """Change keys of adapter_config.json."""
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(place, change):
    """Rewrite adapter_model.safetensors after `change` has edited the dictionary of its tensors."""
    path = place / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
