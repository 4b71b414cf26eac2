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

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import ops
from minilora.config import LoraConfig
from minilora.initialize import takes_part_of_base
from minilora.linear import frozen_linear
from minilora.model import RMSNorm
from minilora.system.errors import UserError, suggestion
from minilora.targets import EMBEDDING, OUTPUT_HEAD, matching_names, saved_modules, token_rows


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


# ---- finding and wrapping layers ---------------------------------------------------------------------------

_INSIDE_OUT = ("TrainedCopy", "LoraEmbedding", "LoraLinear", "TrainedRows")  # the order of nested wrappers
_BASE = ".base_layer"


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, Adapted]:
    """Return full name -> wrapper, outer ones before inner ones, of all or of those that have `adapter`."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}
    return {n: m for n, m in layers.items() if adapter is None or adapter in m.configs}


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base model's modules by the names that they have without wrappers, in the model's order."""
    inner = (nn.ParameterDict, nn.Identity, Adapted)
    return {
        plain_name(name): module for name, module in model.named_modules() if not isinstance(module, inner)
    }


def plain_name(name: str) -> str:
    """Return the name that a module or parameter would have without wrappers of adapters."""
    return name.replace(_BASE, "")


def wrapper(model: nn.Module, path: str, kind: type[Adapted]) -> Adapted:
    """Return the layer's wrapper of a kind, a new one if it has none. path: its name without wrappers."""
    layer, outside = model.get_submodule(path), _INSIDE_OUT.index(kind.__name__)
    while isinstance(layer, Adapted) and _INSIDE_OUT.index(type(layer).__name__) > outside:
        path, layer = path + _BASE, layer.base_layer
    if not isinstance(layer, kind):
        layer = kind(layer)
        model.set_submodule(path, layer)
    return layer


def wrap_whole(model: nn.Module, targets: list[str], config: LoraConfig, name: str) -> None:
    """Add copies of the modules and biases that an adapter trains whole, and of a vocabulary that has grown.

    targets: names of the layers with A and B. Raises UserError for a module without a weight.
    """
    layers = base_layers(model)
    for end in () if isinstance(config.modules_to_save, str) else config.modules_to_save:
        if not saved_modules(layers, [end]):
            hint = suggestion(end, {name.rpartition(".")[2] for name in layers})
            raise UserError(f"modules_to_save names {end!r}, which no module is called{hint}")
    for path in saved_modules(layers, config.modules_to_save):
        if not isinstance(weight := getattr(layers[path], "weight", None), Tensor):
            why = (
                "is in 4 or 8 bits: load the model unquantized"
                if weight
                else "has no weight: name its layers"
            )
            raise UserError(f"modules_to_save names {path}, which {why}")
        copy = wrapper(model, path, TrainedCopy)
        copy.add_adapter(name, config, weight, getattr(layers[path], "bias", None))
    for path in (EMBEDDING, OUTPUT_HEAD):
        if path in layers and has_grown(model, layers[path]) and name not in _copies(model, path):
            grown = layers[path].weight
            wrapper(model, path, TrainedCopy).add_adapter(name, config, grown, None, trained=False)
    if config.bias != "none":
        for path in layers if config.bias == "all" else targets:
            if getattr(layers[path], "bias", None) is not None and name not in _copies(model, path):
                wrapper(model, path, TrainedCopy).add_adapter(name, config, None, layers[path].bias)


def _copies(model: nn.Module, path: str) -> dict[str, LoraConfig]:
    layer = model.get_submodule(path)
    return layer.configs if isinstance(layer, TrainedCopy) else {}


