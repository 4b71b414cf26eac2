"""`config.json` of a Hugging Face directory <-> ModelConfig.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with different flags. This is the only file that knows which
family sets which flag. Two spellings of `config.json` are in use, and both are read:

    the hub's             rope_theta, rope_scaling, torch_dtype
    transformers 5's      rope_parameters, dtype

Every field is honoured, or known to change nothing, or refused by name. A field that is silently ignored
would give a model that runs and is wrong, which is the most expensive kind of bug. `config_fields.py` is the
table of the fields: types, limits, defaults. What one field means for another is decided here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from minilora.config import ModelConfig, RopeConfig
from minilora.formats.config_fields import (
    CHANGES_NOTHING,
    CONFIG_FIELDS,
    MAX_PARAMETERS,
    QUANTIZATION_FIELDS,
    ROPE_FIELDS,
)
from minilora.system.errors import UserError
from minilora.system.files import read_json
from minilora.system.schema import read_fields, shown, shown_name

# ---- the families ----


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
_WINDOW = 4096  # sliding_window of Mistral and Qwen when the field is absent

# Fields that ModelConfig holds under the same name, in the order in which they are written.
_WRITTEN = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    pad_token_id
    """.split()

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
    fields = read_fields(raw, CONFIG_FIELDS)
    family = _FAMILIES[fields["model_type"]]
    _check_architectures(fields, family)
    _check_code(fields["auto_map"])
    _check_quantization(fields["quantization_config"])
    _check_unknown(raw)
    bias, eos = fields["attention_bias"], fields["eos_token_id"]
    same = "model_type vocab_size hidden_size intermediate_size num_hidden_layers rms_norm_eps".split()
    same += "max_position_embeddings tie_word_embeddings mlp_bias".split()
    config = ModelConfig(
        **{name: fields[name] for name in same},
        **_read_heads(raw, fields, family),
        layer_windows=_read_windows(raw, fields),
        rope=_read_rope(fields),
        qkv_bias=bias or family.qkv_bias,
        o_bias=bias,
        qk_norm=family.qk_norm,
        dtype=fields["dtype"] or fields["torch_dtype"] or "float32",
        bos_token_id=_token(fields["bos_token_id"]),
        eos_token_ids=tuple(i for i in (eos if isinstance(eos, list) else [eos]) if _token(i) is not None),
        pad_token_id=_token(fields["pad_token_id"]),
    )
    _check_size(config)
    return config


def _check_architectures(fields: dict, family: _Family) -> None:
    for name in fields["architectures"] or []:
        if name != family.architecture:
            raise UserError(
                f"architecture {shown(name)} is not supported; "
                f"for model_type {fields['model_type']!r} it must be {family.architecture!r}"
            )


def _check_code(auto_map: dict | None) -> None:
    if "AutoModelForCausalLM" in (auto_map or {}):
        code = shown(auto_map["AutoModelForCausalLM"])
        raise UserError(f"auto_map asks for the model's own code ({code}), which is never run")


def _check_quantization(raw: dict | None) -> None:
    """Raise UserError for files in a quantized format that is not read here.

    Quantized tensors describe themselves, so nothing else of the field is needed. Old files of bitsandbytes
    name no quant_method.
    """
    if raw is None:
        return
    fields = read_fields(raw, QUANTIZATION_FIELDS, "quantization_config.")
    method = fields["quant_method"]
    if method is None and (fields["load_in_4bit"] or fields["load_in_8bit"]):
        method = "bitsandbytes"
    if method != "bitsandbytes":
        raise UserError(
            f"quantization_config is of {method}; only bitsandbytes in 4 or 8 bits is read: "
            "take the unquantized weights"
        )


def _check_unknown(raw: dict) -> None:
    """Raise UserError for a field that may change the result and is not known here."""
    for name, value in raw.items():
        known = name in CONFIG_FIELDS or name in CHANGES_NOTHING or name.startswith("_")
        if not known and not _is_off(value):
            raise UserError(
                f"unknown field {shown_name(name)} = {shown(value)}: it may change the result, "
                "and it is not supported here"
            )


