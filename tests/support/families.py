"""Tiny random models of every family, in transformers and here, with the same weights."""

import pytest
import torch

from minilora import CausalLM
from minilora.formats.config_json import parse_config

_SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500000.0,
)

_YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10000.0)

FAMILIES = {
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-gqa": ("Llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama3-rope": ("Llama", dict(num_key_value_heads=2, rope_parameters=_LLAMA3_ROPE)),
    "llama-linear-rope": (
        "Llama",
        dict(num_key_value_heads=1, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    ),
    "mistral-window": ("Mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "qwen2-bias-tied": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2-some-windows": (
        "Qwen2",
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3-qk-norm": ("Qwen3", dict(num_key_value_heads=2, head_dim=20)),
    "llama-yarn": (
        "Llama",
        dict(
            num_key_value_heads=2,
            rope_parameters=_YARN_ROPE | dict(mscale=1.5, mscale_all_dim=0.5),
        ),
    ),
    "qwen3-yarn": ("Qwen3", dict(num_key_value_heads=2, head_dim=20, rope_parameters=_YARN_ROPE)),
    "ministral-some-windows": (
        "Ministral",
        dict(
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "smollm3-no-rope": ("SmolLM3", dict(num_key_value_heads=2, num_hidden_layers=4, pad_token_id=None)),
}


def transformers_model(family: str, seed: int = 0, **sizes):
    """A transformers model in float32 whose every parameter, biases and norms included, is random."""
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, name + "Config")(
        **_SMALL | changes | sizes, eos_token_id=None, bos_token_id=None
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, name + "ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def transformers_in_4_bits(directory, quant_type: str = "nf4", double_quant: bool = True):
    """The model of a directory in transformers, with bitsandbytes' 4-bit layers, computing in float32."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    quant = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    how = dict(dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return in_eval_mode(load(directory, quantization_config=quant, **how))


def in_eval_mode(theirs):
    """The same model in eval(), apart from bitsandbytes' own layers, which stay in train().

    On a CPU with AVX512_BF16 such a layer, in eval(), packs its weight anew at the first forward, and from
    then on multiplies in bfloat16, without a gradient (docs/parity.md). It has no dropout.
    """
    theirs.eval()
    for layer in theirs.modules():
        if type(layer).__module__.startswith("bitsandbytes."):
            layer.train()
    return theirs


def config_dict(theirs) -> dict:
    """What transformers writes into config.json, with the fields that only save_pretrained fills in."""
    return theirs.config.to_dict() | {"architectures": [type(theirs).__name__], "dtype": "float32"}


def same_model_here(theirs) -> CausalLM:
    """Our model with the weights of a transformers model."""
    ours = CausalLM(parse_config(config_dict(theirs))).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
