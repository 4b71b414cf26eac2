"""An adapter directory for the linter: its configuration, and the names, shapes and sizes of its tensors.

`adapter.read_adapter_config` refuses every adapter that this implementation cannot apply. An `AdapterHeader`
describes everything that PEFT can write, and `lint.py` judges it. Names and shapes stand in the header of the
safetensors file. But a single NaN makes an adapter worthless, so the numbers are read, too, one tensor at a
time. All that is kept of a tensor is one number, its largest sum of absolute values in a row.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
    tensor_key,
)
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.system.files import read_json
from minilora.system.patterns import match_names
from minilora.system.schema import shown

_RANK_DIMENSION = {A: 0, B: 1, EMBEDDING_A: 0, EMBEDDING_B: 1}  # of a part's shape
# The dimension of a part's shape that must equal a dimension of the base weight's, (out, in) or (V, D).
_WIDTHS = {A: (1, 1), B: (0, 0), MAGNITUDE: (0, 0), EMBEDDING_A: (1, 0), EMBEDDING_B: (0, 1)}

_OVERFLOW = torch.finfo(torch.float32).max ** 0.5
_NO_REAL_NUMBERS = ("C64", "F4", "F6_E2M3", "F6_E3M2")  # dtypes of safetensors that PyTorch cannot widen


def is_number(value: object) -> bool:
    """Whether a value from JSON is a float, NaN and infinities included, or can be one. `true` is not."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def is_rank(value: object) -> bool:
    """Whether a value from JSON is a whole number above 0 that PyTorch can take as a size."""
    return type(value) is int and 0 < value < 2**31


def is_texts(value: object) -> bool:
    """Whether a value from JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_object_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


# What all three programs read. A key may be absent or null, which `lint.py` judges.
_KINDS = {
    "r": ("a whole number above 0", is_rank),
    "lora_alpha": ("a number", is_number),
    "target_modules": ("text or a list of texts", lambda v: isinstance(v, str) or is_texts(v)),
    "modules_to_save": ("a list of texts", is_texts),
    "peft_type": ("text", lambda v: isinstance(v, str)),
    "bias": ("text", lambda v: isinstance(v, str)),
    "rank_pattern": ("an object of ranks", _is_object_of(is_rank)),
    "alpha_pattern": (
        "an object of numbers",
        lambda v: isinstance(v, dict) and all(map(is_number, v.values())),
    ),
}


class UnreadableAdapter(Exception):
    """An adapter directory that no program can read."""


@dataclass(frozen=True)
class BaseModel:
    """The modules and parameters of a base model, under the names that transformers gives them."""

    modules: list[str]
    parameters: dict[str, tuple[int, ...]]  # full name -> shape
    weights: dict[str, tuple[int, int]]  # linear layer or embedding -> shape of its weight

    @classmethod
    def from_config(cls, config: ModelConfig) -> "BaseModel":
        with torch.device("meta"):
            model = CausalLM(config)
        modules = [name for name, m in model.named_modules() if name and not isinstance(m, nn.Identity)]
        modules += ["model.rotary_emb", *(f"{m}.act_fn" for m in modules if m.endswith(".mlp"))]
        parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        adaptable = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
        return cls(modules, parameters, {name: parameters[f"{name}.weight"] for name in adaptable})


@dataclass
class AdapterHeader:
    """An adapter without its numbers, and the base model's names and shapes if that is known."""

    config: dict  # adapter_config.json, unchanged
    layers: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)  # layer -> part -> shape
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensors that are no part of an update
    sizes: dict[str, float] = field(default_factory=dict)  # tensor -> its largest row, see `_largest_row`
    base: BaseModel | None = None
    ranks: dict[str, int] = field(default_factory=dict)  # layer -> the rank that the configuration gives it
    alphas: dict[str, float] = field(default_factory=dict)  # layer -> its alpha

    @classmethod
    def read(cls, directory: Path, base_config: ModelConfig | None) -> "AdapterHeader":
        """Read an adapter directory. Raises UnreadableAdapter, or UserError for pickled weights."""
        try:
            config = read_json(directory / ADAPTER_CONFIG_FILE)
        except UserError as error:
            raise UnreadableAdapter(str(error)) from error
        _check_kinds(config)
        header = cls(config, base=None if base_config is None else BaseModel.from_config(base_config))
        for name, (shape, size) in _read_tensors(directory).items():
            layer, part = split_key(name) or ("", "")
            header.sizes[name] = size
            if part and len(shape) == (1 if part == MAGNITUDE else 2):
                header.layers.setdefault(layer, {})[part] = shape
            else:
                header.others[name] = shape
        header.ranks = header._by_layer("rank_pattern", header.get("r"))
        header.alphas = header._by_layer("alpha_pattern", header.get("lora_alpha"))
        targets = header.get("target_modules")
        header._matched("target_modules", [targets] if isinstance(targets, str) else [])
        return header

    def get(self, key: str):
        """The configuration's value for a key, or PEFT's default for it."""
        return self.config.get(key, PEFT_DEFAULTS.get(key))

    def _matched(self, key: str, patterns: list[str], whole: bool = True) -> list[list[str]]:
        """The layers that each pattern of a key matches. Raises UnreadableAdapter for a bad pattern."""
        try:
            return match_names(patterns, self._names, whole)
        except UserError as error:
            raise UnreadableAdapter(f"{key} in {ADAPTER_CONFIG_FILE}: {error}") from error

    @property
    def _names(self) -> list[str]:
        """All layers that a pattern may choose: the adapter's, and the base model's modules."""
        return list(dict.fromkeys([*self.layers, *(self.base.modules if self.base else [])]))

    def _by_layer(self, key: str, default: float | None) -> dict[str, float | None]:
        """Layer -> the value of the first pattern that ends its name, else the default."""
        patterns = self.get(key) or {}
        matched = self._matched(key, [rf"(.*\.)?({pattern})$" for pattern in patterns], whole=False)
        values = dict.fromkeys(self._names, default)
        for value, names in reversed(list(zip(patterns.values(), matched, strict=True))):
            values |= dict.fromkeys(names, value)
        return values

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(layer, part, shape) of every tensor that is part of a layer's update."""
        return [(layer, part, shape) for layer, parts in self.layers.items() for part, shape in parts.items()]

    def wrong_ranks(self) -> list[str]:
        """One sentence for each A or B whose rank is not the configuration's."""
        wrong = []
        for layer, part, shape in self.tensors():
            if part in _RANK_DIMENSION and shape[_RANK_DIMENSION[part]] != (rank := self.ranks[layer]):
                wrong.append(f"{layer}.{part} is {shape}, not of rank {rank}")
        return wrong

    def wrong_widths(self) -> list[str]:
        """One sentence for each tensor that does not fit its layer's weight. Empty without a base model."""
        wrong = []
        for layer, part, shape in self.tensors():
            mine, theirs = _WIDTHS[part]
            weight = self.base.weights.get(layer) if self.base else None
            if weight and shape[mine] != weight[theirs]:
                wrong.append(f"{layer}.{part} is {shape}, and the base model's weight {weight}")
        return wrong

    def halves(self) -> list[str]:
        """One sentence for each A without its B, and each B without its A."""
        return [
            f"{layer}.{PARTNERS[part]} is missing"
            for layer, parts in self.layers.items()
            for part in parts
            if part in PARTNERS and PARTNERS[part] not in parts
        ]

    def wrong_numbers(self) -> list[str]:
        """One sentence for each tensor with a NaN or an infinity, else for each update that overflows.

        The largest row of a product is at most the product of the largest rows. An input within 1 that is
        multiplied beyond the root of float32's maximum becomes infinite in the next RMSNorm, which squares.
        """
        wrong = [
            f"{name} is infinite or NaN in places"
            for name, size in self.sizes.items()
            if not math.isfinite(size)
        ]
        if wrong:
            return wrong
        for layer, parts in self.layers.items():
            bound = abs(self._scaling(layer))
            for part in PARTNERS.keys() & parts.keys():
                bound *= self.sizes[tensor_key(layer, part)]
            if not bound < _OVERFLOW:
                alpha = shown(self.alphas[layer])
                wrong.append(f"the update of {layer} is infinite or NaN, scaled by lora_alpha = {alpha}")
        return wrong

    def _scaling(self, layer: str) -> float:
        """alpha / r or, for rsLoRA, alpha / sqrt(r). Zero if one of them is null."""
        alpha, rank = self.alphas[layer], self.ranks[layer]
        if alpha is None or rank is None:
            return 0.0
        return alpha / (math.sqrt(rank) if self.get("use_rslora") else rank)


