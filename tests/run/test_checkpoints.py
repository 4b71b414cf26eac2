"""A resumed run equals one that was never stopped, bit for bit; any other resume is refused by name."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.project import PROGRAM_ENVIRONMENT, SUPPORT, adapter, metrics

from minilora import UserError
from minilora.run import checkpoints
from minilora.run.checkpoints import (
    DIGESTS_FILE,
    STATE_FILE,
    TENSORS_FILE,
    delete_old_checkpoints,
    find_checkpoint,
    flatten,
    list_checkpoints,
    read_checkpoint,
    sample_model,
    unflatten,
    write_checkpoint,
)
from minilora.run.saved_state import check_state
from minilora.run.settings import TrainConfig
from minilora.run.stop_signal import StopSignal
from minilora.system.files import fingerprint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing a picture takes longer than one of these trainings."""
    monkeypatch.setattr("minilora.run.report.plot_loss", lambda *_: None)
    monkeypatch.setattr("minilora.run.report.plot_training", lambda *_: None)


def numbers(directory):
    """The metrics of a run without times, speeds and memory."""
    return [
        {k: v for k, v in record.items() if k not in ("tokens_per_second", "memory", "seconds")}
        for record in metrics(directory)
    ]


def assert_same_run(one, other):
    """Bit-identical adapters and equal metrics."""
    expected, found = adapter(one), adapter(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert numbers(one) == numbers(other)


# ---- a run that is stopped and resumed ---------------------------------------------------------------------


def test_pain_4_a_run_killed_20_times_ends_as_if_it_had_been_left_alone(model_dir, dataset, tmp_path):
    """SIGKILL at 20 random moments, and before 20 random file operations, most of them within a save."""
    keys = dict(
        model=model_dir,
        dataset=dataset,
        val_size=4,
        quantization_bit="none",
        lora_dropout=0.1,
        learning_rate=1e-2,
    )
    keys |= dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=40,
        logging_steps=3,
        save_steps=1,
    )
    keys |= dict(eval_steps=4, load_best_model_at_end=True, save_total_limit=2)
    words = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    command = [
        sys.executable,
        str(SUPPORT / "killed_runs.py"),
        str(tmp_path / "report.json"),
        str(tmp_path),
        *words,
    ]
    run = subprocess.run(command, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["times"]["kills"] == report["operations"]["kills"] == 20
    assert report["operations"]["while_saving"] >= 5
    for name in ("times", "operations"):
        assert_same_run(tmp_path / "whole", tmp_path / name)
        assert list_checkpoints(tmp_path / name)[-1].name == "checkpoint-40" and not list(
            (tmp_path / name).glob("checkpoint-*.*")
        )


def go_on(train, stopped_at=3, **keys):
    """Run twice: without a stop, and from the checkpoint of step `stopped_at`, as if killed after it."""
    keys = (
        dict(max_steps=6, save_steps=stopped_at, lora_dropout=0.1, learning_rate=1e-2, logging_steps=2) | keys
    )
    whole, _ = train("whole", **keys)
    stopped = whole.with_name("stopped")
    shutil.copytree(whole, stopped)
    for path in stopped.iterdir():
        if path.name != f"checkpoint-{stopped_at}" and not path.name.startswith("training"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, out = train("stopped", resume_from_checkpoint="latest", **keys)
    assert f"resuming from {stopped / f'checkpoint-{stopped_at}'}, after step {stopped_at} of" in out
    assert_same_run(whole, stopped)
    return whole, stopped


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_pain_14_every_optimizer_the_paged_one_too_goes_on_with_the_moments_it_had(train, optim):
    """At rank 64 every factor has at least 4096 elements, so its moments take 8 bits."""
    if "bnb" in optim or "paged" in optim:
        pytest.importorskip("bitsandbytes")
    whole, stopped = go_on(
        train, optim=optim, preset="high_capacity_r32_all", lora_rank=64, loraplus_lr_ratio=4
    )
    states = [read_checkpoint(path / "checkpoint-6")["optimizer"] for path in (whole, stopped)]
    (tree, tensors), (other_tree, others) = map(flatten, states)
    assert tree == other_tree and all(torch.equal(tensors[key], other) for key, other in others.items())
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values()) == (optim != "adamw_torch")


def test_a_schedule_over_quantized_weights_goes_on(train):
    go_on(train, lr_scheduler_type="linear", warmup_steps=4, quantization_bit=4)


def test_a_window_of_the_metrics_that_a_checkpoint_cuts_in_two_is_whole_again(train):
    whole, _ = go_on(train, stopped_at=4, max_steps=8, logging_steps=3)
    assert [record["step"] for record in metrics(whole)] == [1, 3, 6, 8]


def test_the_loss_scale_and_the_steps_it_left_out_go_on(train, in_float16):
    in_float16(scale=2.0**26)
    whole, _ = go_on(train, stopped_at=4, max_steps=16, logging_steps=1)
    records = metrics(whole)
    # The checkpoint lies within the overflows.
    assert records[3]["loss_scale"] == 2.0**22 and records[3]["skipped_steps"] == 4
    assert records[-1]["skipped_steps"] < 12 and "grad_norm" not in records[3] and "grad_norm" in records[-1]


def test_the_best_adapter_and_the_patience_go_on(train, trainer, monkeypatch):
    losses = [3.0, 2.0, 1.0, 1.5, 1.2, 1.1, 0.5]  # before step 1, then at steps 2, 4, ...

    def run(name, already, **keys):
        remaining = iter(losses[already:])
        monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(remaining))
        keys |= dict(
            max_steps=20, val_size=6, eval_steps=2, save_steps=6, lora_dropout=0.1, learning_rate=1e-2
        )
        return train(name, load_best_model_at_end=True, early_stopping_patience=3, **keys)

    whole, out = run("whole", already=0)
    assert "stopping early" in out and "back to the adapter of step 4, held-out loss 1.0000" in out
    shutil.copytree(whole, whole.with_name("stopped"))
    stopped, out = run("stopped", already=4, resume_from_checkpoint="latest")
    assert (
        "after step 6 of 20" in out
        and "stopping early" in out
        and "back to the adapter of step 4, held-out loss 1.0000" in out
    )
    assert_same_run(whole, stopped)
    # A run resumed in another output_dir copies the best adapter there.
    elsewhere, out = run("elsewhere", already=4, resume_from_checkpoint=whole / "checkpoint-6")
    assert_same_run(whole, elsewhere)
    assert [path.name for path in list_checkpoints(elsewhere)] == ["checkpoint-4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_sigterm_and_a_closed_terminal_save_everything_and_exit_130(
    train, trainer, monkeypatch, number
):
    keys = dict(max_steps=6, lora_dropout=0.1, learning_rate=1e-2, save_steps=100)
    whole, _ = train("whole", **keys)
    calls = iter(range(100))
    original = trainer.causal_lm_loss

    def interrupted(*arguments):
        if next(calls) == 9:  # in the middle of step 3
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(trainer, "causal_lm_loss", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    stopped, out = train("stopped", code=130, **keys)
    assert (
        f"interrupted after step 3 of 6; to resume from {stopped / 'checkpoint-3'}: --resume_from_checkpoint latest"
        in out
    )
    monkeypatch.setattr(trainer, "causal_lm_loss", original)
    train("stopped", resume_from_checkpoint="latest", **keys)
    assert_same_run(whole, stopped)
    signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said = []
    with StopSignal(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and said
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_signals_are_as_before_behind_an_error_and_a_process_that_exits_is_not_hurried():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError), StopSignal(print):
        raise UserError("it diverged")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with pytest.raises(SystemExit), StopSignal(print) as stop:
        sys.exit(130)
    assert signal.getsignal(signal.SIGTERM) is stop
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_a_hangup_stops_no_run_under_nohup_and_a_lost_terminal_does_not_stop_the_save(monkeypatch):
    def lost(text):
        raise OSError(5, "Input/output error")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(lost) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)  # raises nothing, though nobody hears it
            assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_that_is_resumed_ends_the_same_again(train):
    directory, _ = train(save_steps=4, lora_dropout=0.1)
    before, records = adapter(directory), numbers(directory)
    _, out = train(save_steps=4, lora_dropout=0.1, resume_from_checkpoint="true")
    assert "after step 4 of 4" in out
    assert (
        all(torch.equal(before[key], value) for key, value in adapter(directory).items())
        and numbers(directory) == records
    )


