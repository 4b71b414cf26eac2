"""What a model and an adapter are, as plain dataclasses.

`ModelConfig.from_dict` reads the `config.json` of a Hugging Face directory. Llama, Mistral, Qwen2 and Qwen3
are one decoder with different flags; this is the only place that knows which family sets which flag. Two
spellings of the file are in use, and both are read: `rope_theta` / `rope_scaling` / `torch_dtype` (what the
hub holds) and `rope_parameters` / `dtype` (what transformers 5 writes).

The rule for fields: a field is honoured, or known to change nothing, or refused by name. A field that is
silently ignored would give a model that runs and is wrong, which is the most expensive kind of bug.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minilora.system.errors import UserError, suggestion
from minilora.system.files import read_json


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its two simple stretches for longer
    contexts.
    """

    theta: float = 10000.0  # base of the geometric series of wavelengths
    rope_type: str = "default"  # default | linear | llama3
    factor: float = 1.0  # linear, llama3: by how much the context is stretched
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched by the whole factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are left alone
    original_max_position_embeddings: int = 8192  # llama3: context length before stretching


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder. Field names are Hugging Face's where Hugging Face has the field."""

    model_type: str  # llama | mistral | qwen2 | qwen3
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G, divides H
    head_dim: int  # K, even; H * K need not be D
    layer_windows: tuple[
        int | None, ...
    ]  # sliding window of each layer in tokens, None: sees everything before it
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # lm_head shares the embedding's weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key before RoPE
    dtype: str = "float32"  # the dtype the files are said to be in
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`. Raises UserError naming the file and the field."""
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
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
        config = cls(
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

    def to_dict(self) -> dict:
        """The same model as a `config.json` in the hub's spelling, which every version of transformers reads."""
        rope_scaling = None
        if self.rope.rope_type != "default":
            rope_scaling = {k: v for k, v in asdict(self.rope).items() if k != "theta"}
            if self.rope.rope_type == "linear":
                rope_scaling = {k: rope_scaling[k] for k in ("rope_type", "factor")}
        windows = set(self.layer_windows) - {None}
        raw = {"architectures": [_FAMILIES[self.model_type].architecture]} | {
            name: getattr(self, name) for name in _WRITTEN
        }
        raw |= {
            "hidden_act": "silu",
            "rope_theta": self.rope.theta,
            "rope_scaling": rope_scaling,
            "attention_dropout": 0.0,
            "torch_dtype": self.dtype,
            "eos_token_id": self.eos_token_ids[0]
            if len(self.eos_token_ids) == 1
            else list(self.eos_token_ids) or None,
        }
        if self.model_type == "llama":
            raw |= {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}
        elif self.model_type == "qwen3":
            raw |= {"attention_bias": self.o_bias}
        if self.model_type == "mistral":
            raw |= {"sliding_window": self.layer_windows[0]}
        elif windows:
            kinds = ["full_attention" if w is None else "sliding_attention" for w in self.layer_windows]
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
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps max_position_embeddings tie_word_embeddings torch_dtype dtype bos_token_id eos_token_id pad_token_id
    sliding_window layer_types use_sliding_window max_window_layers attention_bias mlp_bias auto_map quantization_config
    """.split()
)

# Fields that are written as they stand in ModelConfig.
_WRITTEN = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id pad_token_id
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
    transformers_version name_or_path initializer_range use_cache pretraining_tp return_dict torchscript output_attentions
    output_hidden_states id2label label2id num_labels problem_type finetuning_task task_specific_params chunk_size_feed_forward
    use_bfloat16 is_decoder is_llama_config tokenizer_class sep_token_id prefix decoder_start_token_id unsloth_fixed
    unsloth_version transformers.js_config model_max_length max_length min_length do_sample num_beams temperature top_k top_p
    repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids early_stopping typical_p num_return_sequences
    diversity_penalty num_beam_groups encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens output_scores return_dict_in_generate tf_legacy_loss
    pruned_heads tie_encoder_decoder cross_attention_hidden_size
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


@dataclass(frozen=True)
class QuantConfig:
    """How frozen weights are stored (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3). Names are
    bitsandbytes'.
    """

    bits: int = 4  # 4 or 8
    quant_type: str = "nf4"  # nf4 or fp4, for 4 bits; 8 bits are always row-wise int8
    double_quant: bool = True  # quantize the scales as well: 4.127 bits a weight instead of 4.5
    blocksize: int = 64  # weights that share a scale

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise UserError(
                f"quantization_bit must be 4 or 8, or none for unquantized weights, not {self.bits!r}"
            )
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"quantization_type {self.quant_type!r} is not known; choose nf4 or fp4")


@dataclass(frozen=True)
class LoraConfig:
    """An adapter: y = x W^T + scaling * dropout(x) A^T B^T (LoRA, Hu et al. 2021, arXiv:2106.09685, section
    4.1).
    """

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # on the adapter's input, while training
    target_modules: tuple[str, ...] | list[str] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )  # names, a regex, or all-linear
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732)
    use_dora: bool = False  # train the lengths of the weight's rows apart (Liu et al. 2024, arXiv:2402.09353)
    lora_fa: bool = (
        False  # train B alone, with A as it was drawn: for less memory (Zhang et al. 2023, arXiv:2308.03303)
    )

    def __post_init__(self):
        for name in ("use_rslora", "use_dora", "lora_fa"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise UserError(f"lora_rank must be a whole number of at least 1, not {self.r!r}")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value!r}")
        if not self.lora_alpha > 0:
            raise UserError(f"lora_alpha must be above 0, not {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if not self.target_modules:
            raise UserError("lora_target is empty; name layers such as q_proj,v_proj, or say all-linear")
        if not isinstance(self.target_modules, str):
            if not isinstance(self.target_modules, (list, tuple, set)) or not all(
                isinstance(n, str) for n in self.target_modules
            ):
                raise UserError(f"lora_target must be text or a list of texts, not {self.target_modules!r}")
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @classmethod
    def preset(cls, name: str, **changes) -> "LoraConfig":
        """One of `PRESETS`, with `changes` to single fields."""
        if name not in PRESETS:
            raise UserError(f"preset {name!r} is not known{suggestion(name, PRESETS)}")
        return replace(PRESETS[name], **changes)


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL_SEVEN = (*_QKVO, "gate_proj", "up_proj", "down_proj")

PRESETS = {  # trainable parameters on Mistral-7B
    "minimal_r4_qv": LoraConfig(4, 8, 0.05, ("q_proj", "v_proj")),  # 1,703,936
    "standard_r8_qkvo": LoraConfig(8, 16, 0.05, _QKVO),  # 6,815,744
    "aggressive_r16_all": LoraConfig(16, 32, 0.05, _ALL_SEVEN),  # 41,943,040
    "high_capacity_r32_all": LoraConfig(32, 64, 0.05, _ALL_SEVEN),  # 83,886,080
}
