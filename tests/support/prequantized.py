"""Model directories that transformers and bitsandbytes quantized, whole or in part."""

import pytest
import torch

from support.families import in_eval_mode, transformers_model

# Which layers stay unquantized. Names of layers, of a part of the model, or None: what transformers leaves by
# itself, the output head.
SKIPPED = {
    "the head": None,
    "nothing": [],
    # Among them some of the layers that share an input: k of q, k, v; up of gate, up.
    "some layers": [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.0.self_attn.o_proj",
        "k_proj",
        "0.mlp.up_proj",
    ],
}


def quantized_by_transformers(directory, bits: int = 4, skipped=None, family: str = "llama-gqa", **options):
    """Write a model in `directory`, quantized; return it as transformers computes with it.

    Widths are multiples of the block size: bitsandbytes 0.50's CPU kernel gives a block that spans two rows a
    wrong scale.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    base = directory.with_name(directory.name + "-unquantized")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=320)
    transformers_model(family, **sizes).save_pretrained(base)
    if bits == 4:
        options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) | options
    else:
        options = dict(load_in_8bit=True) | options
    quant = transformers.BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options)
    read_by_transformers(base, quantization_config=quant).save_pretrained(directory)
    return read_by_transformers(directory)


def read_by_transformers(directory, **options):
    """The model of a directory in transformers, in float32.

    bitsandbytes' layers stay in train(): there they multiply by the dequantized weight, on every CPU.
    """
    transformers = pytest.importorskip("transformers")
    options = dict(dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager") | options
    return in_eval_mode(transformers.AutoModelForCausalLM.from_pretrained(directory, **options))


def dequantized_by_bitsandbytes(theirs) -> dict[str, torch.Tensor]:
    """Full name -> float32 weight of each quantized layer, as bitsandbytes dequantizes it."""
    functional = pytest.importorskip("bitsandbytes").functional
    found = {}
    for name, layer in theirs.named_modules():
        if type(layer).__name__ == "Linear4bit":
            found[name] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        elif type(layer).__name__ == "Linear8bitLt":
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            found[name] = functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return found
