"""`config.json` of a Hugging Face directory <-> ModelConfig.

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are one decoder with different flags. This is the only file that
knows which family sets which flag. Two spellings of `config.json` are in use, and both are read:

    the hub's             rope_theta, rope_scaling, torch_dtype
    transformers 5's      rope_parameters, dtype          (config_rope.py reads RoPE's)

Every field is honoured, or known to change nothing, or refused by name. A field that is silently ignored
would give a model that runs and is wrong, which is the most expensive kind of bug. `config_fields.py` is the
table of the fields: types, limits, defaults. What one field means for another is decided here.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from minilora.config import ModelConfig
from minilora.formats.config_fields import (
    CHANGES_NOTHING,
    CONFIG_FIELDS,
    MAX_PARAMETERS,
    QUANTIZATION_FIELDS,
    is_off,
)
from minilora.formats.config_rope import read_rope, write_rope
from minilora.formats.foreign_formats import refuse_method
from minilora.system.errors import UserError
from minilora.system.files import read_json
from minilora.system.schema import read_fields, shown, shown_name

# ---- the families ----


@dataclass(frozen=True)
class _Family:
    """The flags that a model family sets without a field for them, and its defaults for absent fields."""

    architecture: str
    qkv_bias: bool = False  # always, whatever attention_bias says
    bias_fields: tuple[str, ...] = ()  # that it honours; the other families of transformers read past them
    qk_norm: bool = False
    kv_heads: int | None = None  # num_key_value_heads when the field is absent
    head_dim: int | None = None  # head_dim when the field is absent or null; None: hidden_size / heads
    window: int | None = 4096  # sliding_window when the field is absent
    positions: int = 32768  # max_position_embeddings when the field is absent
    theta: float = 10000.0  # rope_theta
    tied: bool = False  # tie_word_embeddings


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", positions=2048, bias_fields=("attention_bias", "mlp_bias")),
    "mistral": _Family("MistralForCausalLM", kv_heads=8, positions=131072),
    "ministral": _Family("MinistralForCausalLM", kv_heads=8, positions=131072),
    "qwen2": _Family("Qwen2ForCausalLM", kv_heads=32, qkv_bias=True),
    "qwen3": _Family(
        "Qwen3ForCausalLM", kv_heads=32, head_dim=128, qk_norm=True, bias_fields=("attention_bias",)
    ),
    "smollm3": _Family(
        "SmolLM3ForCausalLM",
        kv_heads=4,
        window=None,
        theta=2e6,
        tied=True,
        bias_fields=("attention_bias", "mlp_bias"),
    ),
}

# Fields that ModelConfig holds under the same name, in the order in which they are written.
_WRITTEN = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    pad_token_id
    """.split()

# ---- reading ----


