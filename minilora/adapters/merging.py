"""What an adapter makes of each parameter of its base model, one by one, without a model in memory.

    own weights     the parameter is replaced: modules_to_save, trained biases, a vocabulary that has grown
    update          W + scaling * B A, for DoRA the rows then scaled to their trained lengths. VeRA and starts
                    that took a part out of W are turned into A and B first (plain.py)
    trained rows    these rows are replaced last

A tied head stays tied as long as it and the embedding change alike. Else the merged model has a head of its
own, and its configuration says so. `lora.merge_lora` does the same to a model in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minilora.adapters.file import AdapterFile, is_base_weight
from minilora.adapters.peft_format import (
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_BIAS,
    MAGNITUDE,
    ROWS,
    WEIGHT,
    A,
)
from minilora.adapters.plain import plain_factors, shared_matrices
from minilora.adapters.vera_files import LAMBDA_D
from minilora.config import ModelConfig
from minilora.dora import row_factors
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.targets import EMBEDDING, OUTPUT_HEAD, ranks_and_alphas, rows_of

_EMBEDDING_WEIGHT, _HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{OUTPUT_HEAD}.weight"


@dataclass(frozen=True)
class Merging:
    """An adapter and the base model that it is merged into."""

    adapter: AdapterFile
    base: ModelConfig

    def __post_init__(self) -> None:
        if self.base.tie_word_embeddings:
            object.__setattr__(self, "adapter", self.adapter.on_tied_base())

    @cached_property
    def unties(self) -> bool:
        """Whether a tied head and the embedding change differently."""
        embedding, head = (self.adapter.modules.get(name, {}) for name in (EMBEDDING, OUTPUT_HEAD))
        if not self.base.tie_word_embeddings or _are_equal(embedding, head):  # PEFT may write one twice
            return False
        return bool(head) or any(part != ROWS for part in embedding)

    @cached_property
    def config(self) -> ModelConfig:
        """The merged model's configuration."""
        own = self.adapter.own(EMBEDDING)
        rows = len(own[WEIGHT]) if own else self.base.vocab_size
        tied = self.base.tie_word_embeddings and not self.unties
        return replace(self.base, vocab_size=rows, tie_word_embeddings=tied)

    def source(self, name: str) -> str:
        """The name under which the base model's files hold a parameter of the merged model."""
        return _EMBEDDING_WEIGHT if name == _HEAD_WEIGHT and self.base.tie_word_embeddings else name

    def changes(self, name: str) -> bool:
        """Whether merging changes a parameter of the merged model."""
        module, _, leaf = name.rpartition(".")
        parts = self.adapter.modules.get(module, {})
        return LORA_BIAS in parts or "bias" in self.adapter.own(module) if leaf == "bias" else bool(parts)

    def replaces(self, name: str) -> bool:
        """Whether the adapter holds the parameter itself, not an update of the base's."""
        module, _, leaf = name.rpartition(".")
        return leaf in self.adapter.own(module) and module not in self.adapter.layers

    @property
    def replaced(self) -> list[str]:
        """The names of the modules that the adapter holds whole."""
        return [module for module in self.adapter.modules if self.replaces(f"{module}.{WEIGHT}")]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError if the base model has no place for a bias. shapes: of its parameters."""
        for module, parts in self.adapter.modules.items():
            if LORA_BIAS in parts and f"{module}.bias" not in shapes:
                raise UserError(
                    f"{self.adapter.directory} adds a bias to {module} (lora_bias), where the base model has "
                    "none: use the adapter unmerged"
                )

    def merged(self, name: str, base: Tensor) -> Tensor:
        """The merged parameter, float32. base: the base model's, in any dtype."""
        module, _, leaf = name.rpartition(".")
        parts, own = self.adapter.modules.get(module, {}), self.adapter.own(module).get(leaf)
        value = base if own is None or is_base_weight(base, own) else own
        value = value.float()
        if leaf == "bias":
            return value + parts[LORA_BIAS].float() * self.scaling(module) if LORA_BIAS in parts else value
        if A in parts or LAMBDA_D in parts:
            scaling = self.scaling(module)
            narrow, wide = plain_factors(self.adapter, module, value, scaling, self.shared)
            value = value + (wide @ narrow) * scaling
        if EMBEDDING_A in parts:
            update = parts[EMBEDDING_B].float() @ parts[EMBEDDING_A].float()
            value = value + update.T * self.scaling(module)
        if MAGNITUDE in parts:
            value = value * row_factors(value, parts[MAGNITUDE].float())
        return self._with_rows(module, value)

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor] | None:
        """VeRA's shared A and B."""
        if not self.adapter.config.use_vera:
            return None
        with torch.device("meta"):
            layers = dict(CausalLM(self.base).named_modules())
        widths = {module: layers[module].in_features for module in self.adapter.modules}
        return shared_matrices(self.adapter, widths)

    def scaling(self, module: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) for rsLoRA."""
        return self.adapter.config.scaling_of(*self._ranks_and_alphas[module])

    @cached_property
    def _ranks_and_alphas(self) -> dict[str, tuple[int, float]]:
        return ranks_and_alphas(list(self.adapter.modules), self.adapter.config)

    def _with_rows(self, module: str, weight: Tensor) -> Tensor:
        values = self.adapter.modules.get(module, {}).get(ROWS)
        if values is None:
            return weight
        config = self.adapter.config
        rows = rows_of(module, config) or rows_of(EMBEDDING, config)  # of a tied head
        return weight.index_copy(0, torch.tensor(rows), values.float())


def _are_equal(parts: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    same = parts.keys() == others.keys() and all(
        part.shape == others[key].shape for key, part in parts.items()
    )
    return same and all(torch.equal(part, others[key]) for key, part in parts.items())
