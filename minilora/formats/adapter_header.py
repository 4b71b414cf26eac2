"""The header of an adapter directory: its configuration, and the names and shapes of its tensors.

The header of a safetensors file is a table of a few kilobytes, so no tensor is read.
`adapter.read_adapter_config` refuses every adapter that this implementation cannot apply. An `AdapterHeader`
describes everything that PEFT can write, and `lint.py` judges it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minilora.config import ModelConfig
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    PARTNERS,
    PEFT_DEFAULTS,
    PICKLED_WEIGHTS_FILE,
    A,
    B,
    split_key,
)
from minilora.lora import OUTPUT_HEAD, matching_names
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.system.files import read_json

_RANK_DIMENSION = {A: 0, B: 1, EMBEDDING_A: 0, EMBEDDING_B: 1}  # of a part's shape
# The dimension of a part's shape that must equal a dimension of the base weight's, (out, in) or (V, D).
_WIDTHS = {A: (1, 1), B: (0, 0), MAGNITUDE: (0, 0), EMBEDDING_A: (1, 0), EMBEDDING_B: (0, 1)}

_NARROWING_KEYS = ("exclude_modules", "layers_to_transform", "layer_replication", "target_parameters")
_TYPES = {
    "r": int,
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "modules_to_save": list,
    "peft_type": str,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "bias": str,
}


class UnreadableAdapter(Exception):
    """An adapter directory that no program can read."""


@dataclass
class AdapterHeader:
    """An adapter without its numbers, and the shapes of the base model's weights if that is known."""

    config: dict  # adapter_config.json, unchanged
    layers: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # layer -> part -> shape
    others: list[str] = field(default_factory=list)  # names of the tensors that are no part of an update
    base: dict[str, tuple[int, int]] | None = None  # layer of the base model -> shape of its weight

    @classmethod
    def read(cls, directory: Path, base_config: ModelConfig | None) -> "AdapterHeader":
        """Read an adapter directory. Raises UnreadableAdapter, or UserError for pickled weights."""
        try:
            config = read_json(directory / ADAPTER_CONFIG_FILE)
        except UserError as error:
            raise UnreadableAdapter(str(error)) from error
        _check_types(config)
        _check_ranks(config)
        _check_patterns(config)
        header = cls(config, base=None if base_config is None else _base_shapes(base_config))
        for name, shape in _read_shapes(directory).items():
            layer, part = split_key(name) or ("", "")
            if part and len(shape) == (1 if part == MAGNITUDE else 2):
                header.layers.setdefault(layer, {})[part] = shape
            else:
                header.others.append(name)
        return header

    def get(self, key: str):
        """The configuration's value for a key, or PEFT's default for it."""
        return self.config.get(key, PEFT_DEFAULTS.get(key))

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(layer, part, shape) of every tensor that is part of a layer's update."""
        return [(layer, part, shape) for layer, parts in self.layers.items() for part, shape in parts.items()]

    def rank(self, layer: str) -> int:
        """The rank that PEFT gives a layer: of the first pattern that ends its name, else `r`."""
        patterns = (self.get("rank_pattern") or {}).items()
        return next((rank for key, rank in patterns if re.match(rf"(.*\.)?({key})$", layer)), self.get("r"))

    def wrong_ranks(self) -> list[str]:
        """One sentence for each A or B whose rank is not the configuration's."""
        wrong = []
        for layer, part, shape in self.tensors():
            if part in _RANK_DIMENSION and shape[_RANK_DIMENSION[part]] != (rank := self.rank(layer)):
                wrong.append(f"{layer}.{part} is {shape}, not of rank {rank}")
        return wrong

    def wrong_widths(self) -> list[str]:
        """One sentence for each tensor that does not fit its layer's weight. Empty without a base model."""
        wrong = []
        for layer, part, shape in self.tensors():
            mine, theirs = _WIDTHS[part]
            if self.base and layer in self.base and shape[mine] != self.base[layer][theirs]:
                wrong.append(f"{layer}.{part} is {shape}, and the base model's weight {self.base[layer]}")
        return wrong

    def halves(self) -> list[str]:
        """One sentence for each A without its B, and each B without its A."""
        return [
            f"{layer}.{PARTNERS[part]} is missing"
            for layer, parts in self.layers.items()
            for part in parts
            if part in PARTNERS and PARTNERS[part] not in parts
        ]

    def targets(self) -> list[str] | None:
        """The base model's layers that PEFT adapts, by its rules for `target_modules`.

        None if the base model is unknown, or if other keys narrow the choice.
        """
        target_modules = self.get("target_modules")
        if self.base is None or target_modules is None or any(map(self.get, _NARROWING_KEYS)):
            return None
        if target_modules in ("all-linear", "all"):
            return [name for name in self.base if name not in (OUTPUT_HEAD, "model.embed_tokens")]
        return matching_names(self.base, target_modules)


def _check_types(config: object) -> None:
    """Raise UnreadableAdapter for a configuration with a value of the wrong type."""
    if not isinstance(config, dict):
        raise UnreadableAdapter(f"{ADAPTER_CONFIG_FILE} holds no JSON object")
    for key, allowed in _TYPES.items():
        if (value := config.get(key)) is not None and not isinstance(value, allowed):
            raise UnreadableAdapter(f"{key} = {value!r} in {ADAPTER_CONFIG_FILE} is of the wrong type")


def _check_ranks(config: dict) -> None:
    ranks = list((config.get("rank_pattern") or {}).values())
    if config.get("r") is not None:
        ranks.append(config["r"])
    for rank in ranks:
        if not isinstance(rank, int) or rank < 1:
            raise UnreadableAdapter(f"{rank!r} in {ADAPTER_CONFIG_FILE} is no rank")


def _check_patterns(config: dict) -> None:
    patterns = list(config.get("rank_pattern") or {})
    if isinstance(config.get("target_modules"), str):
        patterns.append(config["target_modules"])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f"{pattern!r} in {ADAPTER_CONFIG_FILE} is not a regular expression: {error}"
            raise UnreadableAdapter(problem) from error


def _read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the adapter's file."""
    path, pickled = directory / ADAPTER_WEIGHTS_FILE, directory / PICKLED_WEIGHTS_FILE
    if not path.is_file():
        if pickled.exists():
            raise UserError(f"{pickled} is pickled and never read; save the adapter again as safetensors")
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is truncated or corrupt: {error}") from error


def _base_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Full name -> shape of the weight, of every linear layer and of the embedding."""
    with torch.device("meta"):
        model = CausalLM(config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    return {name: tuple(layer.weight.shape) for name, layer in layers.items()}
