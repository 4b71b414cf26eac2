"""Which layers of a model an adapter changes by targets.py's rules, and whether its name is free."""

from torch import nn

from minilora.adapted import adapted_layers, base_layers
from minilora.config import LoraConfig, Names
from minilora.linear import QuantizedLinear
from minilora.system.errors import UserError, suggestion
from minilora.targets import chosen_targets, matching_names


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


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on the model, sorted."""
    return sorted({name for layer in adapted_layers(model).values() for name in layer.configs})


def check_new_adapter(model: nn.Module, name: str) -> None:
    """Raise UserError if the model cannot take an adapter of this name now."""
    if not name or "." in name:
        raise UserError(f"adapter name {name!r} must be a word without dots")
    if hasattr(nn.ParameterDict, name):  # PyTorch would take it for one of its own methods
        raise UserError(f"adapter name {name!r} is a name that PyTorch uses itself; choose another")
    if name in adapter_names(model):
        raise UserError(f"the model already has an adapter called {name!r}; choose another name or remove it")
    if merged := [layer.merged for layer in adapted_layers(model).values() if layer.merged is not None]:
        raise UserError(
            f"adapter {merged[0]!r} is merged into the weights; unmerge it before adding {name!r}"
        )
