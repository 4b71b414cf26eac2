"""The command `minilora`: it runs the scripts themselves. And --help, of the command and of every script."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT, is_key

from minilora.run.manual import manual
from minilora.system.errors import ArgumentParser

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
STARTED = [
    path
    for path in (ROOT / "scripts").rglob("*.py")
    if "run_script(main)" in path.read_text(encoding="utf-8")
]
TAKE_SECONDS = "torch numpy tokenizers sentencepiece matplotlib huggingface_hub tqdm safetensors".split()


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False)


# ---- --help ------------------------------------------------------------------------------------------------

IMPORTED_AFTER = """
import json, runpy, sys

path, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = path
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.stem)
def test_help_is_the_scripts_text_and_is_there_before_anything_heavy_is_imported(script, option):
    done = run("-c", IMPORTED_AFTER, script, "--output", "x", option)
    code, modules = json.loads(done.stderr)
    assert not code and done.stdout == (manual() if script.stem == "train" else docstring(script))
    assert not {*modules} & {*TAKE_SECONDS}


@pytest.mark.parametrize("words", [(), ("--help",), ("memory", "--help")])
def test_help_of_the_command_imports_nothing_heavy_either(words):
    done = run("-X", "importtime", "-m", "minilora", *words)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "minilora.system.errors" in imported and not imported & {*TAKE_SECONDS}
    assert done.returncode == 0


class Parsed(Exception):
    """Raised in place of parsing, with the parser."""


@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.stem)
def test_the_text_names_every_option_with_its_default_and_choices_and_no_other_option(script, monkeypatch):
    def stop(parser, *_):
        raise Parsed(parser)

    if script.stem == "train":
        return  # its text is made from its keys: see tests/run/test_settings.py
    monkeypatch.setattr(ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [script.name])
    with pytest.raises(Parsed) as parsed:
        import_module(script.stem).main()
    parser, text = parsed.value.args[0], docstring(script)
    assert parser.format_help() == text
    for action in (action for action in parser._actions if action.dest != "help"):
        assert not action.option_strings or action.option_strings[0] in text
        for value in (*(action.choices or ()), *([action.default] if action.default else ())):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            assert shown in text, f"{action.dest} {shown}"
    for name in re.findall(r"^ +--([\w-]+)", text, re.MULTILINE):
        assert f"--{name}" in parser._option_string_actions or is_key(name), name


def test_check_gpus_text_names_every_section():
    check_gpu = import_module("check_gpu")
    assert ", ".join(check_gpu.NAMES[:-1]) + " and tests" in check_gpu.__doc__


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_lists_every_script_with_the_first_line_of_its_text():
    listed = dict(re.findall(r"^  (\w+) +(.+)$", run("-m", "minilora", "--help").stdout, re.MULTILINE))
    assert listed == {path.stem: docstring(path).splitlines()[0] for path in SCRIPTS}


@pytest.mark.parametrize("name", ["lint_adapter", "lint-adapter"])
def test_the_command_is_the_script(name, adapters, model_dir):
    words = adapters / "one", "--model", model_dir
    script, command = run(ROOT / "scripts" / "lint_adapter.py", *words), run("-m", "minilora", name, *words)
    assert command.stdout == script.stdout and "SGLang" in command.stdout
    assert (command.returncode, command.stderr) == (script.returncode, script.stderr) == (1, "")


def test_a_mistake_has_the_scripts_exit_code_and_line(tmp_path):
    done = run("-m", "minilora", "compare", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and f"{tmp_path / 'none'} does not" in done.stderr


@pytest.mark.parametrize(
    "name, said",
    [
        ("trian", "nearest: 'train'"),
        ("lint-adaptr", "nearest: 'lint_adapter'"),
        ("x/y", "known: chat"),
        ("../scripts/train", "train"),
    ],
)
def test_an_unknown_command_names_the_nearest_or_all(name, said):
    done = run("-m", "minilora", name)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert f"minilora {name!r} is no command" in done.stderr and said in done.stderr


def test_torchrun_starts_the_command_in_several_processes(model_dir, dataset, tmp_path):
    words = ["train", "--model", model_dir, "--dataset", dataset, "--output_dir", tmp_path / "out"]
    words += ["--max_steps", 1, "--quantization_bit", "none", "--cutoff_len", 32]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run(*torchrun, "-m", "minilora", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "; 2 processes" in done.stdout and (tmp_path / "out" / "adapter_model.safetensors").exists()