def _is_off(value: object) -> bool:
    """Whether an unknown field with this value asks for nothing."""
    return value in (None, False, {}, [], "")


def _token(token_id: int | None) -> int | None:
    """A token's id; None for -1, as the first Llama's files write "none"."""
    return None if token_id == -1 else token_id


def _check_size(config: ModelConfig) -> None:
    """Raise UserError for a model that no computer holds, before anything tries to build it."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    count = 2 * config.vocab_size * config.hidden_size + config.num_hidden_layers * layer
    if count > MAX_PARAMETERS:
        raise UserError(
            f"its sizes ask for {count:.1e} parameters; at most {MAX_PARAMETERS:.0e} are supported"
        )


def _read_rope(fields: dict) -> RopeConfig:
    """The rotary embedding in either spelling."""
    source = "rope_parameters" if fields["rope_parameters"] else "rope_scaling"
    raw = fields[source] or {}
    rope = read_fields(raw, ROPE_FIELDS, f"{source}.")
    rope_type = rope["rope_type"] or rope["type"] or "default"
    theta = rope["rope_theta"] or fields["rope_theta"] or 10000.0
    allowed = _ROPE_FIELDS[rope_type]
    if missing := sorted(name for name in allowed if rope[name] is None):
        raise UserError(f"{source} of type {rope_type!r} lacks {', '.join(missing)}")
    known = allowed | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name, value in raw.items():
        if name not in known and not _is_off(value):
            raise UserError(
                f"{source}.{shown_name(name)} = {shown(value)} is not supported with type {rope_type!r}"
            )
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(
            f"{source}.high_freq_factor must be above low_freq_factor = {rope['low_freq_factor']}, "
            f"not {rope['high_freq_factor']}"
        )
    return RopeConfig(theta=theta, rope_type=rope_type, **{name: rope[name] for name in allowed})


def _read_heads(raw: dict, fields: dict, family: _Family) -> dict[str, int]:
    """ModelConfig's fields about attention heads."""
    heads = fields["num_attention_heads"]
    # A null means as many key/value heads as query heads; an absent field means the family's default.
    given = fields["num_key_value_heads"] if "num_key_value_heads" in raw else family.kv_heads
    kv_heads = given or heads
    head_dim = fields["head_dim"] or family.head_dim or fields["hidden_size"] // heads
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if head_dim < 1:
        raise UserError(f"num_attention_heads = {heads} is more than hidden_size = {fields['hidden_size']}")
    if head_dim % 2:
        raise UserError(f"head_dim = {head_dim} is odd; RoPE rotates pairs")
    return dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)


def _read_windows(raw: dict, fields: dict) -> tuple[int | None, ...]:
    """The sliding window of every layer, or None for a layer that sees all tokens before it."""
    layers = fields["num_hidden_layers"]
    if fields["model_type"] == "llama":
        _refuse_windows(fields)
        return (None,) * layers
    window = fields["sliding_window"] if "sliding_window" in raw else _WINDOW
    if fields["model_type"] == "mistral":
        if fields["layer_types"]:
            raise UserError("layer_types is not a field of a Mistral model; its window holds for every layer")
        return (window,) * layers
    return _read_qwen_windows(fields, window if fields["use_sliding_window"] else None)


def _refuse_windows(fields: dict) -> None:
    types, window = set(fields["layer_types"] or []), fields["sliding_window"]
    if types - {"full_attention"}:
        raise UserError(
            f"layer_types = {shown(sorted(types))} is not a field of a Llama model, "
            "which has no sliding window"
        )
    if window is not None:
        raise UserError(
            f"sliding_window = {window} is not a field of a Llama model; model_type 'mistral' has one"
        )


def _read_qwen_windows(fields: dict, window: int | None) -> tuple[int | None, ...]:
    """The layers with a window are those of `layer_types`, else all from `max_window_layers` on."""
    layers, types = fields["num_hidden_layers"], fields["layer_types"]
    if types is None:
        return tuple(window if i >= fields["max_window_layers"] else None for i in range(layers))
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for num_hidden_layers = {layers}")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types holds {shown(sorted(unknown))}; supported: full_attention, sliding_attention"
        )
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
