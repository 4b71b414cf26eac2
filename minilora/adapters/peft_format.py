"""PEFT 0.21's vocabulary for a LoRA adapter: its two files, the keys of the one and the tensors of the other.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            float32 (r, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight            float32 (out, r)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector    float32 (out,), only for DoRA
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias              (out,), for lora_bias
    base_model.model.model.embed_tokens.lora_embedding_A                      float32 (r, V)
    base_model.model.model.embed_tokens.lora_embedding_B                      float32 (D, r)
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta  (rows, D)
    base_model.model.lm_head.weight                                           (V, D), instead of the base's
    base_model.model.lm_head.base_layer.weight                                the same under an update A, B

A key consists of a prefix, the layer's full name in the base model, and the part of the update. The file
does not hold the adapter's own name, so the adapter can be loaded under any name.

A parameter of the base model itself takes that one's place: a module of `modules_to_save`, a trained bias, or
an embedding that PEFT saved with the adapter because its vocabulary has grown or because it is a target.
"""

import re

from minilora.system.schema import Field

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"  # of older versions of PEFT; see pickled.py

PREFIX = "base_model.model."
A, B, MAGNITUDE, LORA_BIAS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
ROWS = "token_adapter.trainable_tokens_delta"
PARTNERS = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}
WEIGHT, BIAS = "weight", "bias"  # of the module itself
BASE_WEIGHT, BASE_BIAS = "base_layer.weight", "base_layer.bias"  # of a module that has an update, too
ROWS_WEIGHT = "token_adapter.base_layer.weight"  # of a module some of whose rows are trained

_UPDATE = (A, B, LORA_BIAS, MAGNITUDE, EMBEDDING_A, EMBEDDING_B)
_WHOLE = (ROWS, ROWS_WEIGHT, BASE_WEIGHT, BASE_BIAS, WEIGHT, BIAS)


_PARTS = "|".join(map(re.escape, _UPDATE + _WHOLE))
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({_PARTS})")
# PEFT reads its own default name in a key, too, and magnitudes with an ending.
_ENDINGS = re.compile(
    r"\b(lora_[AB])\.default(\.weight|\.bias)$"
    r"|\b(lora_embedding_[AB])\.default$|\b(lora_magnitude_vector)(?:\.default)?\.weight$"
)
# What PEFT writes a second time where a module of `modules_to_save` has another vocabulary.
SAVED_TWICE = re.compile(r"\.(?:modules_to_save|original_module)\.(?:weight|bias)$")


def tensor_key(layer: str, part: str) -> str:
    """The key of a tensor in the file. layer: full name in the base model. part: A, B, MAGNITUDE, ..."""
    return f"{PREFIX}{layer}.{part}"


def split_key(key: str) -> tuple[str, str] | None:
    """The (module, part) of a key in the file; None for a key that PEFT does not write."""
    match = _KEY.fullmatch(_ENDINGS.sub(r"\1\2\3\4", key))
    return (match[1], match[2]) if match and ".lora_" not in match[1] else None


# The names that `init_lora_weights` may hold. Some of them may be written in upper case.
KNOWN_INITS = re.compile(r"(?i:gaussian|olora|mica)|eva|orthogonal|lora_ga|loftq|corda|pissa(_niter_\d+)?")
STARTS_FROM_W = ("pissa", "olora")  # of those that do not: whoever has W can repeat them
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
    "exclude_modules": Field((str, list), "those of them that are left out", nullable=True, longest=10_000),
    "layers_to_transform": Field(
        (int, list), "numbers of the decoder layers that are adapted", nullable=True, low=0, items=int
    ),
    "layers_pattern": Field((str, list), "what stands before a layer's number", nullable=True, longest=1000),
    "rank_pattern": Field(dict, "the end of a layer's name, as a regular expression -> its rank", {}),
    "alpha_pattern": Field(dict, "the same for lora_alpha", {}),
    "lora_bias": Field(bool, "a trained bias behind B", False),
    "bias": Field(str, "which biases of the base are trained", "none", choices=("none", "lora_only", "all")),
    "modules_to_save": Field(list, "modules that were trained whole", nullable=True, longest=10_000),
    "trainable_token_indices": Field((list, dict), "trained rows of the embedding", nullable=True, items=int),
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
    "corda_config": _bookkeeping(dict, "for init_lora_weights = 'corda'"),
    "eva_config": _bookkeeping(dict, "how A was initialised"),
    "fan_in_fan_out": _bookkeeping(bool, "for layers that these models do not have", False),
    "inference_mode": _bookkeeping(bool, "whether PEFT freezes the adapter", True),
    "loftq_config": _bookkeeping(dict, "for init_lora_weights = 'loftq'", {}),
    "lora_ga_config": _bookkeeping(dict, "for init_lora_weights = 'lora_ga'"),
    "megatron_core": _bookkeeping(str, "for megatron_config", "megatron.core", longest=_MAX_NAME),
    "peft_version": _bookkeeping(str, "who wrote the file", "0.21.2", longest=_MAX_NAME),
    "qalora_group_size": _bookkeeping(int, "for use_qalora", 16),
    "runtime_config": _bookkeeping(dict, "how PEFT loads the adapter"),
    "task_type": _bookkeeping(str, "PEFT's class of models", "CAUSAL_LM", longest=_MAX_NAME),
}
# Fields of LoraConfig that stand in the file under the same name.
LORA_KEYS = """
    r lora_alpha lora_dropout target_modules use_rslora use_dora exclude_modules layers_to_transform
    layers_pattern rank_pattern alpha_pattern lora_bias bias modules_to_save trainable_token_indices
    """.split()
PEFT_INIT = "init_lora_weights"  # honoured unless it changed the base weights: see `changes_base`
# Each of them asks for something that is not implemented here, unless it has this value or is empty.
PEFT_MUST_BE_OFF = dict(
    alora_invocation_tokens=None, arrow_config=None, kasa_config=None, layer_replication=None,
    megatron_config=None, monteclora_config=None, target_parameters=None, use_bdlora=None, use_qalora=False,
    velora_config=None,
)  # fmt: skip

# Every key that PEFT 0.21 writes for a plain LoRA, with the value that means "nothing special", in its order.
_TABLE = PEFT_HONOURED | PEFT_CHANGES_NOTHING
PEFT_DEFAULTS = {name: field.default for name, field in _TABLE.items() if name != "runtime_config"}
PEFT_DEFAULTS = dict(sorted((PEFT_DEFAULTS | PEFT_MUST_BE_OFF | {PEFT_INIT: True}).items()))
