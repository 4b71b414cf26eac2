"""Ctrl-C at any moment of any script, during its imports too, is 130 and one line."""

import signal
import subprocess
import sys
import time

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT

SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").rglob("*.py")
    if "run_script(main)" in path.read_text(encoding="utf-8")
)
COMMAND = ROOT / "minilora" / "__main__.py"
# Runs a script as the command line does, and sends Ctrl-C when it imports the Nth module after the first.
IMPORTING = """
import os, runpy, signal, sys

left, script = int(sys.argv[1]), sys.argv[2]

class Finder:
    def find_spec(self, name, path=None, target=None):
        global left
        left -= "minilora.system.interrupts" in sys.modules
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = [script, "train"]  # a command, and for scripts an argument to be refused
runpy.run_path(script, run_name="__main__")
"""


def test_every_script_prepares_for_ctrl_c_before_any_other_import():
    for path in SCRIPTS:
        code = path.read_text(encoding="utf-8")
        lines = [line for line in code.splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert lines[0].split("#")[0].strip() == "import minilora.system.interrupts", path
        assert 'if __name__ == "__main__":\n    import minilora' in code, path


# They import less than 400 modules before they read the command line, and refuse it.
LIGHT = ("experiments", "notebooks")
DURING_IMPORTS = [
    pytest.param(script, number, id=f"{number}-{script.stem}")
    for script in [*SCRIPTS, COMMAND]
    for number in ((1, 40) if script.stem in LIGHT else (1, 40, 400))
]


@pytest.mark.parametrize("script, number", DURING_IMPORTS)
def test_ctrl_c_during_an_import_is_one_line_and_130(script, number):
    command = [sys.executable, "-c", IMPORTING, str(number), str(script)]
    done = subprocess.run(command, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n"), done.stderr


@pytest.mark.parametrize("seconds", [0.5, 1, 2, 4])
def test_ctrl_c_at_any_time_is_130_and_at_most_one_line(seconds, model_dir, dataset, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "train.py", "--model", model_dir, "--dataset", dataset]
    command += ["--output_dir", tmp_path / "out", "--max_steps", 10**5, "--quantization_bit", "none"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PROGRAM_ENVIRONMENT)
    with subprocess.Popen([*map(str, command)], **pipes) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err in ("interrupted\n", "") and (err or "interrupted after step" in out)
