"""Whole programs on the card: the trainer, stopped and resumed, and the tests that need a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import minilora
from gpu_sections.section import Check, Skip
from minilora.system.assets import DEFAULT_RUN
from minilora.system.files import read_json_lines

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter_model.safetensors"


def trainer(check: Check) -> None:
    """Train the small model that comes with minilora: once to the end, and once stopped and resumed."""
    whole, again, stopped = (check.folder / name for name in ("whole", "again", "stopped"))
    run_trainer(check, whole)
    records = read_json_lines(whole / "metrics.jsonl")
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    check.row(**{"run": "in one go", "held-out loss before": losses[0], "after": losses[-1]})
    check.claim("the held-out loss fell", losses[-1] < losses[0])
    stop_trainer(check, stopped)
    saved = sorted(path.name for path in stopped.glob("checkpoint-*"))
    check.row(run="stopped", checkpoints=", ".join(saved))
    run_trainer(check, stopped, "--resume_from_checkpoint", "latest")
    text = "a run that was stopped and resumed has the adapter of one in one go"
    if same_adapter(whole, stopped):
        check.claim(f"{text}, byte for byte", True)
        return
    run_trainer(check, again)
    repeats = same_adapter(whole, again)
    check.note(f"two runs in one go have {'the same adapter' if repeats else 'different ones'} on this card")
    check.claim(text, not repeats)


def command(check: Check, output_dir: Path, *words: str) -> list[str]:
    """Return the trainer's command: short, with evaluations, checkpoints and answers."""
    keys = dict(max_steps=200, save_steps=100, eval_steps=100, logging_steps=1, exact_match_samples=20)
    if check.tiny:
        keys |= dict(max_steps=12, max_samples=48, exact_match_samples=0)
    keys |= dict(output_dir=output_dir) | (dict(fp16="true") if check.card.emulates_t4 else {})
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    trainer = str(ROOT / "scripts" / "train.py")
    return [sys.executable, "-u", trainer, "--config", str(DEFAULT_RUN), *options, *words]


def run_trainer(check: Check, output_dir: Path, *words: str) -> None:
    """Run the trainer to its end. Raises RuntimeError with its last line if it fails."""
    where = dict(cwd=ROOT, env=environment())
    done = subprocess.run(command(check, output_dir, *words), capture_output=True, encoding="utf-8", **where)
    with (check.folder / "trainer.log").open("a", encoding="utf-8") as log:
        log.write(done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"train.py ended with code {done.returncode}: {last}")


def stop_trainer(check: Check, output_dir: Path) -> None:
    """Start the trainer, and stop it with SIGTERM as soon as its loop runs: it saves a checkpoint."""
    words = command(check, output_dir)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    with subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step 0/"):
                process.terminate()
    with (check.folder / "trainer.log").open("a", encoding="utf-8") as log:
        log.writelines(seen)
    if process.returncode != 130:
        last = "".join(seen[-1:])
        raise RuntimeError(f"train.py, stopped by SIGTERM, ended with {process.returncode}: {last}")


def same_adapter(one: Path, other: Path) -> bool:
    return (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


def gpu_tests(check: Check) -> None:
    """Run the tests that need a GPU."""
    tests = (ROOT / "tests").rglob("test_*.py")
    files = [path for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not files:
        raise Skip(f"{' and '.join(missing) or 'the tests'} cannot be found")
    if check.card.emulates_t4:
        raise Skip("the tests know nothing of an emulated card")
    options = "-m pytest -q -m gpu -W default -p no:cacheprovider --durations=20".split()
    if importlib.util.find_spec("xdist"):  # Most of their time is the compiler's.
        options += f"-n {min(6, os.cpu_count() or 1)} -p no:benchmark".split()
    words, log = [sys.executable, *options, *files], check.folder / "pytest.log"
    with log.open("w", encoding="utf-8") as file:  # It is there if the tests have to be stopped.
        done = subprocess.run([*map(str, words)], cwd=ROOT, stdout=file, stderr=file, env=environment())
    lines = log.read_text(encoding="utf-8").splitlines() or ["nothing was printed"]
    check.row(log="pytest.log", result=lines[-1].strip("= "))
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            check.note(line)
    ran = "passed" in lines[-1] or check.tiny  # A dry run may be without a GPU, and then all are skipped.
    check.claim("every test that needs a GPU passes", done.returncode == 0 and ran)


def environment() -> dict[str, str]:
    """Return the environment in which programs find minilora if it is not installed, and print UTF-8."""
    paths = [str(Path(minilora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONIOENCODING": "utf-8"}
    return os.environ | variables
