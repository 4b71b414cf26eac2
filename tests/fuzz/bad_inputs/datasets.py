"""Rows that cannot be read, in every format."""

import gzip
import json
from collections.abc import Iterator
from itertools import cycle

from fuzz.case import Case, make_case, nothing
from fuzz.edits import Edit, both, fifo, folder, link, write, write_json
from fuzz.place import CHAT_TEMPLATE

KIND = "dataset"
COMMANDS = (
    "train --config run.yaml --output_dir out --dataset",
    "prepare --model model --output out --dataset",
    "evaluate --adapter adapter --dataset",
)
GOOD = '{"prompt": "a", "completion": "b"}\n'
ROWS = {  # name: the content of a .jsonl file, in which a good row comes first
    "is no JSON": "{nonsense}",
    "is cut": '{"prompt": "a", "comp',
    "is a list": "[1, 2]",
    "is a number": "5",
    "is null": "null",
    "is text": '"a"',
    "has no completion": '{"prompt": "a"}',
    "has a number for prompt": '{"prompt": 5, "completion": "b"}',
    "has null for completion": '{"prompt": "a", "completion": null}',
    "has a list for completion": '{"prompt": "a", "completion": ["b"]}',
    "is nested 100,000 deep": '{"prompt": ' + "[" * 100_000,
    "has an integer of 5,000 digits": '{"prompt": ' + "9" * 5000 + "}",
    "has a megabyte for a number": '{"prompt": "a", "completion": [' + "1, " * 400_000 + "1]}",
    "has a column with an escape sequence": '{"\\u001b[2Jsurprise": 1}',
    "has NaN for completion": '{"prompt": "a", "completion": NaN}',
}
FILES = {  # name of the file: its content, and a word
    "empty.jsonl": ("", "empty"),
    "blank.jsonl": ("\n" * 1000, "empty"),
    "columns.jsonl": ('{"question": "a", "answer": "b"}\n', "question"),
    "none.jsonl": ("{}\n", "none.jsonl"),
    "utf8.jsonl": (GOOD.encode() + b'{"prompt": "caf\xe9"}\n', "utf8.jsonl"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "utf16.jsonl"),
    "binary.jsonl": (bytes(range(256)) * 64, "binary.jsonl"),
    "column.jsonl": (json.dumps({"surprise\x1b[2J" + "x" * 100_000: "a"}) + "\n", "surprise"),
    "long.jsonl": (
        (json.dumps({"prompt": "a " * 2000, "completion": "b"}) + "\n") * 4,
        "long.jsonl|cutoff_len",
    ),
    "object.json": ('{"a": 1}', "object.json"),
    "two.json": ('{"a": [{"x": 1}],\n "b": [{"x": 1}]}', "two.json"),
    "scalar.json": ("5", "scalar.json"),
    "deep.json": ("[" * 100_000, "deep.json"),
    "cut.json": ('[{"prompt": "a",', "cut.json"),
    "header.csv": ("prompt,completion\n", "header.csv"),
    "cells.csv": ("prompt,completion\na,b,c\n", "cells.csv"),
    "missing.csv": ("prompt,completion\na\n", "missing.csv"),
    "quote.csv": ('prompt,completion\n"a,b\n', "quote.csv"),
    "columns.csv": (",".join(f"c{i}" for i in range(100_000)) + "\n" + "x," * 99_999 + "x\n", "columns.csv"),
    "cells.tsv": ("prompt\tcompletion\na\tb\tc\n", "cells.tsv"),
    "blank.txt": (" \n\n \n", "empty"),
    "utf8.txt": (b"caf\xe9\n", "utf8.txt"),
    "text.parquet": ("not parquet", "text.parquet"),
    "cut.parquet": (b"PAR1" + bytes(100), "cut.parquet"),
    "ends.parquet": (b"PAR1" + bytes(100) + (2**31 - 1).to_bytes(4, "little") + b"PAR1", "ends.parquet"),
    "plain.jsonl.gz": (GOOD, "plain.jsonl.gz"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 1000)[:40], "cut.jsonl.gz"),
    "noise.jsonl.gz": (gzip.compress(GOOD.encode())[:10] + bytes(range(100)), "noise.jsonl.gz"),
    "bomb.jsonl.gz": (gzip.compress(bytes(1 << 24)) * 256, "bomb.jsonl.gz"),  # 4 GiB of zeros
    "newlines.jsonl.gz": (gzip.compress(b"\n" * (1 << 24)) * 64, "newlines.jsonl.gz"),  # 1 GiB of line ends
    "file.xyz": (GOOD, ".xyz"),
    "file": (GOOD, "file"),
    "file.jsonl.zip": (GOOD, ".zip"),
}
CHATS = {  # the value of `messages`: a word of the message
    '"hello"': "messages",
    "5": "messages",
    "[]": "assistant",
    "[5]": "message 1",
    '["hello"]': "message 1",
    "[[]]": "message 1",
    '[{"role": "user"}]': "content",
    '[{"content": "a"}]': "role",
    '[{"role": 5, "content": "a"}]': "role",
    '[{"role": "user", "content": 5}]': "content",
    '[{"role": "user", "content": [{"type": "text", "text": "a"}]}]': "content",
    '[{"role": "robot", "content": "a"}]': "robot",
    '[{"role": "robot\\u001b[2J", "content": "a"}]': "robot",
    '[{"role": "user", "content": "a"}]': "assistant",
    '[{"role": "assistant", "content": "a", "weight": 0.5}]': "weight",
    '[{"role": "assistant", "content": "a", "tool_calls": [{}]}]': "tool_calls",
    '[{"from": "human", "content": "a"}]': "value",
}
ALPACAS = {  # a row: a word of the message
    '{"instruction": 5, "output": "b"}': "instruction",
    '{"instruction": "a", "output": 5}': "output",
    '{"instruction": "a", "input": 5, "output": "b"}': "input",
    '{"instruction": "a", "output": "b", "history": "x"}': "history",
    '{"instruction": "a", "output": "b", "history": [["x"]]}': "history",
    '{"instruction": "a", "output": "b", "system": 5}': "system",
    '{"text": 5}': "text",
}
CHOOSE = "chat --adapter sql=adapter --max_new_tokens 1 --output answers.jsonl --input"
ADAPTERS = {  # the value of a question's `adapter`: a word of the message
    '"nobody"': "'nobody'",
    '"SQL"': "nearest|known",
    '"adapter"': "'adapter'",
    '" "': "' '",
    '"sql\\u001b[2J"': "sql",
    '"keys"': "'keys'",
    "5": "adapter 5",
    "true": "adapter True",
    "NaN": "adapter nan|NaN",
    "[]": "adapter []",
    '["sql"]': "['sql']",
    '{"sql": 1}': "{'sql': 1}",
    '"' + "x" * 1_000_000 + '"': "xxx",
}
PLACES = {  # name of the file: how it is made, and a word
    "pipe.jsonl": (fifo, "pipe.jsonl"),
    "folder.jsonl": (folder, "folder.jsonl"),
    "zero.jsonl": (lambda path: link(path, "/dev/zero"), "zero.jsonl"),
    "zero.csv": (lambda path: link(path, "/dev/zero"), "zero.csv"),
    "zero.json": (lambda path: link(path, "/dev/zero"), "zero.json"),
    "zero.txt": (lambda path: link(path, "/dev/zero"), "zero.txt"),
    "zero.jsonl.gz": (lambda path: link(path, "/dev/zero"), "zero.jsonl.gz"),
    "zero.parquet": (lambda path: link(path, "/dev/zero"), "zero.parquet"),
    "circle.jsonl": (lambda path: link(path, path), "circle.jsonl"),
    "absent.jsonl": (lambda path: nothing, "absent.jsonl"),
    "/dev/zero": (lambda path: nothing, "/dev/zero"),
    "/dev/stdin": (lambda path: nothing, "/dev/stdin"),
    "/dev/full": (lambda path: nothing, "/dev/full"),
    "/proc/self/mem": (lambda path: nothing, "/proc/self/mem"),
    "newlines.jsonl": (lambda path: repeat(path, b"\n", 400), "newlines.jsonl|empty"),
    "newlines.csv": (lambda path: repeat(path, b"\n", 400), "newlines.csv|empty"),
    "newlines.txt": (lambda path: repeat(path, b"\n", 400), "newlines.txt|empty"),
    "newlines.json": (lambda path: repeat(path, b"\n", 400), "newlines.json|empty"),
    "cell.csv": (lambda path: repeat(path, b"x", 300), "cell.csv"),
}
NAMES = {  # value of --dataset: a word
    ",": ",",
    "train.jsonl,": "train.jsonl",
    "train.jsonl:0": "weight",
    "train.jsonl:0.5,chat.jsonl": "weight",
    f"train.jsonl:{'9' * 5000},table.csv:1": "train.jsonl|weight|table.csv",
    "train.jsonl:1e5": "train.jsonl:1e5",
    "../../../../../../etc/passwd": "passwd",
    ".": "dataset|directory",
}
INFO = "data/dataset_info.json"
ENTRIES = {  # value of the entry `mine` in dataset_info.json: a word
    "5": "mine",
    "[]": "mine",
    '"train.jsonl"': "mine",
    '{"file_name": 5}': "file_name",
    '{"file_name": ["a"]}': "file_name",
    '{"file_name": "absent.jsonl"}': "absent.jsonl",
    '{"file_name": ""}': "mine",
    '{"file_name": "a\\u0000b.jsonl"}': "mine|a",
    '{"file_name": "x.jsonl", "columns": 5}': "columns",
    '{"file_name": "../train.jsonl", "columns": {"prompt": 5, "response": "b"}}': "mine|prompt",
    '{"file_name": "../train.jsonl", "columns": {"prompt": ["a"], "response": {}}}': "mine|prompt",
    '{"file_name": "../train.jsonl", "columns": {"messages": 5}}': "mine|messages",
    '{"file_name": "x.jsonl", "formatting": "nonsense"}': "nonsense",
    '{"file_name": "x.jsonl", "formatting": 5}': "formatting",
    '{"file_name": "x.jsonl", "ranking": true}': "ranking",
    '{"file_name": "x.jsonl", "formatting": "sharegpt", "tags": {"role_tag": 5}}': "role_tag",
    '{"file_name": "x.jsonl", "formatting": "sharegpt", "tags": 5}': "tags",
    '{"script_url": "evil.py"}': "script_url",
}


