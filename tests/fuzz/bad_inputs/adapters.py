"""adapter_config.json of an adapter that somebody else made."""

import json
from collections.abc import Iterator
from itertools import cycle
from math import inf, nan

from fuzz.bad_inputs.commands import LINT, READ_AN_ADAPTER
from fuzz.case import Case, make_case
from fuzz.edits import DROP, Edit, cut, edit_bytes, fifo, folder, link, remove, set_keys, write

KIND, FILE = "adapter_config.json", "adapter/adapter_config.json"

VALUES = {  # key: values that it cannot have, or that are not honoured
    "r": ("2", 2.0, nan, 0, -1, 10**18, 3, True, [], {}, None, DROP),
    "lora_alpha": ("16", nan, inf, 0, -1, True, [], None, -inf),
    "lora_dropout": ("0.1", nan, -0.1, 1, 1.5, True, []),
    "target_modules": (
        [],
        "",
        5,
        {},
        [5],
        [[]],
        True,
        None,
        DROP,
        ["no_such"],
        "(",
        "(a+)+$",
        [""],
        "q" * 100_000,
    ),
    "use_rslora": ("false", 1, [], nan),
    "use_dora": ("false", 1, True),
    "fan_in_fan_out": ("false", 1),
    "bias": (5, True, ["none"]),
    "peft_type": ("LOHA", "lora", 5, [], {}, None, DROP),
    "task_type": (5, [], {}),
    "rank_pattern": ({"q_proj": 4}, 5, [1], "x", {"(": 1}, {"(a|[a-z_.0-9]+)+!": 4}, {"q_proj": 10**9}),
    "alpha_pattern": (5, [1], {"q_proj": nan}),
    "modules_to_save": (["lm_head"], 5, "lm_head", {}, [5]),
    "layers_to_transform": ([0], 5, "x", {}, [-1], list(range(200_000))),
    "layer_replication": ([[0, 1]], 5),
    "init_lora_weights": ("pissa_niter_4", "loftq", 5, [], {}),
    "target_parameters": (["x"], 5),
    "trainable_token_indices": (
        [1],
        {"embed_tokens": [1]},
        5,
        [-1],
        [10**25],
        list(range(200_000)),
        {"embed_tokens": 5},
        {"embed_tokens": ["a"]},
    ),
    "exclude_modules": (["q_proj"], "(", 5),
    "base_model_name_or_path": (
        5,
        [],
        {},
        True,
        nan,
        "no-such/model",
        "",
        "x" * 100_000,
        "\x1b[31mmodel",
        "a\0model",
    ),
    "revision": (5, [], {}, True),
    "lora_bias": (True, "false"),
    "use_qalora": (True,),
}
OF_THE_BASE = ("base_model_name_or_path", "revision")  # merging and evaluation need the base; the linter not
STRANGE = {
    "an unknown key": {"surprise": 1},
    "an unknown key with an escape sequence": {"surprise\x1b[2J": "\x1b]0;title\x07"},
    "an unknown key with a line end": {"surprise\n\r": "a\nb"},
    "an unknown key of 100,000 characters": {"surprise" * 12_500: 1},
    "an unknown key that holds a megabyte": {"surprise": "x" * 1_000_000},
    "an unknown key with half a surrogate pair": {"surprise\udfff": "\ud800"},
}
WHOLE = {
    "empty": write(FILE, ""),
    "a list": write(FILE, "[]"),
    "null": write(FILE, "null"),
    "an empty object": write(FILE, "{}"),
    "cut": cut(FILE, 0.5),
    "not UTF-8": edit_bytes(FILE, lambda data: data.replace(b"LORA", b"L\xe9RA")),
    "binary": write(FILE, bytes(range(256))),
    "nested 100,000 deep": write(FILE, "[" * 100_000),
    "an integer of 5,000 digits": edit_bytes(
        FILE, lambda data: data.replace(b'"r": 2', b'"r": ' + b"9" * 5000)
    ),
    "a key twice": edit_bytes(FILE, lambda data: data.replace(b"{", b'{"r": 9, ', 1)),
    "a directory": folder(FILE),
    "a pipe": fifo(FILE),
    "/dev/zero": link(FILE, "/dev/zero"),
    "absent": remove(FILE),
}
NO_ADAPTER = ("absent", "a directory", "a pipe", "/dev/zero")  # for the linter; the others are its findings


def cases() -> Iterator[Case]:
    commands = cycle(READ_AN_ADAPTER)
    with_base = cycle(
        command for command in READ_AN_ADAPTER if "evaluate" in command or "--output" in command
    )
    for key, values in VALUES.items():
        for value in values:
            command = next(with_base if key in OF_THE_BASE or _fits_alone(key, value) else commands)
            words = f"{key}|{_said(value)}" if key in OF_THE_BASE else WORDS.get(key, key)
            yield _case(command, words, set_keys(FILE, **{key: value}), f"{key} = {_text(value)}")
    for name, keys in STRANGE.items():
        yield _case(next(commands), "surprise", set_keys(FILE, **keys), name)
    for name, change in WHOLE.items():
        for command in (next(commands), next(commands)):
            yield _case(command, "adapter_config.json|peft_type", change, f"the file is {name}")
        if name == "a key twice":  # PEFT takes the last one, and so the linter may
            continue
        code = 2 if name in NO_ADAPTER else 1
        yield make_case(
            KIND, f"the file is {name} (lint_adapter)", LINT, "adapter_config.json|", change=change, code=code
        )


ONLY_BESIDE_A_BASE = {
    "target_modules": (["no_such"], "(a+)+$", "q" * 100_000, [""]),
    "exclude_modules": (["q_proj"], "("),
    "layers_to_transform": ([0], 5),
    "modules_to_save": (["lm_head"],),
    "trainable_token_indices": ([1], {"embed_tokens": [1]}, [-1], [10**25]),
}
WORDS = {  # a contradiction is told by the tensor that is missing or unexpected
    "r": "r = |r must|lora_rank|rank|model needs|key r",
    "target_modules": "target",
    "use_dora": "use_dora|lora_magnitude_vector",
    "exclude_modules": "exclude_modules|target_modules|unexpected",
    "layers_to_transform": "layers_to_transform|unexpected|names no layer",
    "lora_bias": "lora_bias|lora_B.bias",
    "modules_to_save": "modules_to_save|missing",
    "rank_pattern": "rank_pattern|rank r",
    "trainable_token_indices": "trainable_token",
}


def _fits_alone(key: str, value: object) -> bool:
    """Whether only the base model shows that a value is wrong."""
    return value in ONLY_BESIDE_A_BASE.get(key, ())


def _said(value: object) -> str:
    return value[-5:] if isinstance(value, str) and value else "--model"


def _case(command: str, words: str, change: Edit, name: str) -> Case:
    return make_case(KIND, f"{name} ({_title(command)})", command, words, change=change)


def _title(command: str) -> str:
    return "export" if "export_adapter" in command else command.split()[0]


def _text(value: object) -> str:
    return "absent" if value is DROP else json.dumps(value)[:60]
