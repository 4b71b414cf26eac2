"""One line for people about a model's weights, its size, an adapter's layers, and an optimizer."""

import torch
from torch import nn

from minilora.adapted import TrainedCopy
from minilora.config import LoraConfig
from minilora.int8 import Int8Tensor
from minilora.linear import QuantizedLinear
from minilora.quantization import QuantizedTensor
from minilora.targets import OUTPUT_HEAD


def describe_weights(model: nn.Module) -> str:
    """How the linear layers of the decoder are stored, for people: 'nf4 with double quantization, 4.13 bits a
    weight, 3.3 GiB'.

    Only files of an author who quantized a part of the layers, or the output head too, give another choice of
    layers: then it says which.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, QuantizedLinear))}
    weights = {name: m.weight for name, m in layers.items() if isinstance(m, QuantizedLinear)}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not weights:
        return dtype
    bytes_ = sum(weight.nbytes for weight in weights.values())
    bits = 8 * bytes_ / sum(weight.shape.numel() for weight in weights.values())
    kinds = " and ".join(dict.fromkeys(map(_kind, weights.values())))
    size = f"{bits:.2f} bits a weight, {bytes_ / 2**20:,.1f} MiB"
    plain = [name.partition(".")[0] for name in layers if name not in weights]
    if plain == [OUTPUT_HEAD]:
        return f"{kinds}, {size}"
    others = f"; {dtype} in the other {len(plain)}" if plain else ""
    return f"{kinds} in {len(weights)} of {len(layers)} linear layers, as in the files, {size}{others}"


def _kind(weight: QuantizedTensor | Int8Tensor) -> str:
    if isinstance(weight, Int8Tensor):
        return "int8, a scale a row"
    return weight.quant_type + " with double quantization" * (weight.nested_absmax is not None)


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model has, those of quantized weights included, and originals of copies not."""
    copied = [m for m in model.modules() if isinstance(m, TrainedCopy) and m.applied in m.saved_weight]
    originals = {id(p): p.numel() for m in copied for p in m.plain_layer.parameters()}
    quantized = sum(m.weight.shape.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    return quantized + sum(p.numel() for p in model.parameters()) - sum(originals.values())


def describe_targets(lora: LoraConfig, between: str = " ") -> str:
    """Return what an adapter is on, the ranks of single layers, and what is trained whole."""
    targets = lora.target_modules
    text = targets if isinstance(targets, str) else between.join(targets)
    ranks = [f"{name} of r {r}" for name, r in lora.rank_pattern.items()]
    whole = [f"whole: {between.join(lora.modules_to_save)}"] if lora.modules_to_save else []
    return "; ".join([text, *ranks, *whole])


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
