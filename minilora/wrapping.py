"""Finding the layers of a model that an adapter changes, by the rules of targets.py, and wrapping them.

A model is searched by the names that its modules have without wrappers: they are the names in its files, and
they stay the same whatever adapters are on it.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from minilora.adapted import Adapted, TrainedCopy, TrainedRows
from minilora.config import LoraConfig, Names
from minilora.linear import QuantizedLinear
from minilora.system.errors import UserError, suggestion
from minilora.targets import (
    EMBEDDING,
    OUTPUT_HEAD,
    chosen_targets,
    matching_names,
    saved_modules,
    token_rows,
)

# The order of nested wrappers; by name, because lora.LoraLinear stands above this file.
_INSIDE_OUT = ("TrainedCopy", "LoraEmbedding", "LoraLinear", "TrainedRows")
_BASE = ".base_layer"
# The ends of the names of all modules that have a weight: an adapter that copies them trains all of a model.
ALL_WEIGHTS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("norm", "embed_tokens", "lm_head"),
)


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


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on the model, sorted."""
    return sorted({name for layer in adapted_layers(model).values() for name in layer.configs})


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raise UserError if no new adapter of the model can have this name."""
    if not name or "." in name:
        raise UserError(f"adapter name {name!r} must be a word without dots")
    if hasattr(nn.ParameterDict, name):  # PyTorch would take it for one of its own methods
        raise UserError(f"adapter name {name!r} is a name that PyTorch uses itself; choose another")
    if name in adapter_names(model):
        raise UserError(f"the model already has an adapter called {name!r}; choose another name or remove it")


def train_adapters(model: nn.Module, names: Sequence[str | None]) -> None:
    """Let these adapters' parts be trained, and no others' on the model."""
    for layer in adapted_layers(model).values():
        for name, config in layer.configs.items():
            for kind, parameter in layer.parts(name).items():
                frozen = (kind == "lora_A" and config.lora_fa) or not layer.is_trained(name)
                parameter.requires_grad_(name in names and not frozen)


def check_new_adapter(model: nn.Module, name: str) -> None:
    """Raise UserError if the model cannot take an adapter of this name now."""
    check_adapter_name(model, name)
    layers = adapted_layers(model).values()
    if any(layer.is_mixed for layer in layers):
        raise UserError(
            f"rows choose their adapters at present; leave `with adapters` before adding {name!r}"
        )
    if merged := [layer.merged for layer in layers if layer.merged is not None]:
        raise UserError(
            f"adapter {merged[0]!r} is merged into the weights; unmerge it before adding {name!r}"
        )


def match_targets(model: nn.Module, config: LoraConfig | Names) -> list[str]:
    """Return full names of the layers that get A and B, in the model's order.

    Raises UserError for a name that no such layer has.
    """
    config = config if isinstance(config, LoraConfig) else LoraConfig(target_modules=config)
    layers = base_layers(model)
    linear = [n for n, m in layers.items() if isinstance(m, (nn.Linear, QuantizedLinear))]
    names = [n for n, m in layers.items() if n in linear or isinstance(m, nn.Embedding)]
    if isinstance(config.target_modules, str):
        try:
            matched = chosen_targets(names, config, linear)
        except UserError as error:
            raise UserError(f"lora_target {config.target_modules!r}: {error}") from error
        if not matched:
            example = f"it must match a whole name such as {linear[0]!r}"
            raise UserError(f"lora_target {config.target_modules!r} matches no layer; {example}")
        return matched
    for target in config.target_modules:
        if not matching_names(names, [target]):
            hint = suggestion(target, {n.rpartition(".")[2] for n in names} | set(names))
            raise UserError(f"lora_target names {target!r}, which no linear layer is called{hint}")
    return chosen_targets(names, config, linear)


def has_grown(model: nn.Module, layer: nn.Module) -> bool:
    """Whether an embedding or output head has more rows than its base model's files."""
    return layer.weight.shape[0] > model.config.vocab_size


# ---- wrapping ----------------------------------------------------------------------------------------------


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
    if config.modules_to_save == ALL_WEIGHTS and model.config.tie_word_embeddings:
        embedding, head = (model.get_submodule(path) for path in (EMBEDDING, OUTPUT_HEAD))
        head.saved_weight[name] = embedding.saved_weight[name]  # it stays tied
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
