"""What PEFT 0.21 makes of adapter_config.json: which values it refuses, and which this linter cannot judge.

PEFT checks few values. A wrong one meets an operation that fails, such as `lora_dropout > 0.0` for a text,
or one that succeeds by chance. The table says what each key is meant to hold, and is stricter than chance:
PEFT takes `exclude_modules = false` for none, and the linter does not. tests/adapters/test_peft_rules.py asks
PEFT. Which layers a configuration chooses stands in targets.py, for all of this project.

Some keys ask for more than a configuration tells: tensors of other kinds, calibration data, other packages.
Nobody should hear "loads" about them from a program that cannot know. `unjudged` names them.
"""

import re
import sys
from collections.abc import Callable

from minilora.adapters.peft_format import KNOWN_INITS, LORA_KEYS, PEFT_INIT, STARTS_FROM_W
from minilora.config import LoraConfig
from minilora.system.schema import shown

_TASKS = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()
_HARMLESS_CONFIGS = ("eva_config", "corda_config", "lora_ga_config")  # read only if init_lora_weights says so
_OTHER_CONFIGS = ("kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora")
_MANY_TARGETS = 20  # From here on, PEFT shortens a list of targets before it looks at layers_to_transform.
_SLOW_PISSA = re.compile(r"pissa_niter_\d{4,}")
_PLAIN_NAME = re.compile(r"\w[\w.]*")
_TARGETS_IF_NULL = ["q_proj", "v_proj"]  # PEFT's choice for these models


class PeftConfig(LoraConfig):
    """A LoraConfig with values that PEFT takes and this implementation refuses: lora_alpha = 0, say."""

    def __post_init__(self) -> None:
        self._check_names()


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


def is_only_all(targets: object) -> bool:
    """Whether target_modules is LLaMA-Factory's `all`, which PEFT takes for a name that nothing has."""
    return isinstance(targets, str) and targets.lower() == "all"


def _is_ints(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_init(value: object) -> bool:
    known = isinstance(value, str) and KNOWN_INITS.fullmatch(value) and not _SLOW_PISSA.fullmatch(value)
    return value is None or isinstance(value, bool) or bool(known)


def _null_or(*fits: type | Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is null, of one of the types, or fits one of the tests."""
    return lambda v: v is None or any(type(v) is fit if isinstance(fit, type) else fit(v) for fit in fits)


# What all three programs read. A key may be absent or null, which `lint.py` judges.
_READ_BY_ALL = {
    "r": ("a whole number above 0", _null_or(is_rank)),
    "lora_alpha": ("a number", _null_or(is_number)),
    "target_modules": ("text or a list of texts", _null_or(str, is_texts)),
    "modules_to_save": ("a list of texts", _null_or(is_texts)),
    "peft_type": ("text", _null_or(str)),
    "bias": ("text", _null_or(str)),
    "rank_pattern": ("an object of ranks", _null_or(_is_object_of(is_rank))),
    "alpha_pattern": ("an object of numbers", _null_or(_is_object_of(is_number))),
}
_MUST_BE = {
    "target_modules": ("a list, a regular expression or 'all-linear'", lambda v: not is_only_all(v)),
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
    "trainable_token_indices": (
        "null, a list of whole numbers or an object of such lists",
        _null_or(_is_object_of(_is_ints), lambda v: _is_ints(v) and v != []),
    ),
    "alora_invocation_tokens": ("null or a list of whole numbers", _null_or(_is_ints)),
    "layer_replication": ("null or a list", _null_or(list)),
    **dict.fromkeys((*_HARMLESS_CONFIGS, *_OTHER_CONFIGS), ("null or an object", _null_or(dict))),
}  # fmt: skip


def refused_by_all(config: dict) -> list[str]:
    """One sentence for each value of a kind that no program can read."""
    return _wrong_kinds(config, _READ_BY_ALL)


def _wrong_kinds(config: dict, table: dict) -> list[str]:
    return [
        f"{key} = {shown(config[key])} must be {kind}"
        for key, (kind, fits) in table.items()
        if key in config and not fits(config[key])
    ]


def lora_config(config: dict) -> PeftConfig:
    """The adapter that PEFT sees. Values of a kind that PEFT refuses count as absent."""
    given = {
        key: value
        for key in LORA_KEYS
        if (value := config.get(key)) is not None and (key not in _MUST_BE or _MUST_BE[key][1](value))
    }
    if str(init := config.get(PEFT_INIT)).lower() in STARTS_FROM_W:
        given[PEFT_INIT] = init.lower()
    return PeftConfig(**dict(target_modules=_TARGETS_IF_NULL, r=8, lora_alpha=8) | given)


def refused_values(config: dict) -> list[str]:
    """One sentence for each value, or pair of values, with which PEFT does not load an adapter."""
    narrowed, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    wrong = _wrong_kinds(config, _MUST_BE)
    wrong += [f"no key can be called {key!r}" for key in ("self", "cls") if key in config]
    if isinstance(config.get("target_modules"), str) and (narrowed is not None or pattern is not None):
        wrong.append("layers_to_transform and layers_pattern need target_modules to be a list")
    if pattern and narrowed is None:
        wrong.append("layers_pattern needs layers_to_transform")
    return wrong + _refused_features(config)


def _refused_features(config: dict) -> list[str]:
    init, wrong = config.get("init_lora_weights", True), []
    for key in ("lora_bias", "alora_invocation_tokens", "megatron_config"):
        if config.get("use_dora") and config.get(key):
            wrong.append(f"use_dora does not go with {key}")
    if config.get("lora_bias") and not isinstance(init, bool):
        wrong.append(f"lora_bias does not go with init_lora_weights = {shown(init)}")
    if init == "corda":
        wrong.append("init_lora_weights = 'corda' needs the data that it was calibrated with")
    if init == "loftq" and not config.get("loftq_config"):
        wrong.append("init_lora_weights = 'loftq' needs loftq_config")
    return wrong


def unjudged(config: dict) -> list[str]:
    """The keys whose effect in PEFT is not known here."""
    get = config.get
    keys = [key for key in _OTHER_CONFIGS if get(key) is not None]
    keys += [key for key in ("layer_replication", "target_parameters", "megatron_config") if get(key)]
    keys += ["init_lora_weights"] if get("init_lora_weights") == "loftq" else []
    for key in ("modules_to_save", "layers_pattern"):
        names = get(key) or []
        if not all(map(_PLAIN_NAME.fullmatch, [names] if isinstance(names, str) else names)):
            keys.append(key)  # PEFT reads such names as regular expressions.
    targets = get("target_modules")
    if get("layers_to_transform") and isinstance(targets, list) and len(targets) >= _MANY_TARGETS:
        keys.append("layers_to_transform")
    return keys


def starts_elsewhere(init: object) -> str | None:
    """A sentence if PEFT, loading an adapter with this initialisation, changes the base model otherwise.

    PEFT repeats the initialisation on loading. PiSSA and OLoRA decompose the same W and find the same factors
    again, to the bit. The fast SVD of pissa_niter_N draws random numbers, and LoRA-GA's gradients are gone.
    """
    if init == "lora_ga":
        return "'lora_ga' changed the base model by a gradient that PEFT no longer has"
    if isinstance(init, str) and "_niter_" in init:
        return f"{init!r} changed the base model by random numbers, and PEFT draws others"
    return None
