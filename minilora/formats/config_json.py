"""`config.json` of a Hugging Face directory <-> ModelConfig.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with different flags. This is the only file that knows which
family sets which flag. Two spellings of `config.json` are in use, and both are read:

    the hub's             rope_theta, rope_scaling, torch_dtype
    transformers 5's      rope_parameters, dtype

Every field is honoured, or known to change nothing, or refused by name. A field that is silently ignored
would give a model that runs and is wrong, which is the most expensive kind of bug.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from minilora.config import ModelConfig, RopeConfig
from minilora.system.errors import UserError
from minilora.system.files import read_json

# ---- the fields ----


@dataclass(frozen=True)
class _Family:
    """The flags that a model family sets without a field for them, and its defaults for absent fields."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_heads: int | None = None  # num_key_value_heads when the field is absent
    head_dim: int | None = None  # head_dim when the field is absent or null; None: hidden_size / heads


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM", kv_heads=8),
    "qwen2": _Family("Qwen2ForCausalLM", kv_heads=32, qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", kv_heads=32, head_dim=128, qk_norm=True),
}

_HONOURED = set(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings torch_dtype dtype
    bos_token_id eos_token_id pad_token_id sliding_window layer_types use_sliding_window max_window_layers
    attention_bias mlp_bias auto_map quantization_config rope_theta rope_scaling rope_parameters
    """.split()
)

# Fields that ModelConfig holds under the same name, in the order in which they are written.
_WRITTEN = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    pad_token_id
    """.split()

# Fields that are honoured with these values, which ask for nothing unusual, and refused with all others.
_REFUSED_UNLESS = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_mrope": (False, None),
}

# Bookkeeping: who wrote the file, how to initialise, generate or return. None of it changes the logits.
_CHANGES_NOTHING = set(
    """
    transformers_version name_or_path initializer_range use_cache pretraining_tp return_dict torchscript
    output_attentions output_hidden_states id2label label2id num_labels problem_type finetuning_task
    task_specific_params chunk_size_feed_forward use_bfloat16 is_decoder is_llama_config tokenizer_class
    sep_token_id prefix decoder_start_token_id unsloth_fixed unsloth_version transformers.js_config
    model_max_length max_length min_length do_sample num_beams temperature top_k top_p repetition_penalty
    length_penalty no_repeat_ngram_size bad_words_ids early_stopping typical_p num_return_sequences
    diversity_penalty num_beam_groups encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    output_scores return_dict_in_generate tf_legacy_loss pruned_heads tie_encoder_decoder
    cross_attention_hidden_size
    """.split()
)

_OFF = (None, False, {}, [], "")  # An unknown field with one of these values asks for nothing.

_LLAMA3_FIELDS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_ROPE_FIELDS = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3_FIELDS}  # rope_type -> its fields

# ---- reading ----


def read_config_file(path: str | Path) -> ModelConfig:
    """Read `config.json`. Raises UserError naming the file and the field."""
    raw = read_json(path)
    try:
        return parse_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_config(raw: dict) -> ModelConfig:
    """The model that the contents of a `config.json` describe, in either spelling.

    Raises UserError for an architecture or a field that changes the result and is not honoured here, and
    for a missing or impossible one.
    """
    family, rope = _family(raw), _read_rope(raw)
    _check_quantization(raw.get("quantization_config"))
    for name, value in raw.items():
        _check_field(name, value)
    layers = _size(raw, "num_hidden_layers")
    bias, eos = bool(raw.get("attention_bias", False)), raw.get("eos_token_id")
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=_size(raw, "hidden_size"),
        intermediate_size=_size(raw, "intermediate_size"),
        num_hidden_layers=layers,
        **_read_heads(raw, family),
        layer_windows=_read_windows(raw, layers),
        rope=rope,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=_size(raw, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family.qkv_bias,
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=raw.get("pad_token_id"),
    )


def _family(raw: dict) -> _Family:
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
    family = _FAMILIES[model_type]
    for name in raw.get("architectures") or []:
        if name != family.architecture:
            raise UserError(
                f"architecture {name!r} is not supported; "
                f"for model_type {model_type!r} it must be {family.architecture!r}"
            )
    return family


def _read_rope(raw: dict) -> RopeConfig:
    """The rotary embedding in either spelling."""
    source = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    fields = dict(raw.get(source) or {})
    old_type = fields.pop("type", None)
    rope_type = fields.pop("rope_type", None) or old_type or "default"
    theta = fields.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if rope_type not in list(_ROPE_FIELDS):
        raise UserError(
            f"{source} of type {rope_type!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}"
        )
    allowed = _ROPE_FIELDS[rope_type]
    if missing := sorted(allowed - set(fields)):
        raise UserError(f"{source} of type {rope_type!r} lacks {', '.join(missing)}")
    for name, value in fields.items():
        whole = name == "partial_rotary_factor" and value in _REFUSED_UNLESS[name]
        if name not in allowed and value not in _OFF and not whole:
            raise UserError(f"{source}.{name} = {value!r} is not supported with type {rope_type!r}")
    return RopeConfig(theta=float(theta), rope_type=rope_type, **{name: fields[name] for name in allowed})


