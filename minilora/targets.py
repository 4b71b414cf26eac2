"""Which modules an adapter changes: PEFT's rules about names, the same for training, reading and judging.

A model's modules have full names (`model.layers.0.self_attn.q_proj`), and a configuration chooses among them:

    target_modules       a list: full names, or their ends (`q_proj`); text: a regular expression for whole
                         names, or all-linear: every linear layer but the output head
    exclude_modules      the same, for what is left out
    layers_to_transform  of what a list chose, only these decoder layers; layers_pattern is the word before
                         the number. A name that the list spells out in full stays
    modules_to_save      ends of names, in the middle of a word too: `norm` means `input_layernorm`. Modules
                         that are trained whole get no update
    rank_pattern         a regular expression for the end of a name, from a dot or the beginning on. The first
                         that matches decides; `alpha_pattern` alike

These are PEFT 0.21's `check_target_module_exists`, `get_pattern_key` and `_set_trainable`. A pattern comes
with an adapter's file, so it is matched in bounded time (system/patterns.py).
"""

from collections.abc import Iterable, Mapping, Sequence

from minilora.config import LoraConfig, Names
from minilora.system.patterns import match_names

OUTPUT_HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
ALL_LINEAR = ("all-linear", "all")  # PEFT's word, and LLaMA-Factory's


def matching_names(names: Iterable[str], chosen: Names) -> list[str]:
    """Return the names that `chosen` selects, in their order. Raises UserError for a pattern that is none."""
    if isinstance(chosen, str):
        return match_names([chosen], list(names))[0]
    endings = tuple(f".{name}" for name in chosen)
    return [name for name in names if f".{name}".endswith(endings)]


def chosen_targets(
    names: Sequence[str], config: LoraConfig, linear: Iterable[str] | None = None
) -> list[str]:
    """Return those of the modules' names that get an update A, B, in their order.

    linear: the names of linear layers, for all-linear; by default all names are taken to be.
    Raises UserError for a pattern that is no regular expression.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() in ALL_LINEAR:
        found = set(names if linear is None else linear) - {OUTPUT_HEAD, EMBEDDING}
    else:
        found = set(matching_names(names, config.target_modules))
        if not isinstance(config.target_modules, str):
            found = set(_in_chosen_layers([n for n in names if n in found], config))
    if config.exclude_modules:
        found -= set(matching_names(names, config.exclude_modules))
    return [name for name in names if name in found and not _is_within(name, config.modules_to_save)]


def _in_chosen_layers(names: list[str], config: LoraConfig) -> list[str]:
    chosen, words = config.layers_to_transform, config.layers_pattern or r"[^.]*"
    indices = [chosen] if isinstance(chosen, int) else chosen
    if not indices and not isinstance(chosen, int):
        return names
    words = [words] if isinstance(words, str) else words
    numbers = {part for name in names for part in name.split(".")}  # a file may list thousands of others
    indices = [index for index in indices if str(index) in numbers]
    # The number is the first one in the name: a lazy .*? before it.
    ways = [rf"(?:^|.*?\.){word}\.(?P<idx>{index})\." for word in words for index in indices]
    kept = {*config.target_modules, *sum(match_names(ways, names, whole=False), [])}
    return [name for name in names if name in kept]


def _is_within(name: str, modules: Names) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def saved_modules(names: Iterable[str], modules: Names) -> list[str]:
    """Return the names of the modules that `modules_to_save` copies."""
    return [name for name in names if modules and name.endswith(tuple(modules))]


def by_layer(names: Sequence[str], pattern: Mapping[str, float], default: float) -> dict[str, float]:
    """Return name -> the value of the first pattern that ends it, else the default."""
    values = dict.fromkeys(names, default)
    ends = [rf"(.*\.)?({end})$" for end in pattern]
    matched = match_names(ends, list(names), whole=False)
    for value, found in reversed(list(zip(pattern.values(), matched, strict=True))):
        values |= dict.fromkeys(found, value)
    return values


def ranks_and_alphas(names: Sequence[str], config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Return name -> its rank and its alpha."""
    ranks = by_layer(names, config.rank_pattern, config.r)
    alphas = by_layer(names, config.alpha_pattern, config.lora_alpha)
    return {name: (ranks[name], alphas[name]) for name in names}


def token_rows(config: LoraConfig) -> dict[str, list[int]]:
    """Return the ends of modules' names -> their trained rows, from trainable_token_indices."""
    rows = config.trainable_token_indices
    if isinstance(rows, Mapping):
        return {name: list(indices) for name, indices in rows.items()}
    return {"embed_tokens": list(rows)} if rows else {}


def rows_of(name: str, config: LoraConfig) -> list[int]:
    """Return the trained rows of one module, by its full name; none for most."""
    found = [rows for end, rows in token_rows(config).items() if matching_names([name], [end])]
    return found[0] if found else []