def _check_kinds(config: object) -> None:
    """Raise UnreadableAdapter for a configuration with a value of the wrong kind."""
    if not isinstance(config, dict):
        raise UnreadableAdapter(f"{ADAPTER_CONFIG_FILE} holds no JSON object")
    for key, (kind, fits) in _KINDS.items():
        if (value := config.get(key)) is not None and not fits(value):
            raise UnreadableAdapter(f"{key} = {shown(value)} in {ADAPTER_CONFIG_FILE} must be {kind}")


def _read_tensors(directory: Path) -> dict[str, tuple[tuple[int, ...], float]]:
    """Name -> shape and largest row of every tensor in the adapter's file."""
    path, pickled = directory / ADAPTER_WEIGHTS_FILE, directory / PICKLED_WEIGHTS_FILE
    if not path.is_file():
        if pickled.exists():
            raise UserError(f"{pickled} is pickled and never read; save the adapter again as safetensors")
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is missing")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if (dtype := file.get_slice(name).get_dtype()) in _NO_REAL_NUMBERS:
                    raise UnreadableAdapter(f"{name} in {ADAPTER_WEIGHTS_FILE} is of the dtype {dtype}")
                tensor = file.get_tensor(name)
                tensors[name] = tuple(tensor.shape), _largest_row(tensor)
    except SafetensorError as error:
        raise UnreadableAdapter(f"{ADAPTER_WEIGHTS_FILE} is truncated or corrupt: {error}") from error
    return tensors


def _largest_row(tensor: Tensor) -> float:
    """The largest sum of absolute values in a row, in float32. NaN if one value is; 0 if there are none."""
    return tensor.float().abs().sum(-1).max().item() if tensor.numel() else 0.0
