"""PEFT 0.21's vocabulary for a LoRA adapter: its two files, the keys of the one and the tensors of the other.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            float32 (r, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight            float32 (out, r)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector    float32 (out,), only for DoRA
    base_model.model.model.embed_tokens.lora_embedding_A                      float32 (r, V)
    base_model.model.model.embed_tokens.lora_embedding_B                      float32 (D, r)

A key consists of a prefix, the layer's full name in the base model, and the part of the update. The file
does not hold the adapter's own name, so the adapter can be loaded under any name.
"""

import re

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"  # older versions of PEFT wrote it; unpickling runs code

_PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
PARTNERS = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}

_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, [*PARTNERS, MAGNITUDE]))})")


def tensor_key(layer: str, part: str) -> str:
    """The key of a tensor in the file. layer: full name in the base model. part: A, B, MAGNITUDE, ..."""
    return f"{_PREFIX}{layer}.{part}"


def split_key(key: str) -> tuple[str, str] | None:
    """The (layer, part) of a key in the file, or None for a tensor that is no part of a layer's update."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2]) if match else None


# The names that `init_lora_weights` may hold. Some of them may be written in upper case.
KNOWN_INITS = re.compile(r"(?i:gaussian|olora|mica)|eva|orthogonal|lora_ga|loftq|corda|pissa(_niter_\d+)?")
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "orthogonal", "eva", "mica")


def changes_base(init: str) -> bool:
    """Whether an initialisation rewrote the base weights, so that the adapter alone is not the whole update.

    PiSSA, OLoRA, CorDA and LoRA-GA start with a product B A that is not zero. PEFT subtracts it from W, so
    that training starts from the base model's function. LoftQ replaces W by weights that it quantized itself.
    The other initialisations start with B A = 0 and keep W.
    """
    return init.lower() not in _INITS_THAT_KEEP_THE_BASE


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
