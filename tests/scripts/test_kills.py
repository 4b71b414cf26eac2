"""SIGKILL at 20 random moments leaves the old output or the new one, and the next run ends as if nothing had been."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file
from support.families import relative_error
from support.killing import tree
from support.merging import make_adapter, make_base
from support.project import PROGRAM_ENVIRONMENT, SUPPORT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl, which collects orphans")


@pytest.fixture
def kill(tmp_path):
    """Kill a script again and again; returns what `killed_scripts.py` reports."""

    def run(script, *arguments, environment=PROGRAM_ENVIRONMENT):
        (tmp_path / "old").mkdir(exist_ok=True)
        command = [sys.executable, SUPPORT / "killed_scripts.py", script, tmp_path, *arguments]
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def parts(report: dict, names: set[str]) -> list[dict]:
    """What was found after each kill in the output, whose entries have these names."""
    return [
        {path: digest for path, digest in found.items() if path.split("/")[0] in names}
        for found in report["found"]
    ]


def test_a_killed_prepare_leaves_the_old_rows_or_the_new_ones(
    kill, call, monkeypatch, model_dir, dataset, tmp_path
):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    keys = ("--model", model_dir, "--dataset", dataset, "--val_size", 4)
    assert call("prepare", *keys, "--max_samples", 10)[0] == 0
    (tmp_path / "old" / "prepared" / "notes.txt").write_text("mine")
    old = tree(tmp_path / "old")
    report = kill("prepare", *keys, "--overwrite_output_dir")
    found = parts(report, {"prepared"})
    assert all(one in (old, report["whole"]) for one in found) and old in found
    assert report["killed"] == report["whole"] != old and "prepared/notes.txt" in report["killed"]
    assert any(
        "prepared.part" in path for one in report["found"] for path in one
    )  # there was something to remove


@pytest.mark.parametrize("output", ["merged", "model.gguf", "plain"])
def test_a_killed_merge_leaves_no_output_or_a_whole_one(kill, model_dir, tmp_path, output):
    if output.endswith(".gguf"):
        pytest.importorskip("gguf", reason="an extra: GGUF")
    make_base(tmp_path / "base", model_dir)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    option = "--export_adapter" if output == "plain" else "--output"
    report = kill("merge", "--adapter", tmp_path / "adapter", option, output)
    assert all(one in ({}, report["whole"]) for one in parts(report, {output}))
    assert report["killed"] == report["whole"]
    assert any(f"{output}.part" in path for one in report["found"] for path in one)


@pytest.mark.parametrize("how", [(), ("--together",)])
def test_a_killed_sweep_goes_on_to_the_same_adapters_and_its_trainers_die_with_it(
    kill, model_dir, dataset, tmp_path, how
):
    """Runs that were killed at different steps do not go on together: other sums, at most 1e-5 apart."""
    keys = dict(model=str(model_dir), dataset=str(dataset), max_steps=6, quantization_bit=None, save_steps=2)
    keys |= dict(adam_epsilon=1e-2) if how else {}  # see test_train_together.py
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"output_dir": "out", "sweep": {"lora_rank": [2, 4]}} | keys)
    )
    report = kill("sweep", "--config", tmp_path / "sweep.yaml", *how)
    whole, killed = (
        {p: d for p, d in report[n].items() if "checkpoint-" not in p} for n in ("whole", "killed")
    )
    assert killed.keys() == whole.keys()
    for path, digest in whole.items():
        if path.endswith(".safetensors") and how:
            one, other = (load_file(tmp_path / place / path) for place in ("whole", "killed"))
            assert all(relative_error(other[name], tensor) <= 1e-5 for name, tensor in one.items()), path
        elif path.endswith(".yaml") and how:  # of a run that went on, or of one that ended at once
            settings = [
                yaml.safe_load((tmp_path / place / path).read_text()) for place in ("whole", "killed")
            ]
            one, other = (one | {"resume_from_checkpoint": None} for one in settings)
            assert one == other, path
        elif path.endswith((".safetensors", ".yaml", "adapter_config.json")):
            assert killed[path] == digest, path
    assert report["orphaned"][0] == 130, (tmp_path / "trainer.log").read_text()  # killed while it trained
    assert set(report["orphaned"]) <= {0, 130, 143}


def test_a_killed_share_leaves_whole_files_and_the_next_one_completes_them(
    kill, train, s3, tmp_path, monkeypatch
):
    directory, _ = train()
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    environment = PROGRAM_ENVIRONMENT | {name: os.environ[name] for name in names}
    report = kill("share", "--adapter", directory, "--upload", "s3://bucket/run", environment=environment)
    assert all(one.items() <= report["whole"].items() for one in report["found"])
    assert any(one.keys() < report["whole"].keys() for one in report["found"])  # some were cut in the middle
    assert report["killed"] == report["whole"]
    assert "run/adapter_model.safetensors" in report["whole"]