def read_config_file(path: str | Path, accept_config_fields: Collection[str] = ()) -> ModelConfig:
    """Read `config.json`. Raises UserError naming the file and the field."""
    raw = read_json(path)
    try:
        return parse_config(raw, accept_config_fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_config(raw: dict, accept_config_fields: Collection[str] = ()) -> ModelConfig:
    """The model that the contents of a `config.json` describe, in either spelling.

    `accept_config_fields` names fields that are unknown here and that the user declares harmless. Raises
    UserError for an architecture or a field that changes the result and is not honoured here, and for a
    missing or impossible one.
    """
    fields = read_fields(raw, CONFIG_FIELDS)
    family = _FAMILIES[fields["model_type"]]
    absent = dict(max_position_embeddings=family.positions, tie_word_embeddings=family.tied)
    fields |= {name: value for name, value in absent.items() if name not in raw}
    _check_architectures(fields, family)
    _check_code(fields["auto_map"])
    _check_quantization(fields)
    _check_accepted(raw, accept_config_fields)
    _check_unknown(raw, accept_config_fields)
    bias, mlp_bias = (fields[name] and name in family.bias_fields for name in ("attention_bias", "mlp_bias"))
    eos = fields["eos_token_id"]
    same = "model_type vocab_size hidden_size intermediate_size num_hidden_layers rms_norm_eps".split()
    same += "max_position_embeddings tie_word_embeddings".split()
    heads, layer_rope = _read_heads(raw, fields, family), _read_layer_rope(fields)
    config = ModelConfig(
        **{name: fields[name] for name in same},
        **heads,
        layer_windows=_read_windows(raw, fields, family, layer_rope),
        rope=read_rope(fields, family.theta, heads["head_dim"]),
        layer_rope=layer_rope,
        qkv_bias=bias or family.qkv_bias,
        o_bias=bias,
        mlp_bias=mlp_bias,
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


def _check_quantization(config: dict) -> None:
    """Raise UserError for files in a quantized format that is not read here.

    Quantized tensors describe themselves, so nothing else of the field is needed. Old files of bitsandbytes
    name no quant_method.
    """
    for name, method in (("quantization", "mlx"), ("compression_config", "compressed-tensors")):
        if config[name]:
            refuse_method(method, name)
    if config["quantization_config"] is None:
        return
    fields = read_fields(config["quantization_config"], QUANTIZATION_FIELDS, "quantization_config.")
    method = fields["quant_method"]
    if method is None and (fields["load_in_4bit"] or fields["load_in_8bit"]):
        method = "bitsandbytes"
    if method != "bitsandbytes":
        refuse_method(method, "quantization_config")


def _check_accepted(raw: dict, accepted: Collection[str]) -> None:
    """Raise UserError for a declaration that says nothing: of a field that is honoured, or not there."""
    for name in accepted:
        if name in CONFIG_FIELDS:
            raise UserError(
                f"accept_config_fields names {shown_name(name)}, whose meaning is known: no declaration "
                "changes it; leave the name out"
            )
        if name not in raw:
            raise UserError(
                f"accept_config_fields names {shown_name(name)}, a field that is not there; "
                "correct the name, or leave it out"
            )


def _check_unknown(raw: dict, accepted: Collection[str]) -> None:
    """Raise UserError for a field that may change the result and is not known here."""
    for name, value in raw.items():
        known = name in CONFIG_FIELDS or name in CHANGES_NOTHING or name.startswith("_") or name in accepted
        if not known and not is_off(value):
            raise UserError(
                f"unknown field {shown_name(name)} = {shown(value)}: it may change the result, and it is not "
                "supported here; if you know that it is harmless, name it in accept_config_fields"
            )


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


def _read_layer_rope(fields: dict) -> tuple[bool, ...]:
    """Whether each layer of SmolLM3 has RoPE; empty for the families whose layers all have it."""
    layers, given, interval = (
        fields[name] for name in ("num_hidden_layers", "no_rope_layers", "no_rope_layer_interval")
    )
    if fields["model_type"] != "smollm3":
        if given and not all(given):
            raise UserError(f"no_rope_layers = {shown(given)} is a field of model_type 'smollm3'")
        return ()
    if given is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if len(given) < layers:
        raise UserError(f"no_rope_layers has {len(given)} entries for num_hidden_layers = {layers}")
    return tuple(map(bool, given[:layers]))


def _read_windows(
    raw: dict, fields: dict, family: _Family, layer_rope: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """The sliding window of every layer, or None for a layer that sees all tokens before it.

    The layers with a window are those of `layer_types`; without it, Mistral's all, Qwen's from
    `max_window_layers` on, SmolLM3's without RoPE.
    """
    layers, types, model_type = (fields[name] for name in ("num_hidden_layers", "layer_types", "model_type"))
    if model_type == "llama":
        _refuse_windows(fields)
        return (None,) * layers
    window = fields["sliding_window"] if "sliding_window" in raw else family.window
    if model_type in ("qwen2", "qwen3", "smollm3") and not fields["use_sliding_window"]:
        window = None
    if types is not None:
        narrow = _narrow_layers(types, layers, window)
    elif model_type in ("qwen2", "qwen3"):
        narrow = [i >= fields["max_window_layers"] for i in range(layers)]
    else:
        narrow = [not rope for rope in layer_rope] or [True] * layers
    return tuple(window if is_narrow else None for is_narrow in narrow)


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


def _narrow_layers(types: list[str], layers: int, window: int | None) -> list[bool]:
    """Whether each layer of `layer_types` has a window."""
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for num_hidden_layers = {layers}")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types holds {shown(sorted(unknown))}; supported: full_attention, sliding_attention"
        )
    if window is None and "sliding_attention" in types:
        raise UserError(
            "layer_types holds 'sliding_attention', and there is no window: "
            "sliding_window is null or use_sliding_window is not true"
        )
    return [layer_type == "sliding_attention" for layer_type in types]


# ---- writing ----


def to_config_json(config: ModelConfig) -> dict:
    """The same model as a `config.json` in the hub's spelling, which every version of transformers reads."""
    eos = list(config.eos_token_ids)
    family = _FAMILIES[config.model_type]
    raw = {"architectures": [family.architecture]}
    raw |= {name: getattr(config, name) for name in _WRITTEN}
    raw |= {
        "hidden_act": "silu",
        **write_rope(config.rope),
        "attention_dropout": 0.0,
        "torch_dtype": config.dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    biases = {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    raw |= {name: biases[name] for name in family.bias_fields}
    if config.model_type == "smollm3":
        raw["no_rope_layers"] = [int(has_rope) for has_rope in config.layer_rope]
    return raw | _write_windows(config)


def _write_windows(config: ModelConfig) -> dict:
    """`layer_types` are written where they differ from layer to layer: older readers of Mistral know none."""
    windows, is_mistral = set(config.layer_windows), config.model_type in ("mistral", "ministral")
    if is_mistral and len(windows) == 1:
        return {"sliding_window": windows.pop()}
    if windows == {None}:
        return {}
    types = ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
    switch = {} if is_mistral else {"use_sliding_window": True}
    return switch | {"sliding_window": max(windows - {None}), "layer_types": types}
