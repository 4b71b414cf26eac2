"""An adapter directory for the linter: its configuration, and the names, shapes and sizes of its tensors.

The reader refuses every adapter that this implementation cannot apply. An `AdapterHeader` describes all that
PEFT can write, and `lint.py` judges it. Its `AdapterFile` holds tensors on the meta device, and
`checks.py` compares them with the configuration, as for the reader. But a single NaN makes an adapter
worthless, so the numbers are read, too, one tensor at a time. All that is kept of a tensor is one number, its
largest sum of absolute values in a row.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.adapters.checks import (
    Problem,
    left_out,
    problems_alone,
    problems_on,
    without_moot_ones,
)
from minilora.adapters.file import OWN_WEIGHTS, AdapterFile, parse_adapter_config, stored_tensors
from minilora.adapters.merging import Merging
from minilora.adapters.peft_format import (
    ADAPTER_CONFIG_FILE,
    LORA_BIAS,
    PARTNERS,
    PEFT_DEFAULTS,
    split_key,
    tensor_key,
)
from minilora.adapters.peft_rules import lora_config, refused_by_all
from minilora.config import ModelConfig
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.system.schema import read_object, shown, shown_name
from minilora.targets import EMBEDDING, OUTPUT_HEAD, ranks_and_alphas
from minilora.wrapping import base_layers

_OVERFLOW = torch.finfo(torch.float32).max ** 0.5


@dataclass
class AdapterHeader:
    """An adapter without its numbers, and the base model without memory, if it is known."""

    config: dict  # adapter_config.json, unchanged
    file: AdapterFile  # tensors on the meta device
    sizes: dict[str, float]  # key of a tensor in the file -> its largest row, see `_largest_row`
    base: CausalLM | None  # on the meta device
    problems: list[Problem]
    ranks_and_alphas: dict[str, tuple[int, float]]  # of each layer, as the configuration gives them

    @classmethod
    def read(cls, directory: Path, base_config: ModelConfig | None) -> "AdapterHeader":
        """Read an adapter directory. Raises UserError for one that no program can read."""
        raw = read_object(directory / ADAPTER_CONFIG_FILE)
        if wrong := refused_by_all(raw):
            raise UserError(f"{wrong[0]} in {ADAPTER_CONFIG_FILE}")
        tensors, sizes = {}, {}
        for key, tensor in stored_tensors(directory):
            tensors[key], sizes[key] = tensor.to("meta"), _largest_row(tensor)
        file = AdapterFile.of(directory, lora_config(raw), tensors.items())
        with torch.device("meta"):
            base = None if base_config is None else CausalLM(base_config)
        problems = problems_alone(file) + (left_out(file) if base is None else problems_on(base, file))
        ranks = ranks_and_alphas(file.layers, file.config)
        return cls(raw, file, sizes, base, without_moot_ones(problems), ranks)

    def get(self, key: str):
        """The configuration's value for a key, or PEFT's default for it."""
        return self.config.get(key, PEFT_DEFAULTS.get(key))

    def of_kind(self, *kinds: str) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind in kinds]

    def absent(self, *keys: str) -> list[str]:
        """Those of the keys that are missing or null."""
        return [key for key in keys if self.config.get(key) is None]

    @cached_property
    def modules(self) -> tuple[list[str], list[str]]:
        """The names that PEFT matches target_modules with, and those of them that can have an update."""
        if self.base is None:
            return self.file.layers, self.file.layers
        layers = {name: module for name, module in base_layers(self.base).items() if name}
        weights = [n for n, m in layers.items() if isinstance(m, (nn.Linear, nn.Embedding))]
        activations = [f"{name}.act_fn" for name in layers if name.endswith(".mlp")]
        return [*layers, "model.rotary_emb", *activations], weights

    def other_vocabulary(self) -> list[str]:
        """One sentence for each embedding or head in the file that has not as many rows as the base's."""
        wrong = []
        for module in (EMBEDDING, OUTPUT_HEAD) if self.base else ():
            rows = self.base.config.vocab_size
            for part, tensor in self.file.modules.get(module, {}).items():
                if part in OWN_WEIGHTS and tensor.dim() == 2 and len(tensor) != rows:
                    key = tensor_key(module, part)
                    wrong.append(f"{key} has {len(tensor)} rows, and the base model's {rows}")
        return wrong

    @cached_property
    def is_taken_here(self) -> bool:
        """Whether this implementation applies the adapter, as far as is known: `load_adapter` takes it."""
        try:
            parse_adapter_config(self.config)
        except UserError:
            return False
        tensors = [tensor for parts in self.file.modules.values() for tensor in parts.values()]
        are_numbers = all(tensor.is_floating_point() for tensor in tensors) and not self.wrong_numbers
        return bool(tensors) and are_numbers and not self.problems

    @cached_property
    def can_be_merged(self) -> bool:
        """Whether scripts/merge.py takes the adapter, as far as is known."""
        if self.base is None:
            return self.is_taken_here and not any(LORA_BIAS in parts for parts in self.file.modules.values())
        shapes = {name: tuple(p.shape) for name, p in self.base.named_parameters()}
        try:
            Merging(self.file, self.base.config).check(shapes)
        except UserError:
            return False
        return self.is_taken_here

    @cached_property
    def wrong_numbers(self) -> list[str]:
        """One sentence for each tensor with a NaN or an infinity, else for each update that overflows.

        The largest row of a product is at most the product of the largest rows. An input within 1 that is
        multiplied beyond the root of float32's maximum becomes infinite in the next RMSNorm, which squares.
        """
        wrong = [
            f"{shown_name(key)} is infinite or NaN in places"
            for key, size in self.sizes.items()
            if not math.isfinite(size)
        ]
        bounds = {
            layer: abs(self.file.config.scaling_of(rank, alpha))
            for layer, (rank, alpha) in self.ranks_and_alphas.items()
        }
        for key, size in self.sizes.items():
            layer, part = split_key(key) or ("", "")
            if layer in bounds and part in PARTNERS:
                bounds[layer] *= size
        return wrong or [
            f"the update of {layer} is infinite or NaN, scaled by lora_alpha = {shown(alpha)}"
            for layer, (_, alpha) in self.ranks_and_alphas.items()
            if not bounds[layer] < _OVERFLOW
        ]


def _largest_row(tensor: Tensor) -> float:
    """The largest sum of absolute values in a row, in float32. NaN if one value is; 0 if there are none."""
    return tensor.float().abs().sum(-1).max().item() if tensor.numel() else 0.0