def cases() -> Iterator[Case]:
    commands = cycle(COMMANDS)
    for name, row in ROWS.items():
        change = write("bad.jsonl", GOOD * 3 + row + "\n" + GOOD)
        yield _case(
            f"a row {name}", f"{next(commands)} bad.jsonl", "bad.jsonl, line 4|1 row is wrong", change
        )
    for name, (content, word) in FILES.items():
        yield _case(name, f"{next(commands)} {name}", word, write(name, content))
    template = write_json(
        "words/tokenizer_config.json", {"eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    )
    for messages, word in CHATS.items():
        rows = write("bad.jsonl", f'{{"messages": {messages}}}\n')
        for command in (COMMANDS[0], COMMANDS[2]):
            name = f"messages: {messages[:60]}"
            yield _case(name, f"{command} bad.jsonl --model words", word, both(template, rows))
    for row, word in ALPACAS.items():
        yield _case(f"a row {row[:60]}", f"{COMMANDS[0]} bad.jsonl", word, write("bad.jsonl", row + "\n"))
    for value, word in ADAPTERS.items():
        rows = write("bad.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", "adapter": {value}}}\n')
        words = ("bad.jsonl, line 2", word)
        yield _case(f"a question for the adapter {value[:40]}", f"{CHOOSE} bad.jsonl", words, rows)
    for name, (make, word) in PLACES.items():
        yield _case(name, f"{next(commands)} {name}", word, make(name))
    for value, word in NAMES.items():
        yield _case(f"--dataset {value[:40]}", f"{next(commands)} {value}", word, nothing)
    for entry, word in ENTRIES.items():
        change = write(INFO, f'{{"mine": {entry}}}')
        yield _case(
            f"dataset_info.json: {entry[:60]}", f"{COMMANDS[0]} mine --dataset_dir data", word, change
        )
    for text in ("[]", "5", "nonsense", "[" * 100_000, ""):
        change = write(INFO, text)
        command = f"{COMMANDS[0]} mine --dataset_dir data"
        yield _case(f"dataset_info.json is {text[:10] or 'empty'}", command, "dataset_info.json", change)


def repeat(path: str, byte: bytes, megabytes: int) -> Edit:
    """A file of many bytes that are all the same."""

    def edit() -> None:
        with open(path, "wb") as file:
            for _ in range(megabytes):
                file.write(byte * 1_000_000)

    return edit


def _case(name: str, command: str, word: str, change: Edit) -> Case:
    script = command.split()[0]
    words = f"{word}|wrong in" if script == "prepare" else word  # its rows are listed above the error
    return make_case(KIND, f"{name} ({script})", command, words, change=change, remarks=script == "prepare")
