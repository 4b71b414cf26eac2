"""`config.json` of a Hugging Face directory <-> ModelConfig.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with different flags; this is the only place that knows which family sets
which flag. Two spellings of the file are in use, and both are read: `rope_theta` / `rope_scaling` / `torch_dtype` (what
the hub holds) and `rope_parameters` / `dtype` (what transformers 5 writes).

The rule for fields: a field is honoured, or known to change nothing, or refused by name. A field that is silently ignored
would give a model that runs and is wrong, which is the most expensive kind of bug.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from minilora.config import ModelConfig, RopeConfig
from minilora.system.errors import UserError
from minilora.system.files import read_json


def read_config_file(path: str | Path) -> ModelConfig:
    """Read `config.json`. Raises UserError naming the file and the field."""
    raw = read_json(path)
    try:
        return parse_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_config(raw: dict) -> ModelConfig:
    """Read the contents of a `config.json` in either spelling.

    Raises UserError for an architecture or a field that changes the result and is not honoured here, and
    for a missing or impossible one.
    """
    family = _family(raw)
    rope, rope_fields = _read_rope(raw)
    honoured = _HONOURED | rope_fields
    _check_quantization(raw.get("quantization_config"))
    for name, value in raw.items():
        if name in _REFUSED_UNLESS:
            if value not in _REFUSED_UNLESS[name]:
                allowed = " or ".join(repr(v) for v in _REFUSED_UNLESS[name])
                raise UserError(f"{name} = {value!r} is not supported; it must be {allowed}")
        elif name == "auto_map" and "AutoModelForCausalLM" in (value or {}):
            raise UserError(
                f"auto_map asks for the model's own code ({value['AutoModelForCausalLM']}), which is never run"
            )
        elif name not in honoured | _CHANGES_NOTHING and not name.startswith("_") and value not in _OFF:
            raise UserError(
                f"unknown field {name} = {value!r}: it may change the result, and it is not supported here"
            )

    def size(name: str, default: int | None = None) -> int:
        value = raw.get(name) if raw.get(name) is not None else default
        if value is None:
            raise UserError(f"the field {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be a positive whole number, not {value!r}")
        return value

    heads, layers = size("num_attention_heads"), size("num_hidden_layers")
    # A null means as many key/value heads as query heads; an absent field means the family's default.
    kv_heads = size(
        "num_key_value_heads", heads if "num_key_value_heads" in raw else family.kv_heads or heads
    )
    head_dim = size("head_dim", family.head_dim or size("hidden_size") // heads)
    bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    config = ModelConfig(
        model_type=raw["model_type"],
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layer_windows=_read_windows(raw, layers),
        rope=rope,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=size("max_position_embeddings", 2048),
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
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"head_dim = {head_dim} is odd; RoPE rotates pairs")
    return config


def to_config_json(config: ModelConfig) -> dict:
    """The same model as a `config.json` in the hub's spelling, which every version of transformers reads."""
    rope_scaling = None
    if config.rope.rope_type != "default":
        rope_scaling = {k: v for k, v in asdict(config.rope).items() if k != "theta"}
        if config.rope.rope_type == "linear":
            rope_scaling = {k: rope_scaling[k] for k in ("rope_type", "factor")}
    windows = set(config.layer_windows) - {None}
    raw = {"architectures": [_FAMILIES[config.model_type].architecture]} | {
        name: getattr(config, name) for name in _WRITTEN
    }
    raw |= {
        "hidden_act": "silu",
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling,
        "attention_dropout": 0.0,
        "torch_dtype": config.dtype,
        "eos_token_id": config.eos_token_ids[0]
        if len(config.eos_token_ids) == 1
        else list(config.eos_token_ids) or None,
    }
    if config.model_type == "llama":
        raw |= {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    elif config.model_type == "qwen3":
        raw |= {"attention_bias": config.o_bias}
    if config.model_type == "mistral":
        raw |= {"sliding_window": config.layer_windows[0]}
    elif windows:
        kinds = ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
        raw |= {"use_sliding_window": True, "sliding_window": windows.pop(), "layer_types": kinds}
    return raw


@dataclass(frozen=True)
class _Family:
    """What a model family fixes without saying so in `config.json`, and transformers' defaults for absent
    fields.
    """

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
    attention_bias mlp_bias auto_map quantization_config
    """.split()
)

# Fields that are written as they stand in ModelConfig.
_WRITTEN = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    pad_token_id
    """.split()

# Fields with values that are honoured because they ask for what is done anyway, and refused with any other
# value.
_REFUSED_UNLESS = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_mrope": (False, None),
}

# Bookkeeping: who wrote the file, how to initialise or to generate, what to return. None of it changes the
# logits.
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

_OFF = (None, False, {}, [], "")


def _family(raw: dict) -> _Family:
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
    family = _FAMILIES[model_type]
    for name in raw.get("architectures") or []:
        if name != (needed := family.architecture):
            raise UserError(
                f"architecture {name!r} is not supported; for model_type {model_type!r} it must be {needed!r}"
            )
    return family


def _check_quantization(raw: dict | None) -> None:
    """Quantized files describe themselves tensor by tensor; what is checked here is that they are of the kind
    that is read.
    """
    if raw is None:
        return
    method, bits = (
        raw.get("quant_method"),
        4 if raw.get("load_in_4bit") else 8 if raw.get("load_in_8bit") else None,
    )
    if (method, bits) != ("bitsandbytes", 4):
        kind = f"{method} in {bits} bits" if bits else str(method)
        raise UserError(
            f"quantization_config is of {kind}; only bitsandbytes in 4 bits is read: take the unquantized weights"
        )


def _read_rope(raw: dict) -> tuple[RopeConfig, set[str]]:
    """The rotary embedding in either spelling, and the names of the top-level fields it was read from."""
    fields = {"rope_theta", "rope_scaling", "rope_parameters"}
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    place = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if rope_type not in ("default", "linear", "llama3"):
        raise UserError(f"{place} of type {rope_type!r} is not supported; supported: default, linear, llama3")
    llama3_fields = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    allowed = {"default": set(), "linear": {"factor"}, "llama3": llama3_fields}[rope_type]
    if missing := sorted(allowed - set(scaling)):
        raise UserError(f"{place} of type {rope_type!r} lacks {', '.join(missing)}")
    for name, value in scaling.items():
        if name == "partial_rotary_factor" and value in _REFUSED_UNLESS[name]:
            continue
        if name not in allowed and value not in _OFF:
            raise UserError(f"{place}.{name} = {value!r} is not supported with type {rope_type!r}")
    return RopeConfig(theta=float(theta), rope_type=rope_type, **{k: scaling[k] for k in allowed}), fields


def _read_windows(raw: dict, layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer. Mistral: all layers. Qwen: `layer_types`, or all from
    `max_window_layers` on.
    """
    family, window, kinds = raw["model_type"], raw.get("sliding_window"), raw.get("layer_types")
    if family == "mistral":
        if kinds:
            raise UserError("layer_types is not a field of a Mistral model; its window holds for every layer")
        return (raw.get("sliding_window", 4096),) * layers
    if family == "llama":
        if kinds and set(kinds) != {"full_attention"}:
            raise UserError(
                f"layer_types = {sorted(set(kinds))} is not a field of a Llama model, which has no sliding window"
            )
        if window is not None:
            raise UserError(
                f"sliding_window = {window} is not a field of a Llama model; model_type 'mistral' has one"
            )
        return (None,) * layers
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    if len(kinds) != layers:
        raise UserError(f"layer_types has {len(kinds)} entries for num_hidden_layers = {layers}")
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types holds {sorted(unknown)}; supported: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
