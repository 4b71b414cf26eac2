"""config.json of a model that somebody else made."""

import json
from collections.abc import Iterator
from itertools import cycle
from math import inf, nan

from fuzz.bad_inputs.commands import READ_A_MODEL, TRAIN
from fuzz.case import Case, make_case
from fuzz.edits import DROP, Edit, cut, edit_bytes, fifo, folder, link, remove, set_keys, write

KIND, FILE = "config.json", "model/config.json"

SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim max_position_embeddings
    """.split()
NO_SIZES = ("64", 64.0, nan, -1, 0, 10**18, True, [])
VALUES = {  # field: values that it cannot have
    "num_hidden_layers": (10**7,),
    "num_attention_heads": (3, 10**6),
    "num_key_value_heads": (3,),
    "head_dim": (7,),
    "rms_norm_eps": ("1e-6", nan, inf, -1e-6, True, [], {}),
    "rope_theta": (0, True, -1, nan, inf, "10000", [], False),
    "rope_scaling": (
        5, "linear", [], [1], True, {"rope_type": "yarn", "factor": 0}, {"rope_type": 5}, {"rope_type": []},
        {"rope_type": "linear"}, {"rope_type": "linear", "factor": "2"}, {"rope_type": "linear", "factor": nan},
        {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": -2},
        {"rope_type": "linear", "factor": True}, {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "linear", "factor": 2.0, "surprise": 1},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": nan, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": "8192"},
    ),
    "rope_parameters": (5, "default", {"rope_type": "default", "rope_theta": "1e4"}, {"rope_theta": nan}),
    "tie_word_embeddings": ("false", "true", 1, 0, [], {}),
    "attention_bias": ("false", 1, []),
    "mlp_bias": ("false", 1, {}),
    "use_sliding_window": ("false",),
    "torch_dtype": (5, "int8", "float8_e4m3fn", [], {}, True),
    "bos_token_id": ("1", -5, 1.5, True, [], {}, nan),
    "eos_token_id": ("2", -5, 1.5, True, ["2"], [nan], {}, [[2]], [True]),
    "pad_token_id": ("0", -7, 1.5, True, [0], {}),
    "architectures": (5, [5], "LlamaForCausalLM", ["GPT2LMHeadModel"], {}, [["LlamaForCausalLM"]]),
    "model_type": (5, None, "gpt2", [], {}, "", True, "Llama", DROP),
    "hidden_act": ("gelu", [], 5, {}),
    "attention_dropout": (0.1, "0", True),
    "sliding_window": (64,),
    "layer_types": (5, ["a", "b"], [5, 5], [[], []], "full_attention"),
    "quantization_config": (5, [], "bnb", {"quant_method": "gptq", "bits": 4}, {"quant_method": []}, {}, True),
    "auto_map": (5, [1], "x", {"AutoModelForCausalLM": "modeling_evil.Evil"}),
    "partial_rotary_factor": (0.5, "1"),
    "is_encoder_decoder": (True, "false"),
    "num_experts": (8,),
}  # fmt: skip
QWEN = {  # more fields, of a Qwen2 with windows
    "sliding_window": (0, -1, "4096", 1.5, True, nan, []),
    "max_window_layers": ("1", -1, 1.5, nan, [], True),
    "use_sliding_window": ("true", 1),
    "layer_types": (["full_attention"], ["full_attention", "other"], [None, None]),
}
WORDS = {"architectures": "architecture", "torch_dtype": "dtype"}  # where a message may use another word
WHOLE = {
    "empty": write(FILE, ""),
    "a list": write(FILE, "[]"),
    "a text": write(FILE, '"llama"'),
    "null": write(FILE, "null"),
    "a number": write(FILE, "1e999"),
    "cut": cut(FILE, 0.5),
    "not UTF-8": edit_bytes(FILE, lambda data: data.replace(b"llama", b"ll\xe9ma")),
    "UTF-16": edit_bytes(FILE, lambda data: data.decode().encode("utf-16")),
    "binary": write(FILE, bytes(range(256))),
    "NUL": edit_bytes(FILE, lambda data: data + b"\0"),
    "nested 100,000 deep": write(FILE, "[" * 100_000),
    "objects nested 100,000 deep": write(FILE, '{"a":' * 100_000),
    "an integer of 5,000 digits": edit_bytes(FILE, lambda data: data.replace(b"320", b"9" * 5000)),
    "a comma too many": edit_bytes(FILE, lambda data: data.rstrip().removesuffix(b"}") + b",}"),
    "a field twice": edit_bytes(FILE, lambda data: data.replace(b"{", b'{"vocab_size": 9, ', 1)),
    "absent": remove(FILE),
    "a directory": folder(FILE),
    "a pipe": fifo(FILE),
    "/dev/zero": link(FILE, "/dev/zero"),
    "300 megabytes of blanks": lambda: _write_blanks(300),
}
STRANGE = {
    "an unknown field": {"surprise": 1},
    "an unknown field with an escape sequence": {"surprise\x1b[2J": "\x1b]0;title\x07"},
    "an unknown field with line ends": {"surprise\n\r\u2028": "a\nb"},
    "an unknown field of 100,000 characters": {"surprise" * 12_500: 1},
    "an unknown field with half a surrogate pair": {"surprise\ud800": 1},
    "an unknown field that holds a megabyte": {"surprise": "x" * 1_000_000},
    "an unknown field nested 90 deep": {"surprise": json.loads("[" * 90 + "1" + "]" * 90)},
    "a model type with an escape sequence": {"model_type": "surprise\x1b[31m"},
}


def cases() -> Iterator[Case]:
    commands = cycle(READ_A_MODEL)
    for field in SIZES:
        for value in NO_SIZES:
            yield _case(next(commands), field, set_keys(FILE, **{field: value}), f"{field} = {_text(value)}")
    for field, values in VALUES.items():
        for value in values:
            yield _case(next(commands), field, set_keys(FILE, **{field: value}), f"{field} = {_text(value)}")
    qwen = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_bias=DROP, mlp_bias=DROP)
    qwen |= dict(use_sliding_window=True, sliding_window=64)
    for field, values in QWEN.items():
        for value in values:
            name = f"Qwen2: {field} = {_text(value)}"
            yield _case(next(commands), field, set_keys(FILE, **qwen | {field: value}), name)
    for name, fields in STRANGE.items():
        yield _case(next(commands), "surprise", set_keys(FILE, **fields), name)
    for name, change in WHOLE.items():
        yield _case(next(commands), "config.json", change, f"the file is {name}")
    yield make_case(KIND, "a missing size", TRAIN, "hidden_size", change=set_keys(FILE, hidden_size=DROP))


def _case(command: str, field: str, change: Edit, name: str) -> Case:
    return make_case(KIND, f"{name} ({command.split()[0]})", command, WORDS.get(field, field), change=change)


def _text(value: object) -> str:
    return "absent" if value is DROP else json.dumps(value)[:60]


def _write_blanks(megabytes: int) -> None:
    with open(FILE, "wb") as file:
        for _ in range(megabytes):
            file.write(b" " * 1_000_000)
