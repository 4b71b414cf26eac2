"""The shape of a model, an adapter and quantized weights: dataclasses with Hugging Face's field names."""

import math
from dataclasses import dataclass, field, replace

from minilora.system.errors import UserError, suggestion


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how its context is stretched: see `minilora.rope`."""

    theta: float = 10000.0  # base of the geometric series of wavelengths
    rope_type: str = "default"  # default | linear | llama3 | yarn | dynamic | longrope
    factor: float = 1.0  # linear, llama3, yarn, dynamic: by how much the context is stretched
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched by the whole factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    original_max_position_embeddings: int = 8192  # context length before stretching
    beta_fast: float = 32.0  # yarn: pairs of more turns within the original context are kept
    beta_slow: float = 1.0  # yarn: pairs of fewer turns take the whole factor
    truncate: bool = True  # yarn: the blend between them begins and ends at whole pairs
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope: divides each frequency, within the original context
    long_factor: tuple[float, ...] = ()  # longrope: the same in longer documents; K/2 numbers each


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder. Field names are Hugging Face's where Hugging Face has the field."""

    model_type: str  # llama | mistral | ministral | qwen2 | qwen3 | smollm3
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G, divides H
    head_dim: int  # K, even; H * K need not be D
    layer_windows: tuple[int | None, ...]  # each layer's sliding window, in tokens; None: no window
    rope: RopeConfig = RopeConfig()
    layer_rope: tuple[bool, ...] = ()  # whether each layer rotates queries and keys; empty: all do
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # lm_head shares the embedding's weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key before RoPE
    dtype: str = "float32"  # of the files, by their own account
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


@dataclass(frozen=True)
class QuantConfig:
    """How frozen weights are stored (QLoRA, arXiv:2305.14314, section 3). Field names are bitsandbytes'."""

    bits: int = 4  # 4 or 8
    quant_type: str = "nf4"  # nf4 or fp4, for 4 bits; 8 bits are always row-wise int8
    double_quant: bool = True  # quantize the scales as well: 4.127 bits a weight instead of 4.5
    blocksize: int = 64  # weights that share a scale

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise UserError(f"quantization_bit must be 4, 8 or none, not {self.bits!r}")
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"quantization_type {self.quant_type!r} is not known; choose nf4 or fp4")


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


Names = tuple[str, ...] | list[str] | str  # of modules: full names or their ends; text: a regular expression


@dataclass(frozen=True)
class LoraConfig:
    """An adapter: y = x W^T + scaling * dropout(x) A^T B^T (LoRA, Hu et al. 2021, arXiv:2106.09685, 4.1).

    Names and meanings are PEFT's. `targets.py` says which modules they choose.
    """

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # on the adapter's input, while training
    target_modules: Names = _QKVO  # names, a regular expression, or all-linear
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)
    use_dora: bool = False  # train the lengths of the weight's rows apart (Liu et al. 2024, arXiv:2402.09353)
    init_lora_weights: bool | str = True  # where A and B start: the kinds are in initialize.py
    use_vera: bool = False  # train two vectors a layer beside shared matrices: vera.py
    projection_prng_key: int = 0  # the seed of VeRA's shared matrices
    lora_fa: bool = False  # train B alone, for less memory (Zhang et al. 2023, arXiv:2308.03303)
    exclude_modules: Names = ()  # of target_modules, those that are left out
    layers_to_transform: tuple[int, ...] | list[int] | int = ()  # adapt these decoder layers alone; (): all
    layers_pattern: Names = ()  # what stands before a decoder layer's number in a name; (): any word
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)  # regex of a name's end -> its r
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)  # -> its lora_alpha
    lora_bias: bool = False  # train a bias of B; it is scaled like B
    bias: str = "none"  # lora_only: train the biases of adapted layers; all: all biases
    modules_to_save: Names = ()  # modules that are trained whole, in a copy
    trainable_token_indices: tuple[int, ...] | dict[str, list[int]] = field(default=(), hash=False)  # rows

    def __post_init__(self):
        for name in ("use_rslora", "use_dora", "use_vera", "lora_fa", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise UserError(f"lora_rank must be a whole number of at least 1, not {r!r}")
        alphas = [("lora_alpha", alpha) for alpha in (self.lora_alpha, *self.alpha_pattern.values())]
        for name, value in (*alphas, ("lora_dropout", self.lora_dropout)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value!r}")
            if name == "lora_alpha" and not value > 0:
                raise UserError(f"lora_alpha must be above 0, not {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if self.init_lora_weights == "true":
            object.__setattr__(self, "init_lora_weights", True)
        if self.bias not in ("none", "lora_only", "all"):
            raise UserError(f"bias must be 'none', 'lora_only' or 'all', not {self.bias!r}")
        if not self.target_modules:
            raise UserError("lora_target is empty; name layers such as q_proj,v_proj, or say all-linear")
        self._check_names()

    def _check_names(self) -> None:
        """Turn lists of names into tuples. Raises UserError for anything else."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            names, word = getattr(self, name), {"target_modules": "lora_target"}.get(name, name)
            if not isinstance(names, str):
                is_list = isinstance(names, (list, tuple, set))
                if not is_list or not all(isinstance(text, str) for text in names):
                    raise UserError(f"{word} must be text or a list of texts, not {names!r}")
                object.__setattr__(self, name, tuple(names))
        for name in ("layers_to_transform", "trainable_token_indices"):
            if isinstance(numbers := getattr(self, name), list):
                object.__setattr__(self, name, tuple(numbers))

    @property
    def scaling(self) -> float:
        """alpha / r, alpha / sqrt(r) for rsLoRA, 1 for VeRA, of the layers that no pattern names."""
        return self.scaling_of(self.r, self.lora_alpha)

    def scaling_of(self, r: int, alpha: float) -> float:
        return 1.0 if self.use_vera else alpha / (r**0.5 if self.use_rslora else r)

    @classmethod
    def preset(cls, name: str, **changes) -> "LoraConfig":
        """Return one of `PRESETS`, with `changes` to single fields."""
        if name not in PRESETS:
            raise UserError(f"preset {name!r} is not known{suggestion(name, PRESETS)}")
        return replace(PRESETS[name], **changes)


_ALL_SEVEN = (*_QKVO, "gate_proj", "up_proj", "down_proj")

PRESETS = {  # trainable parameters on Mistral-7B
    "minimal_r4_qv": LoraConfig(4, 8, 0.05, ("q_proj", "v_proj")),  # 1,703,936
    "standard_r8_qkvo": LoraConfig(8, 16, 0.05, _QKVO),  # 6,815,744
    "aggressive_r16_all": LoraConfig(16, 32, 0.05, _ALL_SEVEN),  # 41,943,040
    "high_capacity_r32_all": LoraConfig(32, 64, 0.05, _ALL_SEVEN),  # 83,886,080
}
