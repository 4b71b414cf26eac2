"""Good inputs, one or more a script: they must succeed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from fuzz.bad_inputs.commands import (
    CHAT,
    CHAT_TEMPLATE,
    COMBINE,
    COMPARE,
    EVALUATE,
    EXPORT,
    EXTRACT,
    LINT,
    MEMORY,
    MERGE,
    PREPARE,
    SERVE,
    TRAIN,
)
from fuzz.case import Case, make_case
from fuzz.edits import both, write

SWEEP = '{"model": "model", "dataset": "train.jsonl", "output_dir": "out", "max_steps": 1, "sweep": {"seed": [1]}}'
GRID = SWEEP.replace('"seed": [1]', '"lora_rank": [1, 2]')
ALONE = '{"model": "model", "dataset": "train.jsonl", "output_dir": "alone", "max_steps": 1}'
PAIR = write("alone.yaml", ALONE), write("other.yaml", ALONE.replace('"alone"', '"other", "lora_rank": 2'))
RESUME = "train --config run.yaml --max_steps 2 --output_dir out --resume_from_checkpoint run/checkpoint-1"
COMMANDS = {
    "train": TRAIN,
    "train on a template": CHAT_TEMPLATE,
    "train on shards": f"{TRAIN} --model shards",
    "train on prepared rows": f"{TRAIN} --dataset prepared/train.jsonl",
    "resume": RESUME,
    "prepare": PREPARE,
    "evaluate": EVALUATE,
    "evaluate two adapters": f"{EVALUATE} --adapter again=adapter --exact_match_samples 2 --max_new_tokens 2",
    "chat": CHAT,
    "chat with a file": "chat --adapter adapter --input questions.jsonl --output answers.jsonl --max_new_tokens 2",
    "merge": MERGE,
    "serve": SERVE,
    "export": EXPORT,
    "combine": COMBINE,
    "memory": MEMORY,
    "memory of processes": f"{MEMORY} --processes 4 --parallel fsdp --link 25 --tflops 80",
    "compare": COMPARE,
    "compare on a page": f"{COMPARE} --html page.html",
    "lint_adapter": LINT,
    "experiments": "experiments",
    "a share of nothing to nobody": "share --help",
    "verify": "verify --help",
    "bench": "bench --help",
    "bench_serving": "bench_serving --help",
    "pretrain": "pretrain --help",
    "pictures": "pictures --help",
    "notebooks": "notebooks --help",
    "check_gpu": "check_gpu --help",
}


def tune() -> None:
    """A model whose layers differ from the good one's."""
    shutil.copytree("model", "tuned")
    for path in Path("tuned").glob("*.safetensors"):
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def cases() -> Iterator[Case]:
    for name, command in COMMANDS.items():
        yield make_case("control", name, command, (), code=0)
    yield make_case(
        "control", "sweep", "sweep --config sweep.yaml", (), change=write("sweep.yaml", SWEEP), code=0
    )
    choosing = CHAT.replace("--instruction say", "--adapter b=adapter --max_new_tokens 2 --input q.jsonl")
    rows = "".join(
        f'{{"prompt": "say", "adapter": {name}}}\n' for name in ('"b"', "null", '"adapter"', '"base"')
    )
    yield make_case(
        "control", "chat with a file that chooses adapters", f"{choosing} --output answers.jsonl", (),
        change=write("q.jsonl", rows), code=0, shows=("4 answers by b, base, adapter: answers.jsonl",),
    )  # fmt: skip
    yield make_case(
        "control",
        "sweep together",
        "sweep --config sweep.yaml --together",
        (),
        change=write("sweep.yaml", GRID),
        code=0,
    )
    for name, words in (("together", ""), ("together, resumed", " --resume")):
        command = f"train_together alone.yaml other.yaml{words}"
        yield make_case("control", name, command, (), change=both(*PAIR), code=0)
    yield make_case("control", "extract", EXTRACT, (), change=tune, code=0)
    yield make_case("control", "no HOME", f"{TRAIN} --seed 7", (), environment={"HOME": ""}, code=0)
    for suffix in ("csv", "txt"):
        command = f"{PREPARE} --dataset {'table.csv' if suffix == 'csv' else 'plain.txt'}"
        yield make_case(
            "control", f"prepare .{suffix}", command.replace("--dataset train.jsonl ", ""), (), code=0
        )
