"""Factors by layer, without a model, as the two files of a plain LoRA adapter, which every server reads.

The scaling is 1: alpha = r, no rsLoRA, one rank for all layers. So scripts write the results of arithmetic.
"""

import json
from pathlib import Path

import safetensors.torch
from torch import Tensor

from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    PEFT_DEFAULTS,
    A,
    B,
    tensor_key,
)
from minilora.system.files import write_whole


def write_plain_adapter(
    directory: Path,
    layers: dict[str, tuple[Tensor, Tensor]],  # full name -> A (r, in), B (out, r)
    target_modules: list[str],
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter that adds B A to each layer's weight.

    target_modules: names, or ends of names, that choose these layers and no others.
    """
    r = len(next(iter(layers.values()))[0])
    raw = PEFT_DEFAULTS | dict(
        r=r,
        lora_alpha=r,
        target_modules=sorted(target_modules),
        base_model_name_or_path=base_model_name_or_path,
    )
    tensors = {
        tensor_key(layer, part): factor.float().cpu().contiguous()
        for layer, factors in layers.items()
        for part, factor in zip((A, B), factors, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")