def test_an_explicit_older_checkpoint_is_resumed_and_the_newer_ones_are_overwritten(train):
    keys = dict(max_steps=6, save_steps=2, lora_dropout=0.1, learning_rate=1e-2)
    directory, _ = train(**keys)
    expected = adapter(directory)
    _, out = train(resume_from_checkpoint=directory / "checkpoint-2", save_total_limit=1, **keys)
    assert "after step 2 of 6" in out and [path.name for path in list_checkpoints(directory)] == [
        "checkpoint-6"
    ]
    assert all(torch.equal(expected[key], value) for key, value in adapter(directory).items())


def test_settings_that_touch_no_number_may_change(train, model_dir, dataset, tmp_path):
    keys = dict(max_steps=6, lora_dropout=0.1, learning_rate=1e-2)
    whole, _ = train("whole", save_steps=3, **keys)
    shutil.copytree(model_dir, tmp_path / "moved")
    shutil.copy(dataset, tmp_path / "moved.jsonl")
    other = dict(
        model=tmp_path / "moved",
        dataset=tmp_path / "moved.jsonl",
        save_steps=5,
        save_total_limit=1,
        logging_steps=3,
    )
    elsewhere, _ = train(
        "elsewhere",
        resume_from_checkpoint=whole / "checkpoint-3",
        gradient_checkpointing=True,
        **keys,
        **other,
    )
    assert all(torch.equal(adapter(whole)[key], value) for key, value in adapter(elsewhere).items())