def wrap_tokens(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Train the rows that `trainable_token_indices` names. Raises UserError for rows that are not there."""
    layers = base_layers(model)
    for end, rows in token_rows(config).items():
        for path in matching_names(layers, [end]):
            weight = getattr(layers[path], "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                why = "no unquantized matrix; name an embedding, or load the model unquantized"
                raise UserError(f"trainable_token_indices names {path or end!r}, which has {why}")
            wrap_rows(model, path, config, name, tuple(rows))


def wrap_rows(model: nn.Module, path: str, config: LoraConfig, name: str, rows: tuple[int, ...]) -> None:
    """Train rows of an embedding, and of the head where it shares the embedding's weight."""
    layer = wrapper(model, path, TrainedRows)
    layer.add_adapter(name, config, rows)
    if path == EMBEDDING and model.config.tie_word_embeddings and OUTPUT_HEAD not in token_rows(config):
        head = model.get_submodule(OUTPUT_HEAD)
        if not isinstance(head, TrainedCopy) or name not in head.configs or not head.is_trained(name):
            head = wrapper(model, OUTPUT_HEAD, TrainedRows)
            head.add_adapter(name, config, rows, layer.trainable_tokens_delta[name])


def untie_for_merging(model: nn.Module) -> None:
    """Give a tied head a weight of its own if active adapters change it and the embedding differently."""
    layers = [model.get_submodule(path) for path in (OUTPUT_HEAD, EMBEDDING)]
    changed = any(
        isinstance(m, Adapted) and m.applied is not None for layer in layers for m in layer.modules()
    )
    if model.config.tie_word_embeddings and changed:
        head = base_layers(model)[OUTPUT_HEAD]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config = replace(model.config, tie_word_embeddings=False)


# ---- a vocabulary that grows -------------------------------------------------------------------------------

_NOISE = 1e-9**0.5  # of the distance of an old row from the mean


def has_grown(model: nn.Module, layer: nn.Module) -> bool:
    """Whether an embedding or output head has more rows than its base model's files."""
    return layer.weight.shape[0] > model.config.vocab_size


@torch.no_grad()
def grow_vocabulary(model: nn.Module, rows: int, seed: int = 0) -> None:
    """Give the embedding and the output head `rows` rows, where they have fewer.

    New rows lie at the mean of the old rows W: row = mean + 3e-5 (W[i] - mean), of a random i. Mean and
    covariance are those of transformers' `mean_resizing`. In the head n such rows take at most n / (n + V) of
    the probability, by Jensen's inequality: exp(h mean) <= mean exp(h W) (Hewitt 2021, Initializing New Word
    Embeddings for Pretrained Language Models). LLaMA-Factory's noise is as large as a row, and breaks this.

    Raises UserError for an output head in 4 or 8 bits.
    """
    layers, generator = base_layers(model), torch.Generator().manual_seed(seed)
    if layers[EMBEDDING].weight.shape[0] >= rows:
        return
    if not isinstance(layers[OUTPUT_HEAD].weight, Tensor):
        raise UserError(f"{OUTPUT_HEAD} is in 4 or 8 bits, and takes no new tokens: load it unquantized")
    for path in (EMBEDDING, OUTPUT_HEAD):
        layer = layers[path]
        if path == OUTPUT_HEAD and model.config.tie_word_embeddings:
            _set_weight(layer, layers[EMBEDDING].weight)
        else:
            old = layer.weight
            mean = old.mean(0, dtype=torch.float32)  # (D,)
            chosen = torch.randint(len(old), (rows - len(old),), generator=generator).to(old.device)
            new = mean + _NOISE * (old[chosen].float() - mean)  # (new, D)
            weight = torch.cat((old, new.to(old.dtype)))
            _set_weight(layer, nn.Parameter(weight, requires_grad=False))


def _set_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    layer.weight = weight
    setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", len(weight))


@torch.no_grad()
def take_new_rows(model: nn.Module, layer: nn.Module, own: Tensor) -> Tensor:
    """Let a layer that has grown take its new rows from an adapter's own weight.

    Returns the weight for the adapter: the layer's, if now it is the same, so that memory holds one.
    """
    base, old = layer.weight, model.config.vocab_size
    if base.shape != own.shape or base.is_meta:
        return own
    base[old:] = own[old:].to(base)
    return base if torch.equal(own.to(base), base) else own
