"""Settings files: the trainer's, a sweep's, and the one beside a stranger's adapter."""

import json
from collections.abc import Iterator
from functools import partial

from fuzz.bad_inputs.commands import CHAT, COMPARE, EVALUATE, MERGE
from fuzz.case import Case, make_case
from fuzz.edits import fifo, folder, link, remove, write
from fuzz.place import SETTINGS

KIND = "YAML"
GOOD = "model: model\ndataset: train.jsonl\noutput_dir: out\n"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
TEXTS = {  # name: content of the file
    "a billion laughs": LAUGHS + GOOD,
    "a thousand laughs in a value": GOOD + "run_name: &a [x, x]\nlora_target: [*a, *a, *a]\n",
    "an anchor within itself": GOOD + "lora_target: &a [*a]\n",
    "a merge of itself": GOOD + "x: &x\n  <<: *x\n",
    "lists 100,000 deep": GOOD + "lora_target: " + "[" * 100_000,
    "mappings 5,000 deep": GOOD + "lora_target: " + "{a: " * 5000 + "1" + "}" * 5000,
    "indented 3,000 deep": "".join(f"{' ' * i}a:\n" for i in range(3000)),
    "Python's tag": GOOD + "run_name: !!python/object/apply:os.system [touch pwned]\n",
    "an unknown tag": GOOD + "run_name: !secret x\n",
    "a list": "- model\n- dataset\n",
    "a number": "5\n",
    "a text": "just a text\n",
    "nothing": "",
    "only comments": "# nothing\n",
    "two documents": GOOD + "---\nseed: 1\n",
    "a key twice": GOOD + "seed: 1\nseed: 2\n",
    "a list as a key": GOOD + "? [a, b]\n: 1\n",
    "a mapping as a key": GOOD + "? {a: b}\n: 1\n",
    "a number as a key": GOOD + "5: 1\n",
    "an open quote": GOOD + 'run_name: "x\n',
    "a tab": GOOD + "\tseed: 1\n",
    "NUL": GOOD + "run_name: a\0b\n",
    "binary": bytes(range(256)) * 16,
    "not UTF-8": GOOD.encode() + b"run_name: caf\xe9\n",
    "UTF-16": GOOD.encode("utf-16"),
    "a date that is none": GOOD + "run_name: 2024-02-30\n",
    "an integer of 5,000 digits": GOOD + f"seed: {'9' * 5000}\n",
    "ten megabytes of blanks": " " * 10_000_000,
    "100,000 keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "a key of 100,000 characters": GOOD + f"? {'k' * 100_000}\n: 1\n",
}
VALUES = {  # key: values that it cannot have
    "seed": ("2024-01-01", "[1]", "{a: 1}", ".nan", ".inf", "true", "!!binary aGk=", '"1 2"'),
    "learning_rate": (".nan", ".inf", "-1", "0", "fast", "[1e-4]", "true", "1e400"),
    "lora_target": ("[]", "[1, 2]", "{q_proj: 1}", "5", '""', "[null]", "!!set {q_proj}", '"("'),
    "dataset": ("[]", "[5]", "{a: b}", '""', '["", ""]', "2024-01-01", "true"),
    "model": ("[model]", "{a: b}", '""', "true"),
    "output_dir": ("[a]", "{a: b}", '""', "true", '"a\\0b"'),
    "packing": ("maybe", "[true]", "2", "null"),
    "max_steps": ("1.5", "2024-01-01", "[1]", "null"),
    "report_to": ("[mlflow, 5]", "{a: 1}", "comet_ml"),
    "eval_dataset": ("[]", "{a: b}", '""'),
    "run_name": (
        "[x]",
        "{a: b}",
    ),
}
FILES = {  # name: what the file is
    "a pipe": fifo,
    "a directory": folder,
    "absent": remove,
    "/dev/zero": lambda path: link(path, "/dev/zero"),
    "/dev/tty": lambda path: link(path, "/dev/tty"),
    "a link to itself": lambda path: link(path, path.rpartition("/")[2]),
}
SWEPT = {  # the value of `sweep`: a word of the message
    "5": "sweep",
    "[]": "sweep",
    "{}": "sweep",
    "{seed: 1}": "seed",
    "{seed: []}": "seed",
    "{seed: {a: 1}}": "seed",
    "{seed: [1, 1]}": "seed",
    "{seed: [[1]]}": "seed",
    "{seed: [{a: 1}]}": "seed",
    "{seed: [.nan]}": "seed",
    "{seed: [null]}": "seed",
    "{nonsense: [1]}": "nonsense",
    "{output_dir: [a]}": "output_dir",
    "{resume_from_checkpoint: [a]}": "resume_from_checkpoint",
    '{run_name: ["' + "x" * 300 + '"]}': "run_name",
}
GRID = {
    key: list(range(1, 101)) for key in "seed lora_rank max_steps save_steps logging_steps cutoff_len".split()
}


EDITS = {name: partial(write, content=text) for name, text in TEXTS.items()} | FILES  # name: path -> edit
WORDS = {  # where the error may name the key
    "a key twice": "seed",
    "a thousand laughs in a value": "bad.yaml|run_name",
    "an anchor within itself": "bad.yaml|lora_target",
}
A_FEW = ("a billion laughs", "Python's tag", "a list", "lists 100,000 deep", "binary", "a pipe", "/dev/zero")


def cases() -> Iterator[Case]:
    train, sweep = "train --config bad.yaml", "sweep --config bad.yaml"
    for name, edit in EDITS.items():
        yield make_case(KIND, f"train: {name}", train, WORDS.get(name, "bad.yaml"), change=edit("bad.yaml"))
    for key, values in VALUES.items():
        for value in values:
            change = write("bad.yaml", _settings_with(key, value))
            yield make_case(KIND, f"train: {key}: {value}", train, key, change=change)
    for swept, word in SWEPT.items():
        text = f"{GOOD}sweep: {swept}\n"
        yield make_case(KIND, f"sweep: {swept[:40]}", sweep, word, change=write("bad.yaml", text))
    grid = write("bad.yaml", f"{GOOD}sweep: {json.dumps(GRID)}\n")
    yield make_case(KIND, "sweep: a grid of a trillion runs", sweep, "bad.yaml", change=grid)
    for name in A_FEW:
        yield make_case(KIND, f"sweep: {name}", sweep, "bad.yaml", change=EDITS[name]("bad.yaml"))
        several = "train_together run.yaml bad.yaml"
        yield make_case(KIND, f"train_together: {name}", several, "bad.yaml", change=EDITS[name]("bad.yaml"))
        for command, directory in (
            (EVALUATE, "adapter"),
            (CHAT, "adapter"),
            (MERGE, "adapter"),
            (COMPARE, "run"),
        ):
            title = f"{command.split()[0]}: {name} beside the weights"
            change = EDITS[name](f"{directory}/training_config.yaml")
            yield make_case(KIND, title, command, "training_config.yaml", change=change)


def _settings_with(key: str, value: str) -> str:
    """A good settings file as YAML, but for the text of one value."""
    settings = {name: json.dumps(good) for name, good in SETTINGS.items()} | {"output_dir": "out", key: value}
    return "".join(f"{name}: {text}\n" for name, text in settings.items())