def test_a_constant_rate_lets_a_training_become_longer(train):
    keys = dict(lr_scheduler_type="constant", save_steps=2, lora_dropout=0.1)
    longer, _ = train("longer", max_steps=6, **keys)
    short, _ = train("short", max_steps=4, **keys)
    train("short", max_steps=6, resume_from_checkpoint="latest", **keys)
    assert all(torch.equal(adapter(longer)[key], value) for key, value in adapter(short).items())
    _, err = train("short", max_steps=5, resume_from_checkpoint="latest", code=2, **keys)
    assert "checkpoint-6 is beyond the 5 steps of this training; raise max_steps" in err


def test_latest_without_a_checkpoint_starts_at_the_beginning_and_says_so(train, tmp_path):
    directory, out = train(resume_from_checkpoint="latest")
    assert f"no checkpoint in {directory} yet: starting at the beginning" in out
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).unlink()  # as if killed before the first checkpoint
    train(resume_from_checkpoint="latest")
    _, err = train(resume_from_checkpoint="latest", code=2)  # a finished run is not overwritten
    assert "already holds a run" in err and "it is finished, without a checkpoint to resume from" in err
    assert "or --resume_from_checkpoint" not in err  # that was given


# ---- a resume of another training is refused ---------------------------------------------------------------


@pytest.fixture
def stopped(train):
    """A run of 6 steps with a checkpoint at 3, and a way to go on under other settings, which must be
    refused.
    """
    keys = dict(max_steps=6, save_steps=3, bf16="false")
    directory, _ = train(**keys)

    def refused(resume_from_checkpoint="latest", **other):
        before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
        _, err = train(code=2, resume_from_checkpoint=resume_from_checkpoint, **keys | other)
        assert err.startswith("error: ") and err.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
        return err

    return directory, refused


def test_other_settings_are_refused_by_name_with_both_values(stopped, tmp_path):
    directory, refused = stopped
    said = refused(learning_rate=1e-3)
    assert (
        f"{directory / 'checkpoint-6'} belongs to another training: learning_rate is 0.001 here, 0.0002 there; set it back"
        in said
    )
    assert "lora_rank is 4 here, None there" in refused(lora_rank=4)
    assert "max_steps is 7 here, 6 there" in refused(max_steps=7)
    assert "optim is 'adamw_8bit' here, 'adamw_torch' there" in refused(optim="adamw_8bit")
    assert "lora_dropout is 0.1 here, 0.0 there; seed is 1 here, 42 there" in refused(
        seed=1, lora_dropout=0.1
    )
    assert "quantization_bit is 4 here, None there" in refused(quantization_bit=4)


