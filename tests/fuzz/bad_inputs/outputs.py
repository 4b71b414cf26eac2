"""Outputs that would overwrite an input, and outputs that cannot be written."""

from collections.abc import Iterator
from functools import partial

from fuzz.bad_inputs.commands import COMPARE, EVALUATE, MEMORY
from fuzz.case import Case, make_case, nothing
from fuzz.edits import Edit, both, fifo, link, write

KIND = "output"
TRAIN = "train --config run.yaml"
CHAT = "chat --adapter adapter --input questions.jsonl --max_new_tokens 1 --output"
PREPARE = "prepare --model model --dataset train.jsonl --output"
AGAIN = "prepare --model model --overwrite_output_dir"
OVER_INPUTS = {  # command: how the files are made, and a word
    f"{EVALUATE} --output train.jsonl": (nothing, "train.jsonl"),
    f"{EVALUATE} --output ./train.jsonl": (nothing, "train.jsonl"),
    f"{EVALUATE} --output link.json": (link("link.json", "train.jsonl"), "link.json"),
    f"{EVALUATE} --output adapter/adapter_config.json": (nothing, "adapter_config.json"),
    f"{EVALUATE} --output adapter/adapter_model.safetensors": (nothing, "adapter_model.safetensors"),
    f"{EVALUATE} --output model/config.json": (nothing, "model/config.json"),
    f"{EVALUATE} --config run.yaml --output run.yaml": (nothing, "run.yaml"),
    f"{CHAT} questions.jsonl": (nothing, "questions.jsonl"),
    f"{CHAT} ../work/questions.jsonl": (nothing, "questions.jsonl"),
    f"{CHAT} adapter/adapter_config.json": (nothing, "adapter_config.json"),
    f"{CHAT} model/model.safetensors": (nothing, "model.safetensors"),
    f"{CHAT} model/tokenizer.model": (nothing, "tokenizer.model"),
    f"{MEMORY} --picture model/config.json": (nothing, "config.json"),
    f"{MEMORY} --picture model/model.safetensors": (nothing, "model.safetensors"),
    "memory --config run.yaml --picture run.yaml": (nothing, "run.yaml"),
    f"{COMPARE} --output run/metrics.jsonl": (nothing, "metrics.jsonl"),
    f"{COMPARE} --output run/training_config.yaml": (nothing, "training_config.yaml"),
    f"{COMPARE} --output run/adapter_model.safetensors": (nothing, "adapter_model.safetensors"),
    f"{COMPARE} --html run/metrics.jsonl": (nothing, "metrics.jsonl"),
    f"{COMPARE} --html run/README.md": (nothing, "README.md"),
    f"{TRAIN} --output_dir model": (nothing, "model"),
    f"{TRAIN} --output_dir ./model/ --overwrite_output_dir": (nothing, "model"),
    f"{TRAIN} --output_dir shards --model shards": (nothing, "shards"),
    f"{TRAIN} --output_dir run": (nothing, "run"),
    f"{TRAIN} --output_dir out --overwrite_output_dir --dataset out/metrics.jsonl": (
        write("out/metrics.jsonl", '{"prompt": "a", "completion": "b"}\n' * 4), "metrics.jsonl"),
    f"{AGAIN} --dataset prepared/train.jsonl --output prepared": (nothing, "prepared"),
    f"{AGAIN} --dataset ./prepared/../prepared/train.jsonl --output prepared": (nothing, "prepared"),
    f"{AGAIN} --dataset train.jsonl --output .": (nothing, "train.jsonl|working directory"),
    f"{PREPARE} prepared": (nothing, "prepared"),
    "merge --adapter adapter --output model": (nothing, "model"),
    "merge --adapter adapter --output adapter": (nothing, "adapter"),
    "merge --adapter adapter --export_adapter adapter": (nothing, "adapter"),
    "sweep --config out/seed-1.yaml": (
        write("out/seed-1.yaml", "model: model\ndataset: train.jsonl\noutput_dir: out\nsweep: {seed: [1]}\n"),
        "seed-1.yaml"),
    "bench --model model --output model/config.json": (nothing, "config.json"),
    "verify --model model --output model/config.json": (nothing, "config.json"),
    "pretrain --steps 1 --output model/config.json": (nothing, "config.json"),
}  # fmt: skip
OUTPUTS = {  # a command that ends where a file to write is to follow: its option
    f"{EVALUATE} --output": "output",
    CHAT: "output",
    f"{MEMORY} --picture": "picture",
    f"{COMPARE} --output": "output",
    f"{COMPARE} --html": "html",
    "bench --output": "output",
    "verify --output": "output",
    "check_gpu --table": "table",
}
DIRECTORIES = {  # the same of a directory to write
    "train --config run.yaml --output_dir": "output_dir",
    PREPARE: "output",
    "merge --adapter adapter --output": "output",
    "merge --adapter adapter --export_adapter": "output|export_adapter",
    "pretrain --steps 1 --output": "output",
    "pictures --output": "output",
    "notebooks --output": "output",
    "check_gpu --out": "out",
    "experiments rank_and_rate --output": "output",
}
UNWRITABLE = {  # name: a path, and how it is made
    "below a file": ("train.jsonl/x", nothing),
    "in /proc": ("/proc/nowhere/x", nothing),
    "of a name of 300 characters": ("x" * 300, nothing),
    "of a path of 5,000 characters": ("x/" * 2500 + "x", nothing),
    "below a link in a circle": ("circle/x", link("circle", "circle")),
}
NO_FILE = {
    "a directory": ("model", nothing),
    "in a directory that is absent": ("nowhere/x.json", nothing),
    "/dev/full": ("/dev/full", nothing),
    "a pipe": ("pipe", fifo("pipe")),
}
NO_DIRECTORY = {
    "a link in a circle": ("circle", link("circle", "circle")),
    "a file": ("train.jsonl", nothing),
    "/dev/null": ("/dev/null", nothing),
    "a pipe": ("pipe", fifo("pipe")),
    "a link to nothing, below a file": ("link", link("link", "train.jsonl/x")),
}
FULL = {  # command: bytes that a file may have; more than the script prints, less than its output
    f"{EVALUATE} --exact_match_samples 12 --output out.json": 1500,
    "chat --adapter adapter --input train.jsonl --max_new_tokens 1 --output out.jsonl": 700,
    f"{MEMORY} --picture out.png": 8000,
    f"{COMPARE} --output out.png": 8000,
    f"{PREPARE} out": 8000,
    "merge --adapter adapter --output out": 20_000,
    "merge --adapter adapter --output out/deep/inside": 20_000,
    "merge --adapter adapter --output out.gguf": 20_000,
    "merge --adapter adapter --export_adapter out": 2000,
}


