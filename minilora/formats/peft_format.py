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

from minilora.system.schema import Field

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


# ---- adapter_config.json ----

_MAX_NAME = 1000  # characters of a path or a hub id


def _bookkeeping(kinds: type | tuple[type, ...], meaning: str, default: object = None, **settings) -> Field:
    return Field(kinds, meaning, default, nullable=True, **settings)


PEFT_HONOURED = {
    "peft_type": Field(str, "the kind of adapter", "LORA", required=True, choices=("LORA",)),
    "r": Field(int, "the rank", 8, required=True, low=1, high=65_536),
    "lora_alpha": Field((int, float), "the update is scaled by lora_alpha / r", 8, required=True, above=0),
    "lora_dropout": Field(float, "dropout on the adapter's input in training", 0.0, low=0, below=1),
    "target_modules": Field(
        (str, list), "the layers: names, a regular expression, or all-linear", required=True, longest=10_000
    ),
    "use_rslora": Field(bool, "scale by lora_alpha / sqrt(r)", False),
    "use_dora": Field(bool, "magnitudes apart from directions", False),
    "base_model_name_or_path": _bookkeeping(
        str, "the base model, for the commands that look it up", longest=_MAX_NAME, one_line=True
    ),
    "revision": _bookkeeping(str, "its revision on the hub", longest=_MAX_NAME, one_line=True),
}  # fmt: skip
PEFT_CHANGES_NOTHING = {
    "auto_mapping": _bookkeeping(dict, "PEFT's class for the base model"),
    "ensure_weight_tying": _bookkeeping(bool, "for modules_to_save", False),
    "eva_config": _bookkeeping(dict, "how A was initialised"),
    "inference_mode": _bookkeeping(bool, "whether PEFT freezes the adapter", True),
    "layers_pattern": _bookkeeping((str, list), "for layers_to_transform"),
    "megatron_core": _bookkeeping(str, "for megatron_config", "megatron.core", longest=_MAX_NAME),
    "peft_version": _bookkeeping(str, "who wrote the file", "0.21.2", longest=_MAX_NAME),
    "qalora_group_size": _bookkeeping(int, "for use_qalora", 16),
    "runtime_config": _bookkeeping(dict, "how PEFT loads the adapter"),
    "task_type": _bookkeeping(str, "PEFT's class of models", "CAUSAL_LM", longest=_MAX_NAME),
}
PEFT_INIT = "init_lora_weights"  # honoured unless it changed the base weights: see `changes_base`
# Each of them asks for something that is not implemented here, unless it has this value or is empty.
PEFT_MUST_BE_OFF = dict(
    alora_invocation_tokens=None, alpha_pattern={}, arrow_config=None, bias="none", corda_config=None,
    exclude_modules=None, fan_in_fan_out=False, kasa_config=None, layer_replication=None,
    layers_to_transform=None, loftq_config={}, lora_bias=False, lora_ga_config=None, megatron_config=None,
    modules_to_save=None, monteclora_config=None, rank_pattern={}, target_parameters=None,
    trainable_token_indices=None, use_bdlora=None, use_qalora=False, velora_config=None,
)  # fmt: skip

# Every key that PEFT 0.21 writes for a plain LoRA, with the value that means "nothing special", in its order.
_TABLE = PEFT_HONOURED | PEFT_CHANGES_NOTHING
PEFT_DEFAULTS = {name: field.default for name, field in _TABLE.items() if name != "runtime_config"}
PEFT_DEFAULTS = dict(sorted((PEFT_DEFAULTS | PEFT_MUST_BE_OFF | {PEFT_INIT: True}).items()))
