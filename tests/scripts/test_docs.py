"""What the documents say can be run."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from support.project import ROOT

from minilora.run.settings import ALIASES, SWITCHES, TrainConfig

SNIPPETS = [
    pytest.param(code, id=f"{path.name}-{i}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, code in enumerate(
        re.findall(r"^```python\n(.+?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_every_snippet_runs(code, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:minilora|scripts|docs|assets|kernels|tests)/[\w./]*)`", readme):
        assert (ROOT / name).exists(), name
    assert "pip install -c constraints.txt -e . && python scripts/train.py" in readme
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme


COMMANDS = [
    pytest.param(command, id=f"{path.name}-{i}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, command in enumerate(
        re.findall(r"(scripts/\w+\.py(?: [^`|\n]*(?:\\\n[^`|\n]*)*)?)", path.read_text(encoding="utf-8"))
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_script_and_options_that_it_has(command):
    script, options = ROOT / command.split()[0], re.findall(r"(?<!\S)--([\w-]+)", command)
    source = script.read_text(encoding="utf-8")
    keys = {field.name for field in fields(TrainConfig)} | ALIASES.keys() | {*SWITCHES, "config"}
    takes_keys = "load_train_config" in source or "prepare_inference" in source
    for option in options:
        name = option.replace("-", "_")
        assert (takes_keys and name in keys) or re.search(rf'"--{name}"|--{name}\b', source), (
            f"{script.name} has no --{option}"
        )


def test_no_text_points_to_a_place_on_one_machine():
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/**/*.py"),
        *ROOT.glob("docs/*.md"),
        ROOT / "pyproject.toml",
    ]:
        if path != Path(__file__).resolve():
            assert not re.search(r"(?<![\w.])/(home|root|Users)/", path.read_text(encoding="utf-8")), path