def test_another_dataset_and_another_model_are_refused_whatever_they_are_called(
    stopped, model_dir, dataset, tmp_path
):
    _, refused = stopped
    lines = dataset.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:] + lines[:1]))
    assert "the fingerprint of the training examples is" in refused(dataset=tmp_path / "other.jsonl")
    shutil.copytree(model_dir, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "the fingerprint of the model is" in refused(model=tmp_path / "other")


def test_another_dtype_is_refused(stopped):
    _, refused = stopped
    said = refused(bf16="true")
    assert "the dtype of computing is 'torch.bfloat16 on cpu' here, 'torch.float32 on cpu' there" in said


def test_a_place_without_a_checkpoint_is_refused(stopped, tmp_path):
    directory, refused = stopped
    assert "no checkpoint with a training_state is there" in refused(tmp_path / "nowhere")
    shutil.rmtree(directory / "checkpoint-6" / "training_state")
    assert "no checkpoint with a training_state is there" in refused(directory / "checkpoint-6")
    shutil.rmtree(directory / "checkpoint-3" / "training_state")
    assert "checkpoint-6 holds no training_state to resume from; " in refused()


def test_a_corrupt_checkpoint_is_refused_by_the_files_name_and_latest_skips_it(stopped, train):
    directory, refused = stopped
    path = directory / "checkpoint-6" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated or corrupt" in refused(directory / "checkpoint-6")
    other = directory / "checkpoint-3" / STATE_FILE
    whole = other.read_text()
    other.write_text(whole[:-1])
    said = refused()
    assert f"{directory} has no complete checkpoint" in said and str(path) in said and str(other) in said
    other.write_text(whole)
    _, out = train(max_steps=6, save_steps=3, bf16="false", resume_from_checkpoint="latest")
    assert f"skipped: {path} is truncated or corrupt" in out and "after step 3 of 6" in out


# ---- a checkpoint with right digests and wrong contents ------------------------------------------------------


def rewrite(checkpoint, change=lambda tree, tensors: None, adapter=None):
    """Change the files of a checkpoint and write the digests of the changed ones."""
    tree = json.loads((checkpoint / STATE_FILE).read_text())
    tensors = load_file(checkpoint / TENSORS_FILE)
    changed = change(tree, tensors)
    (checkpoint / STATE_FILE).write_text(json.dumps(tree if changed is None else changed))
    save_file(tensors, checkpoint / TENSORS_FILE)
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (adapter or {})))
    names = json.loads((checkpoint / DIGESTS_FILE).read_text())
    digests = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / DIGESTS_FILE).write_text(json.dumps(digests))


def put(path, value):
    """A change: another value at a place in state.json, or none at all."""

    def change(tree, tensors):
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        if value is DELETED:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return change


def resize(name, tensor):
    """A change: another tensor."""
    return lambda tree, tensors: tensors.update({name: tensor})


