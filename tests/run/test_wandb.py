"""A training in Weights & Biases: its settings and records, and nothing that could hold a secret."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.project import metrics

from minilora.run import reporters
from minilora.run.reporters import make_reporters
from minilora.run.services import WANDB_SETTINGS


class Cloud:
    """W&B's documented functions, in memory: a step may be logged again, but none before the last one."""

    def __init__(self):
        self.runs: dict[str, SimpleNamespace] = {}
        self.logged_in, self.down, self.inits = True, False, []

    def login(self, prompt=True):
        assert prompt is False, "a training must not wait for somebody to type a key"
        return self.logged_in

    def init(self, **keys):
        if self.down:
            raise ConnectionError("no answer")
        self.inits.append(keys)
        name = keys["id"] or f"run{len(self.runs)}"
        if keys["id"] is None or keys["resume"] != "allow":
            self.runs[name] = SimpleNamespace(id=name, step=0, history={}, exit_code=None)
        run = self.runs[name]
        run.log = lambda values, step: self.log(run, values, step)
        run.finish = lambda exit_code=0: vars(run).update(exit_code=exit_code)
        return run

    def log(self, run, values, step):
        if self.down:
            raise ConnectionError("no answer")
        assert step >= run.step, "W&B would drop this record"
        run.history.setdefault(step, {}).update(values)
        run.step = step

    @property
    def only_run(self):
        (run,) = self.runs.values()
        return run


@pytest.fixture
def cloud(monkeypatch):
    cloud, module = Cloud(), ModuleType("wandb")
    module.login, module.init, module.Settings = cloud.login, cloud.init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return cloud


def test_a_training_is_a_run_with_its_settings_and_the_metrics_of_metrics_jsonl(train, cloud):
    directory, out = train(max_steps=4, val_size=4, logging_steps=1, report_to="wandb", run_name="first")
    run, (init,) = cloud.only_run, cloud.inits
    assert (init["project"], init["name"], init["id"]) == ("minilora", "first", None)
    assert init["config"]["max_steps"] == "4" and init["dir"] == str(directory)
    for record in metrics(directory):
        for name, value in record.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert name == "step" or run.history[record["step"]][tag] == value
    assert sorted(run.history) == [0, 1, 2, 3, 4] and run.exit_code == 0 and "warning" not in out


def test_no_code_no_command_line_and_no_printed_line_is_sent(train, cloud):
    train(max_steps=1, report_to="wandb")
    settings = cloud.inits[0]["settings"]
    assert settings == WANDB_SETTINGS
    assert settings["disable_code"] and settings["disable_git"] and settings["x_disable_meta"]
    assert settings["console"] == "off" and settings["reinit"] == "create_new"


def test_no_secret_of_an_address_is_recorded(tmp_path, cloud):
    parameters = {"upload": "s3://me:hunter2@bucket/run", "dataset": ["https://host/a.json?token=hunter2"]}
    (reporter,) = make_reporters(["wandb"], tmp_path, parameters)
    reporter.begin([], {}, print)
    reporter.log({"step": 1, "loss": 1.0})
    assert cloud.inits[0]["config"].keys() == parameters.keys()
    assert "hunter2" not in json.dumps(cloud.inits[0]) + json.dumps(reporter.service.state_dict())


def test_a_resumed_training_continues_its_run_and_no_record_arrives_twice(train, cloud):
    keys = dict(lr_scheduler_type="constant", logging_steps=1, save_steps=2, report_to="wandb")
    directory, _ = train(max_steps=3, **keys)
    resume = dict(resume_from_checkpoint=directory / "checkpoint-2")
    again, _ = train(max_steps=5, **resume, **keys)
    assert again == directory and sorted(cloud.only_run.history) == [1, 2, 3, 4, 5]
    assert [init["id"] for init in cloud.inits] == [None, "run0"]


def test_a_checkpoint_of_another_directory_begins_a_run_of_its_own(tmp_path, cloud):
    (reporter,) = make_reporters(["wandb"], tmp_path, {})
    reporter.begin([], {"run_id": "run7", "directory": "/elsewhere"}, print)
    reporter.log({"step": 1, "loss": 1.0})
    assert cloud.inits[0]["id"] is None


def test_offline_a_resumed_training_begins_another_run_with_the_whole_history(tmp_path, cloud, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cloud.logged_in = False  # nobody is asked
    (first,) = make_reporters(["wandb"], tmp_path, {})
    first.begin([], {}, print)
    first.log({"step": 1, "loss": 1.0})
    (second,) = make_reporters(["wandb"], tmp_path, {})
    second.begin([{"step": 1, "loss": 1.0}], first.service.state_dict(), print)
    second.log({"step": 2, "loss": 0.5})
    assert [sorted(run.history) for run in cloud.runs.values()] == [[1], [1, 2]]


def test_a_service_that_fails_is_one_warning_and_gets_the_rest_later(tmp_path, cloud, monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(reporters.time, "monotonic", lambda: now[0])
    (reporter,) = make_reporters(["wandb"], tmp_path, {})
    reporter.begin([], {}, said.append)
    for step in range(1, 5):
        cloud.down = step in (2, 3)
        reporter.log({"step": step, "loss": 1 / step})
    cloud.down, now[0] = False, reporters.RETRY_SECONDS
    reporter.finish("FAILED", [])
    assert said == [
        "warning: W&B's project minilora does not record (no answer); "
        "training goes on and metrics.jsonl has it all"
    ]
    run = cloud.only_run
    assert {step: values["train/loss"] for step, values in run.history.items()} == {
        1: 1.0,
        2: 1 / 2,
        3: 1 / 3,
        4: 1 / 4,
    }
    assert run.exit_code == 1


def test_without_a_key_nobody_is_asked_and_the_training_goes_on(train, cloud):
    cloud.logged_in = False
    directory, out = train(max_steps=2, report_to="wandb")
    assert out.count("no API key: run `wandb login`, or set WANDB_MODE=offline") == 1
    assert not cloud.runs and (directory / "README.md").is_file()
