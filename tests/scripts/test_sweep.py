"""scripts/sweep.py: the runs of a sweep, the runs that a second start repeats, and the final table."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.project import ROOT

from minilora import UserError
from minilora.run.settings import load_train_config
from minilora.system.errors import run_script
from minilora.system.locks import locked

SAVING = """
import signal, sys, time

def save(*_):
    time.sleep(0.5)  # longer than subprocess.run would wait after Ctrl-C
    print("saved", flush=True)
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
time.sleep(0.2)
print("training", flush=True)
time.sleep(60)
"""


@pytest.fixture
def sweep():
    import sweep

    return sweep


@pytest.fixture
def run_sweep(sweep, monkeypatch, capfd, tmp_path):
    """Run a sweep of `keys` into tmp_path/out: exit code, stdout, stderr."""

    def run(swept, *words, **keys):
        (tmp_path / "sweep.yaml").write_text(
            yaml.safe_dump({"output_dir": str(tmp_path / "out"), "sweep": swept} | keys, sort_keys=False)
        )
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--config", str(tmp_path / "sweep.yaml"), *words])
        code = 0
        try:
            run_script(sweep.main)
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def stand_in(sweep, monkeypatch):
    """Replace the trainer by a function that fails at rank 13 and is interrupted at rank 15.

    Returns the names of the runs that it was called for.
    """
    called = []

    def train(run) -> int:
        config = load_train_config(["--config", str(run.file)])
        directory = Path(config.output_dir)
        directory.mkdir(exist_ok=True)
        called.append(directory.name)
        if config.lora_rank == 13 and not (directory / "fixed").exists():
            return 2
        records = [
            dict(step=1, loss=1 / config.lora_rank),
            dict(step=0, eval_loss=0.0),
            dict(step=7, eval_loss=config.learning_rate),
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if config.lora_rank == 15:
            return 130
        (directory / "training_config.yaml").write_text(config.to_yaml())
        (directory / "README.md").write_text("done")
        return 0

    def train_together(runs) -> int:
        called.append("together")
        return max(map(train, runs))

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "train_together", train_together)
    return called


def test_two_real_runs_train_and_are_compared(run_sweep, model_dir, dataset, tmp_path):
    keys = dict(model=str(model_dir), dataset=str(dataset), max_steps=2, quantization_bit=None, val_size=4)
    code, out, err = run_sweep({"lora_rank": [2, 4]}, **keys)
    assert code == 0, err
    for rank in (2, 4):
        directory = tmp_path / "out" / f"lora_rank-{rank}"
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == rank
    assert out.count("  finished\n") == 2 and "lowest held-out loss" in out


def test_real_runs_that_share_model_and_data_are_trained_in_one_process(
    run_sweep, model_dir, dataset, tmp_path
):
    keys = dict(model=str(model_dir), dataset=str(dataset), max_steps=2, quantization_bit=None, val_size=4)
    code, out, err = run_sweep({"lora_rank": [2, 4], "seed": [1, 2]}, "--together", **keys)
    assert code == 0, err
    assert out.startswith("together   runs 1, 3; runs 2, 4 (seed must be the same)\n")
    assert out.count("\n==== run") == 2 and out.count("\nmodel  ") == 2  # one is loaded for each two runs
    for rank, seed in ((2, 1), (2, 2), (4, 1), (4, 2)):
        directory = tmp_path / "out" / f"lora_rank-{rank}_seed-{seed}"
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == rank
    assert out.count("  finished\n") == 4


def test_a_group_skips_finished_runs_names_failed_ones_and_trains_a_last_one_alone(
    run_sweep, stand_in, tmp_path
):
    code, out, err = run_sweep({"lora_rank": [4, 13, 8]}, "--together")
    assert code == 2 and "1 of 3 runs failed: lora_rank-13 (exit code 2)" in err
    assert out.startswith(
        "together   all 3 runs\n\n==== runs 1, 2, 3 of 3: lora_rank-4, lora_rank-13, lora_rank-8\n"
    )
    assert stand_in == ["together", "lora_rank-4", "lora_rank-13", "lora_rank-8"]
    (tmp_path / "out" / "lora_rank-13" / "fixed").touch()
    code, out, _ = run_sweep({"lora_rank": [4, 13, 8]}, "--together")
    assert code == 0 and stand_in[4:] == ["lora_rank-13"] and "(some finished before)" in out
    code, out, _ = run_sweep({"lora_rank": [4, 13, 8]}, "--together")
    assert code == 0 and len(stand_in) == 5 and "(finished before)" in out


def test_an_interrupted_group_ends_the_sweep_and_the_hint_says_together(run_sweep, stand_in):
    code, out, _ = run_sweep({"lora_rank": [15, 4], "seed": [1, 2]}, "--together")
    assert code == 130 and out.endswith(" --together\n") and "to resume: python scripts/sweep.py" in out
    assert stand_in == ["together", "lora_rank-15_seed-1", "lora_rank-4_seed-1"]


STARTING = 'import time; print("starting", flush=True); time.sleep(60)'  # it handles no signal yet


@pytest.mark.parametrize(
    "trainer, word", [(SAVING, "training"), (STARTING, "starting")], ids=["training", "starting"]
)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_sweep_lets_the_trainer_save_and_prints_how_to_resume(tmp_path, sent, trainer, word):
    (tmp_path / "trainer.py").write_text(trainer)
    (tmp_path / "sweep.yaml").write_text("output_dir: out\nsweep:\n  seed: [1, 2]\n")
    code = "import sweep; from pathlib import Path; sweep.TRAINER = Path('trainer.py'); sweep.run_script(sweep.main)"
    words = [sys.executable, "-c", code, "--config", "sweep.yaml"]
    path = os.pathsep.join(map(str, (ROOT / "scripts", ROOT)))
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, text=True, start_new_session=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, **options) as process:
        assert any(line == f"{word}\n" for line in process.stdout)  # reads up to there
        # Ctrl-C in a terminal goes to both programs, SIGTERM only to the sweep.
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "to resume: python scripts/sweep.py --config sweep.yaml" in out
    assert ("saved\n" in out) == (trainer is SAVING) and "run 2 of 2" not in out


def test_finished_runs_are_skipped_and_failed_ones_named_and_repeated(run_sweep, stand_in, tmp_path):
    code, out, err = run_sweep({"lora_rank": [4, 13, 8]})
    assert code == 2 and "1 of 3 runs failed: lora_rank-13 (exit code 2)" in err and "Traceback" not in err
    assert stand_in == [
        "lora_rank-4",
        "lora_rank-13",
        "lora_rank-8",
    ]  # the failed run did not stop the others
    (tmp_path / "out" / "lora_rank-13" / "fixed").touch()
    code, out, err = run_sweep({"lora_rank": [4, 13, 8]})
    assert code == 0 and stand_in[3:] == ["lora_rank-13"]
    assert "run 1 of 3: lora_rank-4  (finished before)" in out


def test_an_interrupted_run_ends_the_sweep(run_sweep, stand_in):
    code, out, _ = run_sweep({"lora_rank": [15, 4]})
    assert (
        code == 130
        and "interrupted; to resume: python scripts/sweep.py" in out
        and stand_in == ["lora_rank-15"]
    )


def test_a_sweep_that_starts_again_says_what_it_found(run_sweep, stand_in, tmp_path):
    code, out, _ = run_sweep({"lora_rank": [2, 4, 8]})
    assert code == 0 and "found" not in out
    for rank, step in ((4, 6), (4, 12)):
        (tmp_path / "out" / f"lora_rank-{rank}" / f"checkpoint-{step}").mkdir()
    (tmp_path / "out" / "lora_rank-4" / "README.md").unlink()
    _, out, _ = run_sweep({"lora_rank": [2, 4, 8, 16]})
    assert out.startswith(
        "found      lora_rank-4 interrupted at checkpoint-12, 2 finished, 1 not started, of 4 runs\n"
    )


@pytest.mark.parametrize("used", ["out", "out/lora_rank-4"], ids=["another sweep", "a trainer"])
def test_a_sweep_refuses_a_directory_that_is_in_use_and_names_the_process(
    run_sweep, stand_in, tmp_path, used
):
    (tmp_path / "out" / "lora_rank-4").mkdir(parents=True)
    with locked("output_dir", tmp_path / used):
        code, _, err = run_sweep({"lora_rank": [4]})
    assert code == 2 and err.count("\n") == 1 and not stand_in
    assert f"output_dir {tmp_path / used} is used by process {os.getpid()}, which is still running" in err
    assert not list((tmp_path / "out").glob("*.yaml"))


def test_the_table_begins_with_the_lowest_held_out_loss_and_ignores_the_untrained_model(run_sweep, stand_in):
    _, out, _ = run_sweep({"lora_rank": [2, 13, 4], "learning_rate": ["5e-4", "2e-4"]})
    lines = [
        line.split() for line in out.splitlines()[out.splitlines().index("") :] if line.endswith("finished")
    ]
    assert [line[:5] for line in lines[:4]] == [
        ["4", "2e-4", "7", "0.2500", "0.0002"],
        ["2", "2e-4", "7", "0.5000", "0.0002"],
        ["4", "5e-4", "7", "0.2500", "0.0005"],
        ["2", "5e-4", "7", "0.5000", "0.0005"],
    ]
    assert [line[:3] for line in lines[4:]] == [["13", "2e-4", "0"], ["13", "5e-4", "0"]]


def test_a_finished_run_with_other_settings_is_refused(run_sweep, stand_in):
    assert run_sweep({"lora_rank": [4]}, weight_decay=0.1)[0] == 0
    assert run_sweep({"lora_rank": [4]}, weight_decay=0.1, logging_steps=3)[0] == 0  # changes no number
    code, _, err = run_sweep({"lora_rank": [4]}, weight_decay=0.2)
    assert code == 2 and "was finished with weight_decay 0.1; choose another output_dir" in err
    assert stand_in == ["lora_rank-4"]


@pytest.mark.parametrize(
    "swept, keys, said",
    [
        (None, {}, "has no lists under sweep, such as lora_rank: [4, 8]"),
        ({"lora_rank": 4}, {}, "lora_rank must be a list of values, not 4"),
        ({"lora_rank": []}, {}, "lora_rank must be a list of values, not []"),
        ({"output_dir": ["a", "b"]}, {}, "output_dir cannot be swept"),
        ({"lora_rank": [4, 4]}, {}, "two runs of the sweep would be called lora_rank-4"),
        ({"lora_rank": [4, 0]}, {}, "lora_rank-0: lora_rank must be above 0, not 0"),
        ({"lora_rnak": [4]}, {}, "nearest: 'lora_rank'"),
        ({"lora_r": [4]}, {"lora_rank": 8}, "lora_rank is set twice"),
        (
            {f"key_{i}": list(range(100)) for i in range(40)},
            {},
            "the sweep has more than 1,000 runs; give fewer keys or values",
        ),
        (
            {"lora_rank": [4, math.nan]},
            {},
            "under sweep, lora_rank holds nan, which is no value of a setting",
        ),
        ({"lora_rank": [{"a": 1}]}, {}, "lora_rank holds {'a': 1}, which is no value"),
        (
            {"lora_target": [["q_proj", ["v_proj"]]]},
            {},
            "lora_target holds ['q_proj', ['v_proj']], which is no",
        ),
        (
            {"lora_target": ["q" * 300]},
            {},
            "which has more than 200 bytes; sweep fewer keys, or shorter values",
        ),
        ({"lora_rank": {"a": "b" * 500}}, {}, "lora_rank must be a list of values, not {'a': 'bbb"),
        ({"lora_rank": [4]}, {"output_dir": [1]}, "output_dir must be text, not [1]"),
    ],
)
def test_mistakes_are_one_line_before_the_first_run_and_nothing_is_written(
    run_sweep, stand_in, tmp_path, swept, keys, said
):
    code, _, err = run_sweep(swept, **keys)
    assert code == 2 and said in err and err.count("\n") == 1 and not stand_in
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_an_output_dir_that_cannot_be_created_is_one_line(run_sweep, stand_in, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run_sweep({"lora_rank": [4]}, output_dir=str(tmp_path / "file" / "out"))
    assert (
        code == 2 and f"cannot write to {tmp_path / 'file'} (Not a directory)" in err and err.count("\n") == 1
    )


def test_a_torn_line_of_metrics_is_ignored_and_lost_settings_are_reported(run_sweep, stand_in, tmp_path):
    assert run_sweep({"lora_rank": [4]})[0] == 0
    directory = tmp_path / "out" / "lora_rank-4"
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    code, out, err = run_sweep({"lora_rank": [4]})
    assert code == 0 and out.splitlines()[-1].split()[:3] == ["4", "7", "0.2500"], err
    (directory / "training_config.yaml").unlink()
    code, _, err = run_sweep({"lora_rank": [4]})
    assert code == 2 and "training_config.yaml does not exist; choose another output_dir, or remove it" in err
    assert err.count("\n") == 1


values = (
    st.integers(1, 99)
    | st.sampled_from(["1e-4", "all", "q_proj,v_proj"])
    | st.lists(st.sampled_from(["q_proj", "v_proj"]), max_size=3)
)


@given(
    st.dictionaries(
        st.sampled_from(["lora_rank", "learning_rate", "lora_target"]),
        st.lists(values, min_size=1, max_size=9),  # at most 729 runs of the 1,000
        min_size=1,
    )
)
def test_every_combination_is_one_run_of_its_own_name(swept):
    import sweep

    try:
        grid = sweep.combinations(swept, "sweep.yaml")
    except UserError as error:
        assert "would be called" in str(error)
        shown = [[sweep.file_name_part(value) for value in values] for values in swept.values()]
        assert any(len(set(values)) < len(values) for values in shown)
        return
    assert len(grid) == math.prod(map(len, swept.values()))
    assert all(
        chosen.keys() == swept.keys() and all(chosen[key] in swept[key] for key in swept)
        for chosen in grid.values()
    )
    assert not any(set(name) & set(" /,:") for name in grid)
