"""What an adapter directory says of itself: its configuration, and the names and shapes of its tensors.

The header of a safetensors file is a table of a few kilobytes, so no tensor is read. Unlike
`adapter.read_adapter_config`, which refuses what this implementation does not do, everything that PEFT can
write is described here: `lint.py` judges it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minilora.config import ModelConfig
from minilora.formats.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PEFT_DEFAULTS
from minilora.lora import OUTPUT_HEAD
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.system.files import read_json

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
PARTNERS = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}

_KEY = re.compile(rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, [*PARTNERS, MAGNITUDE]))})")
_TYPES = {
    "r": int,
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "modules_to_save": list,
    "peft_type": str,
}
_TYPES |= {"rank_pattern": dict, "alpha_pattern": dict, "bias": str}


class UnreadableAdapter(Exception):
    """An adapter directory that no program can read."""


@dataclass
class AdapterHeader:
    """An adapter without its numbers, and, if the base model is known, the layers that it is for."""

    config: dict  # adapter_config.json as it is
    layers: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # layer -> A, B, ... -> shape
    others: list[str] = field(
        default_factory=list
    )  # full names of tensors that are no part of a layer's update
    base: dict[str, tuple[int, int]] | None = None  # layer of the base model -> shape of its weight

    @classmethod
    def read(cls, directory: Path, base_config: ModelConfig | None) -> "AdapterHeader":
        """Raises UnreadableAdapter, or UserError for pickled weights."""
        try:
            config = read_json(directory / ADAPTER_CONFIG_FILE)
        except UserError as error:
            raise UnreadableAdapter(str(error)) from error
        _check_types(config)
        header = cls(config)
        for name, shape in _read_shapes(directory).items():
            match = _KEY.fullmatch(name)
            if match and len(shape) == (1 if match[2] == MAGNITUDE else 2):
                header.layers.setdefault(match[1], {})[match[2]] = shape
            else:
                header.others.append(name)
        if base_config is not None:
            with torch.device("meta"):
                modules = CausalLM(base_config).named_modules()
            header.base = {
                name: tuple(m.weight.shape) for name, m in modules if isinstance(m, (nn.Linear, nn.Embedding))
            }
        return header

    def get(self, key: str):
        """A key of the configuration, or PEFT's default for it."""
        return self.config.get(key, PEFT_DEFAULTS.get(key))

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(layer, part, shape) of everything that is part of a layer's update."""
        return [(layer, part, shape) for layer, parts in self.layers.items() for part, shape in parts.items()]

    def rank(self, layer: str) -> int:
        """The rank that PEFT gives a layer: of the first pattern that ends its name, else `r`."""
        patterns = (self.get("rank_pattern") or {}).items()
        return next((rank for key, rank in patterns if re.match(rf"(.*\.)?({key})$", layer)), self.get("r"))

    def wrong_ranks(self) -> list[str]:
        """Factors that are not of the rank that the configuration says."""
        at = {A: 0, B: 1, EMBEDDING_A: 0, EMBEDDING_B: 1}
        factors = [
            (layer, part, shape, self.rank(layer)) for layer, part, shape in self.tensors() if part in at
        ]
        return [
            f"{layer}.{part} is {shape}, not of rank {r}"
            for layer, part, shape, r in factors
            if shape[at[part]] != r
        ]

    def wrong_widths(self) -> list[str]:
        """Factors that do not fit the weight (out, in) of their layer, or (V, D) of an embedding; none if no
        layer is known.
        """
        sides = {
            A: (1, 1),
            B: (0, 0),
            MAGNITUDE: (0, 0),
            EMBEDDING_A: (1, 0),
            EMBEDDING_B: (0, 1),
        }  # of the factor, of the weight
        wrong = []
        for layer, part, shape in self.tensors():
            mine, theirs = sides[part]
            if self.base and layer in self.base and shape[mine] != self.base[layer][theirs]:
                wrong.append(f"{layer}.{part} is {shape}, and the base model's weight {self.base[layer]}")
        return wrong

    def halves(self) -> list[str]:
        """What lacks its partner: an A without its B, or the other way round."""
        partners = [(layer, PARTNERS[part]) for layer, part, _ in self.tensors() if part in PARTNERS]
        return [
            f"{layer}.{partner} is missing"
            for layer, partner in partners
            if partner not in self.layers[layer]
        ]

    def targets(self) -> list[str] | None:
        """The base model's layers that PEFT adapts, by its rules for `target_modules`. None if that cannot be
        known from here.
        """
        wanted = self.get("target_modules")
        narrowed = ("exclude_modules", "layers_to_transform", "layer_replication", "target_parameters")
        if self.base is None or wanted is None or any(map(self.get, narrowed)):
            return None
        if wanted in ("all-linear", "all"):
            return [name for name in self.base if name not in (OUTPUT_HEAD, "model.embed_tokens")]
        if isinstance(wanted, str):
            return [name for name in self.base if re.fullmatch(wanted, name)]
        return [
            name
            for name in self.base
            if any(name == target or name.endswith(f".{target}") for target in wanted)
        ]


def _check_types(config: object) -> None:
    """Raises UnreadableAdapter for a configuration with values that no program could take."""
    if not isinstance(config, dict):
        raise UnreadableAdapter(f"{ADAPTER_CONFIG_FILE} holds no JSON object")
    for key, kind in _TYPES.items():
        if (value := config.get(key)) is not None and not isinstance(value, kind):
            raise UnreadableAdapter(f"{key} = {value!r} in {ADAPTER_CONFIG_FILE} is of the wrong type")
    patterns = config.get("rank_pattern") or {}
    for rank in [*patterns.values(), *([] if config.get("r") is None else [config["r"]])]:
        if not isinstance(rank, int) or rank < 1:
            raise UnreadableAdapter(f"{rank!r} in {ADAPTER_CONFIG_FILE} is no rank")
    for pattern in [
        *patterns,
        *([targets] if isinstance(targets := config.get("target_modules"), str) else []),
    ]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UnreadableAdapter(
                f"{pattern!r} in {ADAPTER_CONFIG_FILE} is not a regular expression: {error}"
            ) from error


def _read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    if not (path := directory / ADAPTER_WEIGHTS_FILE).is_file():
        if (pickled := directory / "adapter_model.bin").exists():
            raise UserError(
                f"{pickled} is pickled and never opened here; save the adapter again as safetensors"
            )
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is truncated or corrupt: {error}") from error
