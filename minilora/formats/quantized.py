"""Quantized weights of either kind: how each is made, stored in files, and announced to other programs.

bnb.py and bnb_int8.py know the entries of a weight in 4 and in 8 bits. Here they meet, so that nobody else
needs to ask which of the two a weight is.
"""

from collections.abc import Container

from torch import Tensor, nn

from minilora.config import QuantConfig
from minilora.formats.bnb import to_bitsandbytes
from minilora.formats.bnb_int8 import to_bitsandbytes_int8
from minilora.int8 import Int8Tensor, quantize_int8
from minilora.linear import Linear4bit, Linear8bit, QuantizedLinear
from minilora.quantization import QuantizedTensor, quantize_4bit

QuantizedWeight = QuantizedTensor | Int8Tensor


def quantize(weight: Tensor, quant: QuantConfig) -> QuantizedWeight:
    """The weight as `quant` asks for it. Raises UserError for one that cannot be quantized."""
    if quant.bits == 8:
        return quantize_int8(weight)
    return quantize_4bit(weight, quant.quant_type, quant.blocksize, quant.double_quant)


def quant_config_of(weight: QuantizedWeight) -> QuantConfig:
    """How a weight is quantized: `quantize` with it gives a weight of the same kind."""
    if isinstance(weight, Int8Tensor):
        return QuantConfig(8)
    return QuantConfig(4, weight.quant_type, weight.nested_absmax is not None, weight.blocksize)


def quantized_layer(weight: QuantizedWeight, bias: nn.Parameter | None) -> QuantizedLinear:
    """The linear layer with this weight, (out, in), and bias, (out,)."""
    return Linear8bit(weight, bias) if isinstance(weight, Int8Tensor) else Linear4bit(weight, bias)


def to_entries(weight: QuantizedWeight, name: str) -> dict[str, Tensor]:
    """The entries of a state dict that hold a quantized weight called `name`."""
    if isinstance(weight, Int8Tensor):
        return to_bitsandbytes_int8(weight, name)
    return to_bitsandbytes(weight, name)


def plain_layers(model: nn.Module, quantized: Container[str] = ()) -> list[str]:
    """Full names of the linear layers whose weights are not quantized, and not named in `quantized`."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return [name for name in names if f"{name}.weight" not in quantized]


def bitsandbytes_config(quant: QuantConfig, skipped: list[str], compute_dtype: str) -> dict:
    """The `quantization_config` that tells transformers how the files hold weights.

    skipped: full names of the linear layers that are not quantized. transformers makes a quantized layer of
    every other one, the output head included.
    """
    config = {"quant_method": "bitsandbytes", f"load_in_{quant.bits}bit": True}
    config["llm_int8_skip_modules"] = skipped  # so called for 4 bits, too
    if quant.bits == 4:
        config |= {
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
    return config