def _check_quantization(raw: dict | None) -> None:
    """Raise UserError for files in a quantized format that is not read here.

    Quantized tensors describe themselves, so nothing else of the field is needed.
    """
    if raw is None:
        return
    method = raw.get("quant_method")
    bits = 4 if raw.get("load_in_4bit") else 8 if raw.get("load_in_8bit") else None
    if (method, bits) != ("bitsandbytes", 4):
        given = f"{method} in {bits} bits" if bits else str(method)
        raise UserError(
            f"quantization_config is of {given}; only bitsandbytes in 4 bits is read: "
            "take the unquantized weights"
        )


def _check_field(name: str, value: object) -> None:
    """Raise UserError for a field that may change the result and is not honoured."""
    if name in _REFUSED_UNLESS:
        if value not in _REFUSED_UNLESS[name]:
            allowed = " or ".join(repr(v) for v in _REFUSED_UNLESS[name])
            raise UserError(f"{name} = {value!r} is not supported; it must be {allowed}")
    elif name == "auto_map" and "AutoModelForCausalLM" in (value or {}):
        code = value["AutoModelForCausalLM"]
        raise UserError(f"auto_map asks for the model's own code ({code}), which is never run")
    elif name not in _HONOURED | _CHANGES_NOTHING and not name.startswith("_") and value not in _OFF:
        raise UserError(
            f"unknown field {name} = {value!r}: it may change the result, and it is not supported here"
        )


def _size(raw: dict, name: str, default: int | None = None) -> int:
    """A positive whole number. An absent field and a null both mean the default."""
    value = raw.get(name) if raw.get(name) is not None else default
    if value is None:
        raise UserError(f"the field {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive whole number, not {value!r}")
    return value


def _read_heads(raw: dict, family: _Family) -> dict[str, int]:
    """ModelConfig's fields about attention heads."""
    heads = _size(raw, "num_attention_heads")
    # A null means as many key/value heads as query heads; an absent field means the family's default.
    default = heads if "num_key_value_heads" in raw else family.kv_heads or heads
    kv_heads = _size(raw, "num_key_value_heads", default)
    head_dim = _size(raw, "head_dim", family.head_dim or _size(raw, "hidden_size") // heads)
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"head_dim = {head_dim} is odd; RoPE rotates pairs")
    return dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)


def _read_windows(raw: dict, layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer, or None for a layer that sees all tokens before it."""
    if raw["model_type"] == "llama":
        _refuse_windows(raw)
        return (None,) * layers
    if raw["model_type"] == "mistral":
        if raw.get("layer_types"):
            raise UserError("layer_types is not a field of a Mistral model; its window holds for every layer")
        return (raw.get("sliding_window", 4096),) * layers
    return _read_qwen_windows(raw, layers)


def _refuse_windows(raw: dict) -> None:
    types, window = set(raw.get("layer_types") or []), raw.get("sliding_window")
    if types - {"full_attention"}:
        raise UserError(
            f"layer_types = {sorted(types)} is not a field of a Llama model, which has no sliding window"
        )
    if window is not None:
        raise UserError(
            f"sliding_window = {window} is not a field of a Llama model; model_type 'mistral' has one"
        )


def _read_qwen_windows(raw: dict, layers: int) -> tuple[int | None, ...]:
    """The layers with a window are those of `layer_types`, else all from `max_window_layers` on."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for num_hidden_layers = {layers}")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types holds {sorted(unknown)}; supported: full_attention, sliding_attention")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in types)


# ---- writing ----


def to_config_json(config: ModelConfig) -> dict:
    """The same model as a `config.json` in the hub's spelling, which every version of transformers reads."""
    eos = list(config.eos_token_ids)
    raw = {"architectures": [_FAMILIES[config.model_type].architecture]}
    raw |= {name: getattr(config, name) for name in _WRITTEN}
    raw |= {
        "hidden_act": "silu",
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "attention_dropout": 0.0,
        "torch_dtype": config.dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    if config.model_type in ("llama", "qwen3"):
        raw["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        raw["mlp_bias"] = config.mlp_bias
    windows = set(config.layer_windows) - {None}
    if config.model_type == "mistral":
        raw["sliding_window"] = config.layer_windows[0]
    elif windows:
        types = ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
        raw |= {"use_sliding_window": True, "sliding_window": windows.pop(), "layer_types": types}
    return raw


def _rope_scaling(rope: RopeConfig) -> dict | None:
    if rope.rope_type == "default":
        return None
    names = ("rope_type", "factor") if rope.rope_type == "linear" else asdict(rope).keys() - {"theta"}
    return {name: value for name, value in asdict(rope).items() if name in names}