def cases() -> Iterator[Case]:
    remarks = partial(make_case, KIND, remarks=True)  # the model that evaluates is named on stderr
    for command, (change, word) in OVER_INPUTS.items():
        yield make_case(KIND, _title(command), command, word, change=change)
    for places, commands in ((UNWRITABLE | NO_FILE, OUTPUTS), (UNWRITABLE | NO_DIRECTORY, DIRECTORIES)):
        for name, (path, change) in places.items():
            for command, option in commands.items():
                words = f"{option}|{path[:20]}"
                yield make_case(
                    KIND, f"{_title(command)} is {name}", f"{command} {path}", words, change=change
                )
    for command, size in FULL.items():
        yield remarks(f"{_title(command)}: the disk is full", command, "out", file_size=size)
    for name, change in (("a directory", _folder("compare.png")), ("a pipe", fifo("compare.png"))):
        yield make_case(
            KIND, f"compare: its default picture is {name}", COMPARE, "compare.png", change=change
        )


def _folder(path: str) -> Edit:
    return both(write(f"{path}/inside", "x"))


def _title(command: str) -> str:
    script, *words = command.split()
    return (
        f"{script} ... {' '.join(words[-2:])}"
        if "overwrite" not in command
        else f"{script} {' '.join(words[2:])}"
    )
