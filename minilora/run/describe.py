"""One line for people about a model's weights, its size, and an optimizer."""

import torch
from torch import nn

from minilora.linear import QuantizedLinear
from minilora.quantization import QuantizedTensor


def describe_weights(model: nn.Module) -> str:
    """How the linear layers of the decoder are stored, for people: 'nf4 with double quantization, 4.13 bits a
    weight, 3.3 GiB'.
    """
    quantized = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not quantized:
        return str(next(model.parameters()).dtype).removeprefix("torch.")
    bytes_ = sum(weight.nbytes for weight in quantized)
    bits = 8 * bytes_ / sum(weight.shape.numel() for weight in quantized)
    kind = "int8, a scale a row"
    if isinstance(quantized[0], QuantizedTensor):
        kind = quantized[0].quant_type + (
            " with double quantization" if quantized[0].nested_absmax is not None else ""
        )
    return f"{kind}, {bits:.2f} bits a weight, {bytes_ / 2**20:,.1f} MiB"


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model has, those of quantized weights included."""
    quantized = sum(m.weight.shape.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    return quantized + sum(p.numel() for p in model.parameters())


def describe_optimizer(name: str, device: torch.device, loraplus_lr_ratio: float | None = None) -> str:
    """What `make_optimizer` makes of a name on a device, in one line."""
    line = {
        "adamw_torch": "AdamW with 32-bit moments",
        "adamw_8bit": "AdamW with 8-bit moments",
        "adamw_bnb_8bit": "bitsandbytes' AdamW with 8-bit moments",
        "paged_adamw_8bit": "bitsandbytes' AdamW with 8-bit moments, paged to main memory for tensors of "
        "100,000 elements and more",
    }[name]
    if name == "paged_adamw_8bit" and device.type != "cuda":
        line = (
            f"bitsandbytes' AdamW with 8-bit moments, not paged: paging is CUDA's, and this is {device.type}"
        )
    return line + (f"; B learns at {loraplus_lr_ratio:g} times the rate (LoRA+)" if loraplus_lr_ratio else "")
