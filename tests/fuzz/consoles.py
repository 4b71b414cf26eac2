"""Every script at work on words and names in many kinds of letters, on a console of one encoding.

python -m fuzz.consoles ENCODING REPORT runs each of them once. The encoding of file names and the default one
of files come from the program's own environment.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from fuzz.bad_inputs.controls import tune
from fuzz.case import Case, make_case
from fuzz.judge import write_report
from fuzz.runner import run_cases

# As a command line gives it: where file names are ASCII, other bytes become halves of surrogate pairs.
NAME = os.fsdecode("größe-数据".encode())
TEXTS = ("Füchse sagen", "你好 🦊", "Эхо 数据")
COMMANDS = {  # of each script: real work that succeeds, but for the codes below
    "train": "--config run.yaml --dataset NAME.jsonl --exact_match_samples 2 --output_dir NAME",
    "prepare": "--model model --dataset NAME.jsonl --show 2 --output NAME",
    "evaluate": "--adapter NAME=run --dataset NAME.jsonl --exact_match_samples 2 --samples 2 --output NAME",
    "chat": "--adapter run --input NAME.jsonl --output NAME --max_new_tokens 2",
    "merge": "--adapter run --output NAME",
    "serve": "--adapter NAME=run --port 0 --dry_run",
    "convert": "--model pickled --output NAME",
    "memory": "--model model --picture NAME.png",
    "sweep": "--config NAME.yaml --together",
    "train_together": "NAME.2.yaml NAME.3.yaml",
    "compare": "run NAME.run --output NAME.png",
    "share": "--adapter run --upload NAME",
    "lint_adapter": "NAME.run",
    "combine": "--adapter NAME.run:0.5 --output NAME",
    "extract": "--base model --tuned tuned --lora_rank 2 --output NAME",
    "check_gpu": "--only NAME",
    "experiments": "live_bytes --quick --output NAME",
}
SILENT = {"check_gpu", "lint_adapter", "share"}  # They print no name and no text of these files to stdout.
CODES = {"check_gpu": 2, "share": 2}  # No section and no address is called so.
if sys.getfilesystemencoding() != "utf-8":
    # Their files are UTF-8, and name files that cannot exist here.
    CODES |= {"sweep": 2, "train_together": 2}
    SILENT |= {"sweep", "train_together"}


def make_files() -> None:
    """The files of the commands, beside those of the fuzzer."""
    rows = [{"prompt": f"{TEXTS[i % 3]} {i}:", "completion": TEXTS[(i + 1) % 3]} for i in range(8)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(f"{NAME}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = json.loads(Path("run.yaml").read_text(encoding="utf-8"))
    named = os.fsencode(NAME).decode("utf-8")
    sweep = settings | {"dataset": f"{named}.jsonl", "output_dir": named, "sweep": {"lora_rank": [1, 2]}}
    Path(f"{NAME}.yaml").write_text(json.dumps(sweep), encoding="utf-8")
    for rank in (2, 3):
        own = settings | {"dataset": f"{named}.jsonl", "output_dir": f"{named}.{rank}", "lora_rank": rank}
        Path(f"{NAME}.{rank}.yaml").write_text(json.dumps(own), encoding="utf-8")
    shutil.copytree("run", f"{NAME}.run")
    shutil.copytree("model", "pickled")
    torch.save(load_file("model/model.safetensors"), "pickled/pytorch_model.bin")
    Path("pickled/model.safetensors").unlink()
    tune()


def cases(encoding: str) -> Iterator[Case]:
    """A case for each script. What the encoding lacks is shown as an escape."""
    locale = {name: os.environ[name] for name in ("LC_ALL", "PYTHONUTF8") if name in os.environ}
    shown = NAME.encode(encoding, "backslashreplace").decode(encoding)
    for script, words in COMMANDS.items():
        yield make_case(
            "console",
            script,
            f"{script} {words}".replace("NAME", NAME),
            "",
            change=make_files,
            environment=locale | {"PYTHONIOENCODING": encoding},
            encoding=encoding,
            shows=() if script in SILENT else (shown,),
            code=CODES.get(script, 0),
        )


if __name__ == "__main__":
    encoding, report = sys.argv[1:]
    write_report(run_cases(list(cases(encoding)), workers=2, seconds=60), [], Path(report))
