"""What an adapter may change beside linear layers: the embedding, whole modules, single rows.

    LoraEmbedding   e = W[ids] + scaling * A^T[ids] B^T     A: (r, V)  B: (D, r)     LoRA on a table of V rows
    TrainedCopy     the module with weights of its own      modules_to_save, resized embeddings, biases
    TrainedRows     W with some rows replaced               trainable_token_indices

All of them, and `lora.LoraLinear`, are `Adapted`: a wrapper around a layer of the base model, which holds the
parts of several adapters by name and applies those of one. The base layer stays what it was. Trained numbers
are float32. They are cast to the activations' dtype where they are used.

Wrappers may be nested: a linear layer with LoRA around a copy of an output head whose vocabulary has grown.
PEFT's names in files are the same: `lm_head.lora_A.weight` beside `lm_head.base_layer.weight`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import ops
from minilora.config import LoraConfig
from minilora.initialize import takes_part_of_base
from minilora.linear import frozen_linear
from minilora.model import RMSNorm
from minilora.system.errors import UserError


class Adapted(nn.Module):
    """A layer of the base model and the parts that adapters add to it, by adapter."""

    kinds: tuple[str, ...] = ()  # names of the ParameterDicts that hold parts, adapter -> parameter
    frozen_kinds: tuple[str, ...] = ()  # the same, of tensors that are never trained and no parts

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        for kind in self.kinds + self.frozen_kinds:
            setattr(self, kind, nn.ParameterDict())
        self.configs: dict[str, LoraConfig] = {}
        self.active: str | None = None  # the adapter that forward applies
        self.merged: str | None = None  # the adapter that the base weight holds at present
        self.is_mixed = False  # whether rows of a batch choose the adapter: see mixed.py
        self.train(base_layer.training)  # a model loaded for inference drops nothing out

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters by kind."""
        return {kind: getattr(self, kind)[name] for kind in self.kinds if name in getattr(self, kind)}

    @property
    def applied(self) -> str | None:
        """The adapter whose parts forward must apply. None: none is active, or the weights hold it."""
        return self.active if self.merged is None else None

    def is_trained(self, name: str) -> bool:
        """Whether training moves an adapter's parts."""
        return True

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UserError while rows may choose it."""
        if self.is_mixed:
            raise UserError(f"rows may choose {name!r} now; leave `with adapters` before removing it")
        for kind in self.kinds + self.frozen_kinds:
            if name in getattr(self, kind):
                del getattr(self, kind)[name]
        del self.configs[name]
        self.active = None if self.active == name else self.active
        self.merged = None if self.merged == name else self.merged

    @property
    def weight(self) -> Tensor:
        """The weight that is in use, without an update. A tied head, among others, asks for it."""
        return self.base_layer.weight

    @property
    def plain_layer(self) -> nn.Module:
        """The layer of the base model inside all wrappers."""
        layer = self.base_layer
        return layer.plain_layer if isinstance(layer, Adapted) else layer


class TrainedCopy(Adapted):
    """A module whose weight, bias or both are an adapter's own."""

    kinds = ("saved_weight", "saved_bias")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.frozen: set[str] = set()  # adapters whose copy was saved but is not trained
        self._displaced: tuple[Tensor, Tensor | None] | None = None  # base weights, while one is merged

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        weight: Tensor | None,
        bias: Tensor | None,
        trained: bool = True,
    ) -> None:
        """Copy a weight, a bias or both.

        A copy that is not trained has the base layer's dtype. It may be the base layer's own weight.
        """
        base = self.base_layer.weight
        dtype = torch.float32 if trained else base.dtype
        for kind, tensor in ((self.saved_weight, weight), (self.saved_bias, bias)):
            if tensor is base and not trained:
                kind[name] = base  # one tensor in memory
            elif tensor is not None:
                kind[name] = nn.Parameter(tensor.detach().to(base.device, dtype, copy=True))
        self.configs[name] = config
        self.frozen |= set() if trained else {name}

    def is_trained(self, name: str) -> bool:
        return name not in self.frozen

    @property
    def weight(self) -> Tensor:
        return self.weight_of(self.applied)

    @property
    def bias(self) -> Tensor | None:
        return self.saved_bias.get(self.applied, self.base_layer.bias)

    def weight_of(self, name: str | None) -> Tensor:
        """Return the weight that is in use under an adapter."""
        return self.saved_weight.get(name, self.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        base, name = self.base_layer, self.applied
        if name not in self.configs:
            return base(x)
        if isinstance(base, nn.Embedding):
            return F.embedding(x, self.weight).to(base.weight.dtype)
        if isinstance(base, RMSNorm):
            return ops.rms_norm(x, self.weight.to(x.dtype), base.eps)
        if name in self.saved_weight:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y = frozen_linear(base, x)
        return y + (self.bias - base.bias.float()).to(y.dtype)

    def after_sum(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As RMSNorm's."""
        if self.applied not in self.configs:
            return self.base_layer.after_sum(x, y)
        return ops.add_norm(x, y, self.weight.to(x.dtype), self.base_layer.eps)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active adapter's own weights into the base layer."""
        name, base = self.applied, self.base_layer
        if name in self.configs:
            self._displaced = base.weight, getattr(base, "bias", None)
            if name in self.saved_weight:
                base.weight = nn.Parameter(self.weight.to(base.weight.dtype, copy=True), requires_grad=False)
            if name in self.saved_bias:
                base.bias = nn.Parameter(self.bias.to(base.bias.dtype, copy=True), requires_grad=False)
            self.merged = name

    def unmerge(self) -> None:
        if self.merged is not None:
            self.base_layer.weight, bias = self._displaced
            if bias is not None:
                self.base_layer.bias = bias
            self.merged = self._displaced = None


class LoraEmbedding(Adapted):
    """LoRA on an embedding. ids: (...) -> (..., D). PEFT drops nothing out here."""

    kinds = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.scalings: dict[str, float] = {}

    def add_adapter(self, name: str, config: LoraConfig, r: int, alpha: float) -> None:
        """Add A = 0, (r, V), and B ~ normal(0, 1), (D, r)."""
        weight = weight_under(self.base_layer, name)
        options = dict(dtype=torch.float32, device=weight.device)
        self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, weight.shape[0], **options))
        B = torch.empty(weight.shape[1], r, device="meta" if weight.device.type == "meta" else "cpu")
        self.lora_embedding_B[name] = nn.Parameter(B.normal_().to(weight.device))
        self.configs[name], self.scalings[name] = config, config.scaling_of(r, alpha)

    @staticmethod
    def check(config: LoraConfig) -> None:
        """Raise UserError for what no embedding can have."""
        asked = {"use_dora": config.use_dora, "use_vera": config.use_vera}
        start = takes_part_of_base(config.init_lora_weights)
        asked[f"init_lora_weights {config.init_lora_weights!r}"] = start
        if refused := [key for key, is_asked in asked.items() if is_asked]:
            raise UserError(f"{refused[0]} is not supported on the embedding; leave embed_tokens out")

    def forward(self, ids: Tensor) -> Tensor:
        y, name = self.base_layer(ids), self.applied
        if name not in self.configs:
            return y
        narrow = F.embedding(ids, self.lora_embedding_A[name].T).to(y.dtype)  # (..., r)
        return y + (narrow @ self.lora_embedding_B[name].to(y.dtype).T) * self.scalings[name]

    def delta_weight(self, name: str) -> Tensor:
        """Return scaling * A^T B^T, float32 (V, D)."""
        return (self.lora_embedding_B[name] @ self.lora_embedding_A[name]).T * self.scalings[name]

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + scaling * A^T B^T, computed in float32 and rounded once."""
        if self.applied in self.configs:
            weight = self.plain_layer.weight
            weight.copy_(weight.float() + self.delta_weight(self.active))
            self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged is not None:
            weight = self.plain_layer.weight
            weight.copy_(weight.float() - self.delta_weight(self.merged))
            self.merged = None


class TrainedRows(Adapted):
    """An embedding, or a head tied to one, with some rows of the weight replaced by trained ones.

    The name of the part is PEFT's: it holds the rows themselves, not a difference.
    """

    kinds = ("trainable_tokens_delta",)

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.rows: dict[str, Tensor] = {}  # their numbers, (n,)
        self._displaced: Tensor | None = None

    def add_adapter(
        self, name: str, config: LoraConfig, rows: tuple[int, ...], values: nn.Parameter | None = None
    ) -> None:
        """Copy rows of the base weight, or share the trained rows of another layer, `values`.

        Raises UserError for a row that the weight does not have, or is named twice.
        """
        weight = weight_under(self.base_layer, name)
        wrong = [row for row in rows if not 0 <= row < len(weight)]
        if wrong or len(set(rows)) < len(rows):
            what = f"{wrong[0]}, and the weight has {len(weight)} rows" if wrong else "one row twice"
            raise UserError(f"trainable_token_indices names {what}")
        copied = values is None
        self.trainable_tokens_delta[name] = nn.Parameter(weight[list(rows)].float()) if copied else values
        self.configs[name], self.rows[name] = config, torch.tensor(rows)

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        del self.rows[name]

    def forward(self, x: Tensor) -> Tensor:
        y, name = self.base_layer(x), self.applied
        if name not in self.configs:
            return y
        rows = self.rows[name] = self.rows[name].to(x.device)  # once: a GPU waits for a copy from the host
        values = self.trainable_tokens_delta[name].to(y.dtype)
        if not x.is_floating_point():  # ids: (...) -> (..., D)
            number = torch.full((len(weight_under(self.base_layer, name)),), -1, device=x.device)  # (V,)
            number[rows] = torch.arange(len(rows), device=x.device)
            chosen = number[x]  # (...): which trained row, or -1
            return torch.where((chosen >= 0).unsqueeze(-1), F.embedding(chosen.clamp_min(0), values), y)
        return y.index_copy(-1, rows, F.linear(x, values))  # (..., D) -> (..., V)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the trained rows into the base weight."""
        if self.applied in self.configs:
            weight, rows = self.base_layer.weight, self.rows[self.active].to(self.base_layer.weight.device)
            self._displaced = weight[rows].clone()
            weight[rows] = self.trainable_tokens_delta[self.active].to(weight.dtype)
            self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged is not None:
            weight = self.base_layer.weight
            weight[self.rows[self.merged].to(weight.device)] = self._displaced
            self.merged = self._displaced = None


def weight_under(layer: nn.Module, name: str | None) -> Tensor:
    """Return the weight of a base layer as an adapter finds it: a copy of its own, if it has one."""
    return layer.weight_of(name) if isinstance(layer, TrainedCopy) else layer.weight
