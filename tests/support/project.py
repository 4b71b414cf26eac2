"""Where the project lies, what a run left behind, and which keys it knows."""

import json
import os
from pathlib import Path

from safetensors.torch import load_file

from minilora import UserError
from minilora.run.settings import load_train_config

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"  # programs that tests start as processes of their own
PROGRAM_ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "scripts", ROOT / "tests")),
    "OMP_NUM_THREADS": "1",
}
WORDS = "the old fox and a young owl live by the river in a small blue house near the mill where bread is baked".split()


def adapter(directory: Path) -> dict:
    """The tensors of a saved adapter."""
    return load_file(directory / "adapter_model.safetensors")


def metrics(directory: Path) -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def is_key(name: str) -> bool:
    """Whether the trainer knows a key. Any other mistake about it, such as a wrong value, means that it does."""
    try:
        load_train_config([f"--{name}", "1"])
    except UserError as error:
        return "unknown key" not in str(error)
    return True
