"""Variables and limits of the process."""

from collections.abc import Iterator

from fuzz.bad_inputs.commands import CHAT, COMPARE, EVALUATE, LINT, MEMORY, MERGE, PREPARE, TRAIN
from fuzz.case import Case, make_case

KIND = "environment"
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
PROCESSES = {  # name: variables, and a word
    "WORLD_SIZE is text": ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    "WORLD_SIZE is a fraction": ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE"),
    "WORLD_SIZE is below zero": ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
    "WORLD_SIZE is 10^18": (TWO | {"WORLD_SIZE": str(10**18)}, "WORLD_SIZE"),
    "WORLD_SIZE stands alone": ({"WORLD_SIZE": "2"}, "RANK"),
    "RANK is text": (TWO | {"RANK": "first"}, "RANK"),
    "RANK is below zero": (TWO | {"RANK": "-1"}, "RANK"),
    "RANK is too large": (TWO | {"RANK": "2"}, "RANK"),
    "LOCAL_RANK is text": (TWO | {"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    "MASTER_ADDR is absent": (
        {name: value for name, value in TWO.items() if name != "MASTER_ADDR"},
        "MASTER_ADDR",
    ),
    "MASTER_PORT is absent": (
        {name: value for name, value in TWO.items() if name != "MASTER_PORT"},
        "MASTER_PORT",
    ),
    "MASTER_PORT is text": (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT"),
    "MASTER_PORT is 99999": (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT"),
    "MASTER_PORT is below zero": (TWO | {"MASTER_PORT": "-1"}, "MASTER_PORT"),
}
VARIABLES = {  # name: command, variables, and a word
    "MINILORA_BACKEND is unknown": (f"{TRAIN} --quantization_bit 4", {"MINILORA_BACKEND": "cuda"}, "MINILORA_BACKEND"),
    "MINILORA_BACKEND is triton, on a CPU": (
        f"{TRAIN} --quantization_bit 4", {"MINILORA_BACKEND": "triton"}, "MINILORA_BACKEND"),
    "MINILORA_BACKEND is triton, on a CPU, for evaluation": (
        f"{EVALUATE} --quantization_bit 4", {"MINILORA_BACKEND": "triton"}, "MINILORA_BACKEND"),
    "MINILORA_BACKEND has an escape sequence": (
        f"{TRAIN} --quantization_bit 4", {"MINILORA_BACKEND": "\x1b[2Jx"}, "MINILORA_BACKEND"),
    "MINILORA_CPU_DTYPE is unknown": (TRAIN, {"MINILORA_CPU_DTYPE": "abc"}, "MINILORA_CPU_DTYPE"),
    "MINILORA_CPU_DTYPE is float16": (MEMORY, {"MINILORA_CPU_DTYPE": "float16"}, "MINILORA_CPU_DTYPE"),
    "MINILORA_CPU_DTYPE has an escape sequence": (CHAT, {"MINILORA_CPU_DTYPE": "\x1b[2Jx"}, "MINILORA_CPU_DTYPE"),
    "MLFLOW_TRACKING_URI holds a password": (
        f"{TRAIN} --model absent --report_to mlflow", {"MLFLOW_TRACKING_URI": "https://user:hunter2secret@[x"},
        "absent"),
}  # fmt: skip
COMMANDS = (TRAIN, PREPARE, EVALUATE, CHAT, MERGE, MEMORY, COMPARE, LINT)


def cases() -> Iterator[Case]:
    for name, (variables, word) in PROCESSES.items():
        yield make_case(KIND, name, TRAIN, word, environment=variables)
    for name, (command, variables, word) in VARIABLES.items():
        yield make_case(KIND, name, command, word, environment=variables, secret="hunter2secret")
    for command in COMMANDS:
        name = f"no file may be opened ({command.split()[0]})"
        yield make_case(KIND, name, command, "open files", descriptors=4, remarks=True)