DELETED = object()
WRONG = [
    (lambda tree, tensors: [], "it must hold a JSON object"),
    (put(["step"], DELETED), "the key step is missing"),
    (put(["step"], -1), "step must be a whole number from 1"),
    (put(["step"], 0), "step must be a whole number from 1"),
    (put(["step"], 10**18), "step must be a whole number from 1"),
    (put(["step"], True), "step must be a whole number from 1"),
    (put(["best"], {"loss": 1.0}), "the key best.step is missing"),
    (put(["best", "loss"], math.nan), "best.loss must be a number"),
    (put(["best", "step"], "../../x"), "best.step must be a whole number"),
    (put(["seconds"], "1"), "seconds must be a number"),
    (put(["tracker", "records"], [1]), "tracker.records must be a list of objects"),
    (put(["tracker", "records"], [{"loss": 1.0}]), "the key tracker.records.step is missing"),
    (put(["tracker", "records"], [{"step": 1, "loss": "x"}]), "tracker.records.loss must be a number, not 'x'"),
    (put(["tracker", "window"], [[1.0, 2.0]]), "tracker.window must hold loss, tokens and seconds"),
    (put(["tracker", "window"], [[1.0, -2.0, 3.0]]), "tracker.window must be a number from 0"),
    (put(["tracker", "mlflow"], {"run_id": 3}), "tracker.mlflow.run_id must be text"),
    (put(["tracker", "memory"], -1), "tracker.memory must be a whole number from 0"),
    (put(["tracker", "reserved"], "x"), "tracker.reserved must be a whole number from 0"),
    (put(["loss_scale", "scaler"], {"scale": -1.0}), "loss_scale.scaler.scale must be a number above 0"),
    (put(["loss_scale", "skipped"], DELETED), "the key loss_scale.skipped is missing"),
    (put(["training"], []), "training must be an object"),
    (put(["training", "seed"], "x" * 10**6), "seed is 42 here, 'xxxx"),
    (put(["optimizer", "state", "#0", "exp_avg"], {"$tensor": "nothing"}), "names the tensor 'nothing'"),
    (put(["optimizer", "state", "#0", "exp_avg"], {"$tensor": []}), "names the tensor []"),
    (put(["optimizer", "state", "#x"], {}), "it holds the key '#x', which is no number"),
    (put(["optimizer", "state", "#-1"], {}), "it holds the key '#-1', which is no number"),
    (put(["optimizer", "state", "#99"], {}), "optimizer.state holds 99; there are 16 parameters"),
    (put(["optimizer", "state", "exp"], {}), "optimizer.state holds 'exp'"),
    (put(["optimizer", "state", "#0"], {}), "optimizer.state.0.step must be a number in float32, not None"),
    (put(["optimizer", "state", "#0", "exp_avg"], DELETED), "optimizer.state.0 does not hold the moments"),
    (put(["optimizer", "state", "#0", "more"], 1), "optimizer.state.0 does not hold the moments"),
    (put(["optimizer", "state"], DELETED), "the key optimizer.state is missing"),
    (put(["optimizer", "param_groups"], DELETED), "optimizer.param_groups are not those of this optimizer"),
    (put(["optimizer", "param_groups", 0, "betas"], [2, 3]), "optimizer.param_groups are not those"),
    (put(["optimizer", "param_groups", 0, "params"], [0]), "optimizer.param_groups are not those"),
    (resize("optimizer.state.#0.exp_avg", torch.zeros(3)), "of a parameter of shape (8, 64)"),
    (resize("optimizer.state.#0.exp_avg", torch.zeros(8, 64).int()), "of a parameter of shape (8, 64)"),
    (resize("optimizer.state.#0.exp_avg_sq", torch.full((8, 64), math.nan)), "optimizer.state.0 is infinite or NaN"),
    (resize("optimizer.state.#0.step", torch.tensor(-3.0)), "optimizer.state.0.step must be a number from 0"),
    (resize("optimizer.state.#0.step", torch.tensor(math.nan)), "optimizer.state.0.step must be a number from 0"),
]  # fmt: skip


