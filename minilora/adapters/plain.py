"""Plain LoRA of an adapter's file, without a model, and the two files that every server reads.

`plain_factors` turns VeRA and starts that took a part out of W into A and B beside W. `write_plain_adapter`
takes scaling 1: alpha = r, no rsLoRA, one rank for all layers. So scripts write the results of arithmetic.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.file import AdapterFile, write_adapter
from minilora.adapters.peft_format import (
    PEFT_DEFAULTS,
    A,
    B,
    tensor_key,
)
from minilora.adapters.vera_files import LAMBDA_B, LAMBDA_D, check_projections
from minilora.initialize import initialize, takes_part_of_base
from minilora.vera import factors, shared_projections


def plain_factors(
    adapter: AdapterFile, module: str, W: Tensor, scaling: float, shared: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return a linear layer's A (r, in) and B (out, r), float32, with scaling * B A its whole update.

    W: (out, in), the base's. A start took a part out of it, so that r is doubled. shared: VeRA's A and B.
    """
    parts = adapter.modules[module]
    if adapter.config.use_vera:
        return factors(parts[LAMBDA_D], parts[LAMBDA_B], *shared, W.shape[1])
    narrow, wide, kind = parts[A].float(), parts[B].float(), adapter.config.init_lora_weights
    if not takes_part_of_base(kind):
        return narrow, wide
    A0, B0, _ = initialize(kind, W.float(), len(narrow), scaling)
    return torch.cat([narrow, A0]), torch.cat([wide, -B0], dim=1)


def shared_matrices(adapter: AdapterFile, in_features: Mapping[str, int]) -> tuple[Tensor, Tensor] | None:
    """Return VeRA's A and B, of the file or of its seed; None for other adapters. in_features: of each layer.

    Raises UserError if they are too small for a layer.
    """
    if not (config := adapter.config).use_vera:
        return None
    widest_in = max(in_features[module] for module in adapter.modules)
    widest_out = max(len(parts[LAMBDA_B]) for parts in adapter.modules.values())
    drawn = config.r, widest_in, widest_out, config.projection_prng_key
    A, B = adapter.shared or shared_projections(*drawn)
    check_projections(A, B, widest_in, widest_out)
    return A, B


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
    write_adapter(directory, raw, tensors)
