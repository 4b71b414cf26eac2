"""What PEFT 0.21 makes of adapter_config.json: which values it refuses, and which layers they choose.

PEFT checks few values. A wrong one meets an operation that fails, such as `lora_dropout > 0.0` for a text,
or one that succeeds by chance. The table says what each key is meant to hold, and is stricter than chance:
PEFT takes `exclude_modules = false` for none, and the linter does not. tests/formats/test_lint.py asks PEFT.

Some keys ask for more than a configuration tells: tensors of other kinds, calibration data, other packages.
Nobody should hear "loads" about them from a program that cannot know. `unjudged` names them.
"""

import re
from collections.abc import Callable

from minilora.formats.adapter_header import AdapterHeader, is_number, is_texts
from minilora.formats.peft_format import EMBEDDING_A, KNOWN_INITS, PARTNERS, split_key, tensor_key
from minilora.system.patterns import match_names
from minilora.system.schema import shown
from minilora.targets import OUTPUT_HEAD, matching_names

_TASKS = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()
_HARMLESS_CONFIGS = ("eva_config", "corda_config", "lora_ga_config")  # read only if init_lora_weights says so
_OTHER_CONFIGS = ("kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora")
_MANY_TARGETS = 20  # From here on, PEFT shortens a list of targets before it looks at layers_to_transform.
_SLOW_PISSA = re.compile(r"pissa_niter_\d{4,}")
_PLAIN_NAME = re.compile(r"\w[\w.]*")
SAVED_EMBEDDINGS = re.compile(r"base_model\.model\.(.*\b(embed_tokens|lm_head))(\.base_layer)?\.weight")


