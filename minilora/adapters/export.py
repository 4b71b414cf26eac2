"""Any adapter as the plainest LoRA that means the same: one rank, one alpha, names of layers.

PEFT knows ranks and alphas by layer, rsLoRA, regular expressions, chosen layers. Not every server does; each
of them knows alpha / r for all layers. The same update in these terms:

    ranks      the largest for all: A gets rows of zeros, B columns of zeros       exact
    rsLoRA     alpha' = alpha sqrt(r)                                              exact
    alphas     one scaling s for all: a layer whose own is s' gets B s' / s        rounded once, to float32
    layers     leaf names, if these chose them before, else full names             exact

DoRA's magnitudes, trained copies, rows and biases are no low-rank updates. They are refused by name, and so
is PEFT's PiSSA or OLoRA adapter, whose start only W can tell. (`load_adapter` and `save_adapter` convert it.)
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from minilora.adapters.checks import left_out
from minilora.adapters.file import AdapterFile
from minilora.adapters.peft_format import (
    BASE_WEIGHT,
    EMBEDDING_A,
    EMBEDDING_B,
    PARTNERS,
    PEFT_DEFAULTS,
    A,
    B,
    tensor_key,
)
from minilora.config import LoraConfig
from minilora.initialize import takes_part_of_base
from minilora.system.errors import UserError
from minilora.targets import matching_names, ranks_and_alphas

_NONE = "exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices".split()


@dataclass(frozen=True)
class PlainAdapter:
    """The two files of a plain adapter, and what changed."""

    config: dict  # for adapter_config.json
    tensors: dict[str, Tensor]  # by key
    rounded: list[str]  # layers whose B was multiplied by a factor that is no power of two
    scaling: float


def not_plain(adapter: AdapterFile) -> list[str]:
    """The tensors that plain LoRA cannot express."""
    plain = {*PARTNERS, BASE_WEIGHT}
    return [
        tensor_key(m, part) for m, parts in adapter.modules.items() for part in parts if part not in plain
    ]


def is_exportable(adapter: AdapterFile) -> bool:
    """Whether plain LoRA can express an adapter."""
    config = adapter.config
    return not (not_plain(adapter) or config.use_dora or takes_part_of_base(config.init_lora_weights))


def _why_not(adapter: AdapterFile) -> str:
    """Why plain LoRA cannot express an adapter."""
    config = adapter.config
    if takes_part_of_base(config.init_lora_weights):
        return f"took a part out of its base model (init_lora_weights = {config.init_lora_weights!r})"
    what = "is a DoRA adapter" if config.use_dora else f"holds {not_plain(adapter)[0]}"
    return f"{what}, which plain LoRA cannot express"


def as_plain(adapter: AdapterFile, raw: dict) -> PlainAdapter:
    """Return the adapter as plain LoRA. raw: its `adapter_config.json`.

    Raises UserError if plain LoRA cannot express it.
    """
    if not is_exportable(adapter):
        raise UserError(f"{adapter.directory} {_why_not(adapter)}: merge it, with --output")
    if problems := left_out(adapter):
        keys = "exclude_modules or layers_to_transform"
        raise UserError(f"{adapter.directory} contradicts itself: {problems[0]}, {keys}")
    layers = ranks_and_alphas(adapter.layers, adapter.config)
    r = max(rank for rank, _ in layers.values())
    alpha = _alpha(adapter.config, r, *Counter(layers.values()).most_common(1)[0][0])
    tensors, rounded = {}, []
    for module, parts in adapter.modules.items():
        ratio = _alpha(adapter.config, r, *layers[module]) / alpha
        if math.frexp(ratio)[0] != 0.5:  # no power of two
            rounded.append(module)
        for part, tensor in parts.items():
            tensors[tensor_key(module, part)] = _plain_part(module, part, tensor, r, ratio)
    changes = dict(r=r, lora_alpha=_whole(alpha), target_modules=_targets(adapter), use_rslora=False)
    changes |= dict(rank_pattern={}, alpha_pattern={}, bias="none", lora_bias=False)
    return PlainAdapter(PEFT_DEFAULTS | raw | changes | dict.fromkeys(_NONE), tensors, rounded, alpha / r)


def _alpha(config: LoraConfig, r: int, rank: int, alpha: float) -> float:
    """The alpha' with which plain LoRA of rank r scales as a layer of another rank does: alpha' / r."""
    return alpha * (rank**0.5 if config.use_rslora else 1) * (r / rank)


def _plain_part(module: str, part: str, tensor: Tensor, r: int, ratio: float) -> Tensor:
    """A part of an update of rank r. B takes the ratio of the alphas, in float32 if it is not 1."""
    if part in (B, EMBEDDING_B):
        tensor = tensor if ratio == 1 else (tensor.double() * ratio).float()  # rounded once
        if not tensor.isfinite().all():
            raise UserError(f"{module} overflows float32, scaled to the alpha of the other layers")
        return F.pad(tensor, (0, r - tensor.shape[1])).contiguous()
    if part in (A, EMBEDDING_A):
        return F.pad(tensor, (0, 0, 0, r - tensor.shape[0])).contiguous()
    return tensor


def _targets(adapter: AdapterFile) -> list[str]:
    """Names that choose the adapter's layers and, in the base model of training, no others."""
    config = adapter.config
    narrowed = config.exclude_modules or config.layers_to_transform or config.layers_to_transform == 0
    if isinstance(config.target_modules, str) or narrowed:
        return adapter.layers
    return [name for name in config.target_modules if matching_names(adapter.layers, [name])]


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