def test_wrong_contents_with_right_digests_are_one_line_before_anything_is_written(stopped):
    directory, refused = stopped
    checkpoint = directory / "checkpoint-6"
    shutil.copytree(checkpoint, directory.with_name("whole"))
    for change, said in WRONG:
        shutil.rmtree(checkpoint)
        shutil.copytree(directory.with_name("whole"), checkpoint)
        rewrite(checkpoint, change)
        message = refused(checkpoint)
        assert said in message and len(message) <= 700
    for changes, said in (
        (dict(r=4), "adapter_config.json says r = 4, and the settings of this training 8"),
        (dict(use_rslora=True), "adapter_config.json says use_rslora = True"),
        (dict(r=-1), "adapter_config.json: r must be a whole number"),
        (dict(target_modules=["q_proj"]), "does not fit the model: it was made for"),
    ):
        shutil.rmtree(checkpoint)
        shutil.copytree(directory.with_name("whole"), checkpoint)
        rewrite(checkpoint, adapter=changes)
        assert said in refused(checkpoint)
    shutil.rmtree(checkpoint)
    shutil.copytree(directory.with_name("whole"), checkpoint)
    (checkpoint / TENSORS_FILE).write_bytes(b"no tensors")
    digests = json.loads((checkpoint / DIGESTS_FILE).read_text())
    digests[TENSORS_FILE] = hashlib.sha256(b"no tensors").hexdigest()
    (checkpoint / DIGESTS_FILE).write_text(json.dumps(digests))
    assert f"{checkpoint / TENSORS_FILE} is truncated or corrupt" in refused(checkpoint)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_json_at_any_place_of_a_state_is_accepted_or_one_line(data):
    state = {
        "step": 3, "seconds": 1.5, "best": {"loss": math.inf, "step": 0, "waited": 0},
        "optimizer": {}, "training": {},
        "loss_scale": {"scaler": {}, "skipped": 0, "skipped_in_a_row": 0},
        "tracker": {"records": [{"step": 1, "loss": 2.0}], "window": [[math.nan, 3, 0.1]], "seconds": 1.0},
    }  # fmt: skip
    check_state(state)
    inner, path = state, []
    while isinstance(inner, dict | list) and inner and (not path or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        outer, inner = inner, inner[key]
        path.append(key)
    outer[path[-1]] = data.draw(JSON)
    try:
        check_state(state)
    except UserError as error:
        assert len(str(error)) <= 500 and str(error).isprintable()
    else:
        assert type(state["step"]) is int and 0 <= state["step"] <= 10**12
        assert type(state["seconds"]) in (int, float) and state["seconds"] >= 0


# ---- the files ---------------------------------------------------------------------------------------------


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.integers(0, 50) | st.text().filter(lambda key: not key.startswith(("#", "$")))
trees = st.dictionaries(
    keys,
    st.recursive(
        plain | tensors,
        lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=3),
        max_leaves=10,
    ),
    max_size=4,
)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(tree=trees)
def test_any_state_comes_back_from_its_files_as_it_was(tree, tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1", write_adapter, tree)
    assert equal(tree, read_checkpoint(tmp_path / "checkpoint-1"))


def test_views_and_tensors_that_share_memory_are_packed_apart():
    base = torch.arange(12.0).view(3, 4)
    tree, parts = flatten({"a": base, "b": base.T, "c": [base[0], math.inf]})
    assert json.loads(json.dumps(tree))["a"] == {"$tensor": "a"} and parts["b"].is_contiguous()
    base.zero_()
    assert torch.equal(unflatten(tree, parts)["b"], torch.arange(12.0).view(3, 4).T)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoint-1"
    write_checkpoint(directory, write_adapter, {"step": 1, "optimizer": {0: torch.arange(100.0)}})
    return directory


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_changed_byte_and_any_truncation_is_noticed_and_the_file_is_named(data, written):
    path = written / data.draw(
        st.sampled_from(["adapter_config.json", "adapter_model.safetensors", STATE_FILE, TENSORS_FILE])
    )
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed if data.draw(st.booleans()) else whole[:place])
        with pytest.raises(UserError) as error:
            read_checkpoint(written)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"adapter_config.json": 3}'])
def test_broken_digests_are_noticed(tmp_path, content):
    directory = tmp_path / "checkpoint-1"
    write_checkpoint(directory, write_adapter, {})
    (directory / DIGESTS_FILE).write_text(content)
    with pytest.raises(UserError, match="digests.json"):
        read_checkpoint(directory)
    (directory / DIGESTS_FILE).unlink()
    with pytest.raises(UserError, match="digests.json is missing"):
        read_checkpoint(directory)


