"""Ranks that share a model, asked by tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.project import PROGRAM_ENVIRONMENT, SUPPORT

from minilora import CausalLM, save_model
from minilora.formats import weights
from minilora.formats.config_json import parse_config
from minilora.formats.weight_files import SINGLE_FILE

ENVIRONMENT = PROGRAM_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="session")
def run_program(tmp_path_factory):
    """Run support/NAME.py REPORT JOBS. Returns the report."""

    def run(name: str, jobs: dict) -> dict:
        folder = tmp_path_factory.mktemp(name)
        (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
        command = [sys.executable, str(SUPPORT / f"{name}.py"), str(folder / "report.json")]
        command.append(str(folder / "jobs.json"))
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return json.loads((folder / "report.json").read_text())

    return run


def write_model(directory: Path, **changes: object) -> Path:
    """A random model with biases, a head of its own, and weights of several rows of shards."""
    config = dict(
        model_type="qwen2", vocab_size=97, hidden_size=128, intermediate_size=640, num_hidden_layers=2
    )
    config |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = CausalLM(parse_config(config | dict(tie_word_embeddings=False) | changes))
    model.init_weights(std=0.1)
    save_model(model, directory)
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    with pytest.MonkeyPatch.context() as patch:  # a file for each tensor: a file that is read is mapped whole
        patch.setattr(weights, "SHARD_BYTES", 1)
        weights.write_shards(({name: tensor} for name, tensor in tensors.items()), directory)
    return directory


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="session")
def deep_dir(tmp_path_factory) -> Path:
    """24 layers, of which some are a small part of the model. Four ranks share every matrix evenly."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=24, vocab_size=96)
    sizes |= dict(num_key_value_heads=4, tie_word_embeddings=True)
    return write_model(tmp_path_factory.mktemp("deep") / "model", **sizes)
