"""Tokenizers: sentencepiece's tokenizer.model, tokenizer.json, and the files beside them."""

import json
from collections.abc import Iterator
from itertools import cycle

from fuzz.bad_inputs.commands import READ_A_TOKENIZER
from fuzz.case import Case, make_case
from fuzz.edits import (
    Edit,
    cut,
    edit_bytes,
    edit_json,
    fifo,
    folder,
    link,
    remove,
    set_keys,
    write,
    write_json,
)

KIND = "tokenizer"
PIECES, WORDS, SETTINGS = "model/tokenizer.model", "words/tokenizer.json", "words/tokenizer_config.json"


def _set_within(*path: str | int, value: object) -> Edit:
    """An edit of tokenizer.json: a value somewhere in it."""

    def change(raw: dict) -> dict:
        inner = raw
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return raw

    return edit_json(WORDS, change)


SENTENCEPIECE = {
    "empty": write(PIECES, b""),
    "text": write(PIECES, "no pieces here"),
    "cut in half": cut(PIECES, 0.5),
    "cut to a tenth": cut(PIECES, 0.1),
    "cut by a byte": edit_bytes(PIECES, lambda data: data[:-1]),
    "zeros": write(PIECES, bytes(4096)),
    "noise": write(PIECES, bytes(i * 37 % 251 for i in range(4096))),
    "a pipe": fifo(PIECES),
    "a directory": folder(PIECES),
    "/dev/zero": link(PIECES, "/dev/zero"),
    "absent": remove(PIECES),
}
TOKENIZER_JSON = {
    "empty": write(WORDS, ""),
    "an empty object": write(WORDS, "{}"),
    "a list": write(WORDS, "[]"),
    "cut in half": cut(WORDS, 0.5),
    "binary": write(WORDS, bytes(range(256))),
    "nested 100,000 deep": write(WORDS, "[" * 100_000),
    "a pipe": fifo(WORDS),
    "/dev/zero": link(WORDS, "/dev/zero"),
    "a model of an unknown kind": _set_within("model", "type", value="Oracle"),
    "a model that is a number": _set_within("model", value=5),
    "a vocabulary that is a list": _set_within("model", "vocab", value=[1]),
    "an id below zero": _set_within("model", "vocab", "a", value=-1),
    "an id of 10^18": _set_within("model", "vocab", "a", value=10**18),
    "an id that is text": _set_within("model", "vocab", "a", value="5"),
    "merges of unknown pieces": _set_within("model", "merges", value=[["zz", "qq"]]),
    "merges that are numbers": _set_within("model", "merges", value=[1]),
    "added tokens that are numbers": _set_within("added_tokens", value=[5]),
    "a pre-tokenizer with a broken pattern": _set_within(
        "pre_tokenizer",
        value={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    ),
    "a post-processor of an unknown kind": _set_within("post_processor", value={"type": "Oracle"}),
    "a decoder of an unknown kind": _set_within("decoder", value={"type": "Oracle"}),
}
SETTING = {  # key of tokenizer_config.json: values that it cannot have
    "bos_token": (5, [], {"content": 5}, "<no such token>", True),
    "eos_token": (5, [], {"content": None, "x": 1}, "<no such token>", True),
    "pad_token": (5, [], {"content": []}),
    "unk_token": (5, {"content": 5}),
    "chat_template": (5, [5], {}, [{"name": 5}], [{"name": "default", "template": 5}], True),
    "added_tokens_decoder": (
        5, [], "x", {"one": {"content": "a"}}, {"-1": {"content": "a"}}, {"5": 5}, {"5": {"content": 5}},
        {"99999999999999999999": {"content": "a"}}, {"1": {}},
    ),
}  # fmt: skip
BESIDE = {
    "tokenizer_config.json is a list": (write(SETTINGS, "[]"), "tokenizer_config.json"),
    "tokenizer_config.json is cut": (cut(SETTINGS, 0.5), "tokenizer_config.json"),
    "tokenizer_config.json is nested 100,000 deep": (write(SETTINGS, "[" * 100_000), "tokenizer_config.json"),
    "tokenizer_config.json is a pipe": (fifo(SETTINGS), "tokenizer_config.json"),
    "tokenizer_config.json is /dev/zero": (link(SETTINGS, "/dev/zero"), "tokenizer_config.json"),
    "special_tokens_map.json is a list": (
        write("words/special_tokens_map.json", "[]"),
        "special_tokens_map.json",
    ),
    "special_tokens_map.json holds numbers": (
        write_json("words/special_tokens_map.json", {"bos_token": 5}),
        "bos_token",
    ),
    "added_tokens.json is a list": (write("words/added_tokens.json", "[1]"), "added_tokens.json"),
    "added_tokens.json holds texts": (write_json("words/added_tokens.json", {"<x>": "5"}), "<x>"),
    "added_tokens.json holds an unknown token": (write_json("words/added_tokens.json", {"<x>": 5}), "<x>"),
    "chat_template.jinja is not UTF-8": (write("words/chat_template.jinja", b"\xe9"), "chat_template.jinja"),
    "chat_template.jinja is a pipe": (fifo("words/chat_template.jinja"), "chat_template.jinja"),
    "chat_template.jinja is /dev/zero": (
        link("words/chat_template.jinja", "/dev/zero"),
        "chat_template.jinja",
    ),
    "an unknown token with an escape sequence": (set_keys(SETTINGS, eos_token="\x1b[2Jsurprise"), "surprise"),
    "an unknown token of 100,000 characters": (set_keys(SETTINGS, eos_token="surprise" * 12_500), "surprise"),
}


def cases() -> Iterator[Case]:
    commands = cycle(READ_A_TOKENIZER)
    for name, change in SENTENCEPIECE.items():
        yield _case(next(commands), f"tokenizer.model is {name}", "tokenizer", change)
    for command in (next(commands), next(commands)):
        setting = write_json("model/tokenizer_config.json", {"add_bos_token": "false"})
        yield _case(command, "add_bos_token is text", "add_bos_token", setting)
    words = cycle(_with_words(command) for command in READ_A_TOKENIZER)
    for name, change in TOKENIZER_JSON.items():
        yield _case(next(words), f"tokenizer.json is or has {name}", "tokenizer", change)
    for key, values in SETTING.items():
        for value in values:
            word = "added_tokens_decoder|adds" if key == "added_tokens_decoder" else key
            name = f"{key} = {json.dumps(value)[:60]}"
            yield _case(next(words), name, word, set_keys(SETTINGS, **{key: value}))
    for name, (change, word) in BESIDE.items():
        yield _case(next(words), name, word, change)
    small = set_keys("model/config.json", vocab_size=20)
    yield _case(
        "prepare --model model --dataset train.jsonl --output out",
        "more tokens than the model",
        "token",
        small,
    )


def _with_words(command: str) -> str:
    return (
        command.replace("--model model", "--model words")
        if "--model model" in command
        else f"{command} --model words"
    )


def _case(command: str, name: str, word: str, change: Edit) -> Case:
    return make_case(KIND, f"{name} ({command.split()[0]})", command, word, change=change)