def limit_files(size):
    """Make the system refuse every file that grows beyond `size` bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# Room for no adapter; for the adapter alone; for half of the tensors.
@pytest.mark.parametrize("room", [100, 300, 3000])
def test_a_save_without_room_loses_nothing_and_is_one_line(tmp_path, room):
    state = {"step": 1, "optimizer": {0: torch.arange(1000.0)}}
    write_checkpoint(tmp_path / "checkpoint-1", write_adapter, state)
    try:
        limit_files(room)
        for step in (1, 2):
            with pytest.raises(
                UserError,
                match=rf"checkpoint-{step} could not be saved: .+; earlier checkpoints are complete",
            ):
                write_checkpoint(tmp_path / f"checkpoint-{step}", write_adapter, state)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert equal(state, read_checkpoint(tmp_path / "checkpoint-1"))


def test_a_disk_that_fills_up_during_a_save_ends_the_run_and_loses_nothing(train, monkeypatch):
    keys = dict(max_steps=6, save_steps=2, lora_dropout=0.1, learning_rate=1e-2, save_total_limit=1)
    whole, _ = train("whole", **keys)

    def on_a_full_disk(directory, *arguments):
        try:
            if directory.name == "checkpoint-4":
                limit_files(40_000)  # the adapter fits, the optimizer's moments do not
            write_checkpoint(directory, *arguments)
        finally:
            limit_files(resource.RLIM_INFINITY)

    monkeypatch.setattr(checkpoints, "write_checkpoint", on_a_full_disk)
    stopped, err = train("stopped", code=2, **keys)
    assert "checkpoint-4 could not be saved" in err and err.count("\n") == 1 and "Traceback" not in err
    assert [path.name for path in list_checkpoints(stopped)] == ["checkpoint-2"]
    monkeypatch.setattr(checkpoints, "write_checkpoint", write_checkpoint)
    train("stopped", resume_from_checkpoint="latest", **keys)
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("operation", ["fsync", "replace", "mkdir"])
def test_an_error_at_any_operation_leaves_the_earlier_checkpoint_alone(tmp_path, monkeypatch, operation):
    state = {"optimizer": torch.arange(10.0)}
    write_checkpoint(tmp_path / "checkpoint-1", write_adapter, state)
    original, calls = getattr(os, operation), 0
    for fail_at in range(1, 100):
        calls = 0

        def failing(*arguments, fail_at=fail_at, **keys):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **keys)

        monkeypatch.setattr(os, operation, failing)
        try:
            write_checkpoint(tmp_path / "checkpoint-2", write_adapter, state)
        except UserError as error:
            assert "No space left on device" in str(error)
        monkeypatch.setattr(os, operation, original)
        whole = list_checkpoints(tmp_path)
        assert whole[0].name == "checkpoint-1" and all(equal(state, read_checkpoint(path)) for path in whole)
        assert sorted(whole) == sorted(tmp_path.iterdir())
        if calls < fail_at:
            assert fail_at > 1
            break
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    steps=st.sets(st.integers(1, 30), max_size=10),
    step=st.integers(1, 30),
    keep=st.integers(1, 4),
    spare=st.none() | st.integers(1, 30),
)
def test_old_checkpoints_go_the_newest_and_the_best_stay_and_so_do_those_of_an_earlier_life(
    tmp_path, steps, step, keep, spare
):
    shutil.rmtree(tmp_path)
    for n in steps | {step}:
        (tmp_path / f"checkpoint-{n}").mkdir(parents=True)
    (tmp_path / "checkpoint-mine").mkdir()
    delete_old_checkpoints(tmp_path, step, keep, spare)
    up_to_now = sorted(n for n in steps | {step} if n <= step)
    left = set(up_to_now[-keep:]) | {n for n in up_to_now if n == spare} | {n for n in steps if n > step}
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in sorted(left)]
    assert step in left and (tmp_path / "checkpoint-mine").is_dir()


def test_the_half_done_checkpoints_of_a_killed_run_are_deleted_at_the_next_start(train, tmp_path):
    directory, _ = train(save_steps=2)
    for name in ("checkpoint-3.part", "checkpoint-1.old"):
        shutil.copytree(directory / "checkpoint-2", directory / name)
    assert find_checkpoint(directory)[0].name == "checkpoint-4"
    train(save_steps=2, resume_from_checkpoint="latest")
    assert not list(directory.glob("checkpoint-*.*"))


# ---- fingerprints -------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=5), max_size=5), st.lists(st.binary(max_size=5), max_size=5))
def test_fingerprints_are_equal_for_equal_chunks_only(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_the_sample_of_a_model_sees_a_changed_tensor_anywhere(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    data = bytearray(1_000_000)
    (tmp_path / "a.safetensors").write_bytes(data)
    seen = {fingerprint(sample_model(tmp_path))}
    for start in range(0, 1_000_000, 100_000):  # a tensor of a tenth of the file
        changed = bytearray(data)
        changed[start : start + 100_000] = b"x" * 100_000
        (tmp_path / "a.safetensors").write_bytes(changed)
        seen.add(fingerprint(sample_model(tmp_path)))
    (tmp_path / "a.safetensors").write_bytes(data + b"\0")
    seen.add(fingerprint(sample_model(tmp_path)))
    assert len(seen) == 12


def test_a_checkpoint_from_before_a_key_existed_goes_on_if_the_key_has_its_default(tmp_path):
    now = asdict(TrainConfig(lora_rank=4, adam_beta2=0.95))
    older = {name: value for name, value in now.items() if not name.startswith("adam_")}
    checkpoints.check_same_training(older, now | {"adam_beta2": 0.999}, set(), tmp_path)
    with pytest.raises(UserError, match="adam_beta2 is 0.95 here, 0.999 there"):
        checkpoints.check_same_training(older, now, set(), tmp_path)
