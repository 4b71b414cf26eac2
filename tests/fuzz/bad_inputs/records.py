"""metrics.jsonl, answers and settings of finished runs, which compare.py and sweep.py read."""

from collections.abc import Iterator

from fuzz.bad_inputs.commands import COMPARE
from fuzz.case import Case, make_case
from fuzz.edits import Edit, both, edit_bytes, fifo, folder, link, remove, write

KIND = "records"
METRICS, ANSWERS, SETTINGS = "metrics.jsonl", "answers.jsonl", "training_config.yaml"
LINES = {  # name: a line of metrics.jsonl that is no record
    "is a number": "5",
    "is a list": "[1]",
    "is null": "null",
    "is text": '"x"',
    "has no step": '{"loss": 1.0}',
    "has a step of text": '{"step": "x", "loss": 1.0}',
    "has a step that is a fraction": '{"step": 1.5, "loss": 1.0}',
    "has a step that is a list": '{"step": [1], "loss": 1.0}',
    "has a step below zero": '{"step": -1, "loss": 1.0}',
    "has a step of null": '{"step": null}',
    "has a step of 400 digits": '{"step": ' + "9" * 400 + ', "loss": 1.0}',
    "has a loss of text": '{"step": 3, "loss": "low"}',
    "has a loss of null": '{"step": 3, "loss": null}',
    "has a loss that is a list": '{"step": 3, "loss": [1.0]}',
    "has a loss that is true": '{"step": 3, "loss": true}',
    "has a held-out loss of text": '{"step": 3, "eval_loss": "low"}',
    "has a speed of text": '{"step": 3, "loss": 1.0, "tokens_per_second": "fast"}',
    "has a memory of text": '{"step": 3, "loss": 1.0, "memory": "x"}',
    "has seconds of text": '{"step": 3, "loss": 1.0, "seconds": "x"}',
    "is no JSON": "nonsense",
    "is not UTF-8": b'{"step": 3, "x": "caf\xe9"}',
    "is nested 100,000 deep": "[" * 100_000,
    "has an integer of 5,000 digits": '{"step": ' + "9" * 5000 + "}",
}
ANSWER_LINES = {  # name: a line of answers.jsonl that holds no answers
    "is a list": "[]",
    "is no JSON": "nonsense",
    "lacks an answer": '{"prompt": "a", "expected": "b", "base": "c"}',
    "has an answer of null": '{"prompt": "a", "expected": "b", "base": "c", "adapted": null}',
    "has a prompt that is a list": '{"prompt": ["a"], "expected": "b", "base": "c", "adapted": "d"}',
}
FILES = {  # name: path -> edit of metrics.jsonl
    "empty": lambda path: write(path, ""),
    "blank lines": lambda path: write(path, "\n\n"),
    "binary": lambda path: write(path, bytes(range(256)) * 8),
    "a pipe": fifo,
    "/dev/zero": lambda path: link(path, "/dev/zero"),
    "a directory": folder,
    "absent": remove,
}
SWEEP = "model: model\ndataset: train.jsonl\noutput_dir: out\nmax_steps: 1\nsweep: {seed: [1]}\n"
FINISHED = both(  # a run of the sweep that seems to be finished, with other settings
    write("sweep.yaml", SWEEP),
    write("out/seed-1/README.md", "done"),
    write(f"out/seed-1/{SETTINGS}", "seed: 2\n"),
)


def cases() -> Iterator[Case]:
    for name, line in LINES.items():
        for directory, command, first in (
            ("run", COMPARE, ""),
            ("other", "compare run other", '{"step": 1, "loss": 2.0}\n'),
        ):
            if (directory, len(name) % 2) == ("other", 0):
                continue
            change = _with_line(f"{directory}/{METRICS}", line, first)
            yield _case(f"a line {name} ({directory})", command, METRICS, change)
    for name, make in FILES.items():
        yield _case(f"the metrics are {name}", COMPARE, "metrics.jsonl", make(f"run/{METRICS}"))
    for name, line in ANSWER_LINES.items():
        change = _with_line(f"run/{ANSWERS}", line, "")
        yield _case(f"a line of answers {name}", f"{COMPARE} --html page.html", ANSWERS, change)
    for name in ("binary", "a pipe", "/dev/zero", "a directory"):
        yield _case(f"the answers are {name}", COMPARE, ANSWERS, FILES[name](f"run/{ANSWERS}"))
    yield _case(
        "a sweep's run was finished with other settings", "sweep --config sweep.yaml", "seed", FINISHED
    )
    for name, text in (
        ("a list", "[]"),
        ("no YAML", "{"),
        ("not UTF-8", b"\xe9"),
        ("5,000 deep", "[" * 5000),
    ):
        change = both(FINISHED, write(f"out/seed-1/{SETTINGS}", text))
        yield _case(
            f"a sweep's finished run has settings that are {name}",
            "sweep --config sweep.yaml",
            SETTINGS,
            change,
        )


def _with_line(path: str, line: str | bytes, first: str) -> Edit:
    """A file of metrics with a line in its middle."""
    data = line if isinstance(line, bytes) else line.encode()
    good = b'{"step": 4, "loss": 1.0}\n'
    if first:
        return write(path, first.encode() + data + b"\n" + good)
    return edit_bytes(path, lambda old: old + data + b"\n" + good)


def _case(name: str, command: str, word: str, change: Edit) -> Case:
    return make_case(KIND, name, command, word, change=change, remarks="the metrics are" in name)