def _is_ints(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_init(value: object) -> bool:
    known = isinstance(value, str) and KNOWN_INITS.fullmatch(value) and not _SLOW_PISSA.fullmatch(value)
    return value is None or isinstance(value, bool) or bool(known)


def _null_or(*fits: type | Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is null, of one of the types, or fits one of the tests."""
    return lambda v: v is None or any(type(v) is fit if isinstance(fit, type) else fit(v) for fit in fits)


_MUST_BE = {
    "r": ("a whole number above 0", lambda v: v is not None),
    "lora_alpha": ("a number", lambda v: v is not None),
    "lora_dropout": ("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
    "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "rank_pattern": ("an object of ranks", lambda v: v is not None),
    "alpha_pattern": ("an object of numbers", lambda v: v is not None),
    "task_type": (f"null or one of {', '.join(_TASKS)}", lambda v: v is None or v in _TASKS),
    "init_lora_weights": ("true, false, null or the name of an initialisation", _is_init),
    "exclude_modules": ("null, text or a list of texts", _null_or(str, is_texts)),
    "layers_to_transform": ("null, a whole number or a list of them", _null_or(int, _is_ints)),
    "layers_pattern": ("null, text or a list of texts", _null_or(str, is_texts)),
    "target_parameters": ("null or a list of texts", _null_or(is_texts)),
    "trainable_token_indices": ("null, a list of whole numbers or an object", _null_or(dict, _is_ints)),
    "alora_invocation_tokens": ("null or a list of whole numbers", _null_or(_is_ints)),
    "layer_replication": ("null or a list", _null_or(list)),
    **dict.fromkeys((*_HARMLESS_CONFIGS, *_OTHER_CONFIGS), ("null or an object", _null_or(dict))),
}  # fmt: skip


def refused_values(adapter: AdapterHeader) -> list[str]:
    """One sentence for each value, or pair of values, with which PEFT does not load an adapter."""
    config, get = adapter.config, adapter.get
    wrong = [
        f"{key} = {shown(config[key])} must be {kind}"
        for key, (kind, fits) in _MUST_BE.items()
        if key in config and not fits(config[key])
    ]
    wrong += [f"no key can be called {key!r}" for key in ("self", "cls") if key in config]
    narrowed = get("layers_to_transform") is not None
    if isinstance(get("target_modules"), str) and (narrowed or get("layers_pattern") is not None):
        wrong.append("layers_to_transform and layers_pattern need target_modules to be a list")
    if get("layers_pattern") and not narrowed:
        wrong.append("layers_pattern needs layers_to_transform")
    return wrong + _refused_features(adapter)


def _refused_features(adapter: AdapterHeader) -> list[str]:
    get, wrong = adapter.get, []
    for key in ("lora_bias", "alora_invocation_tokens", "megatron_config"):
        if get("use_dora") and get(key):
            wrong.append(f"use_dora does not go with {key}")
    init = get("init_lora_weights")
    if get("lora_bias") and not isinstance(init, bool):
        wrong.append(f"lora_bias does not go with init_lora_weights = {shown(init)}")
    if init == "corda":
        wrong.append("init_lora_weights = 'corda' needs the data that it was calibrated with")
    if init == "loftq" and not get("loftq_config"):
        wrong.append("init_lora_weights = 'loftq' needs loftq_config")
    return wrong


def unjudged(adapter: AdapterHeader) -> list[str]:
    """One sentence for each value whose effect in PEFT is not known here."""
    get = adapter.get
    keys = [key for key in _OTHER_CONFIGS if get(key) is not None]
    keys += [key for key in ("layer_replication", "target_parameters", "megatron_config") if get(key)]
    keys += ["init_lora_weights"] if get("init_lora_weights") == "loftq" else []
    keys += ["trainable_token_indices"] if get("trainable_token_indices") is not None else []
    for key in ("modules_to_save", "layers_pattern"):
        names = get(key) or []
        if not all(map(_PLAIN_NAME.fullmatch, [names] if isinstance(names, str) else names)):
            keys.append(key)  # PEFT reads such names as regular expressions.
    targets = get("target_modules")
    if get("layers_to_transform") and isinstance(targets, list) and len(targets) >= _MANY_TARGETS:
        keys.append("layers_to_transform")
    unknown = [f"{key} = {shown(get(key))} is not judged here" for key in keys]
    if adapter.base is None and get("bias") != "none" and not any(map(_is_bias, adapter.others)):
        unknown.append(
            f"bias = {shown(get('bias'))}, but no bias in the file: does the base model have biases?"
        )
    return unknown


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


# ---- layers and copies ----


def targets(adapter: AdapterHeader) -> set[str] | None:
    """Those of the base model's modules that PEFT adapts. Without a base model, of the adapter's own layers.

    None if that cannot be known. Raises UserError for a pattern that cannot be matched.
    """
    base, chosen = adapter.base, adapter.get("target_modules")
    names = base.modules if base else list(adapter.layers)
    if chosen is None or unjudged(adapter):
        return None
    if isinstance(chosen, list):
        found = set(_narrowed(adapter, matching_names(names, chosen)))
    elif chosen.lower() == "all-linear":
        found = set(base.weights if base else names) - {OUTPUT_HEAD, "model.embed_tokens"}
    else:
        found = set(match_names([chosen], names)[0])
    found -= _excluded(adapter, names)
    copies = adapter.get("modules_to_save") or []
    return {name for name in found if not any(f".{copy}." in f".{name}." for copy in copies)}


def _excluded(adapter: AdapterHeader, names: list[str]) -> set[str]:
    excluded = adapter.get("exclude_modules") or []
    if isinstance(excluded, str):
        return set(match_names([excluded], names)[0])
    return set(matching_names(names, excluded))


def _narrowed(adapter: AdapterHeader, names: list[str]) -> list[str]:
    """Those of the names that `layers_to_transform` keeps. A target's full name is always kept."""
    chosen, patterns = adapter.get("layers_to_transform"), adapter.get("layers_pattern") or r"[^.]*"
    if chosen is None or chosen == []:
        return names
    patterns = [patterns] if isinstance(patterns, str) else patterns
    indices = [chosen] if isinstance(chosen, int) else chosen
    ways = [rf"(?:^|.*?\.){pattern}\.(?P<idx>{index})\." for pattern in patterns for index in indices]
    kept = {*adapter.get("target_modules"), *sum(match_names(ways, names, whole=False), [])}
    return [name for name in names if name in kept]


def unsupported_targets(adapter: AdapterHeader, targets: set[str]) -> list[str]:
    """One sentence for each target that is no layer with a weight that PEFT can adapt."""
    weights = adapter.base.weights if adapter.base else targets
    wrong = [name for name in sorted(targets) if name not in weights]
    return [f"target_modules chooses {name}, which is no linear layer and no embedding" for name in wrong]


def wrong_copies(adapter: AdapterHeader) -> list[str]:
    """One sentence for each trained copy of a module that the file lacks, or that does not fit."""
    copies, base = adapter.get("modules_to_save") or [], adapter.base
    if base is None:
        lacking = [copy for copy in copies if not any(f".{copy}." in name for name in adapter.others)]
        return [f"modules_to_save names {shown(copy)}, and the file holds no copy of it" for copy in lacking]
    # PEFT copies every module whose name ends so: "norm" names input_layernorm, too.
    copied = tuple(f"{module}." for module in base.modules if module.endswith(tuple(copies)))
    wrong = []
    for name, shape in base.parameters.items():
        stored = adapter.others.get(f"base_model.model.{name}")
        if name.startswith(copied) and stored != shape:
            held = "lacks" if stored is None else f"holds {stored} for"
            wrong.append(f"modules_to_save demands a copy {shape} of {name}, and the file {held} it")
    return wrong


def misshapen(adapter: AdapterHeader) -> list[str]:
    """One sentence for each A, B or embedding in the file that has the wrong number of dimensions or rows."""
    wrong = []
    for name, shape in adapter.others.items():
        _, part = split_key(name) or ("", "")
        if part in PARTNERS or (part and adapter.get("use_dora")):
            wrong.append(f"{name} is {shape}, which is no {'matrix' if part in PARTNERS else 'vector'}")
        elif adapter.base and (embedding := SAVED_EMBEDDINGS.fullmatch(name)):
            own = adapter.base.parameters.get(f"{embedding[1]}.weight")
            if own is not None and own != shape:
                wrong.append(f"{name} is {shape}, and the base model's {own}: resize its embeddings first")
    return wrong


def missing_biases(adapter: AdapterHeader, targets: set[str]) -> list[str]:
    """Names of the trained biases that the configuration promises and the file lacks."""
    names = [
        f"{tensor_key(layer, 'lora_B')}.bias"
        for layer in targets
        if EMBEDDING_A not in adapter.layers.get(layer, {})
    ]
    missing = names if adapter.get("lora_bias") else []
    if adapter.base and adapter.get("bias") != "none":
        for name in filter(_is_bias, adapter.base.parameters):
            layer = name.removesuffix(".bias")
            if layer in targets:
                missing.append(tensor_key(layer, "base_layer.bias"))
            elif adapter.get("bias") == "all":
                missing.append(tensor_key(layer, "bias"))
    return [name for name in missing if name not in adapter.others]
