"""The records of a run in metrics.jsonl, MLflow and TensorBoard; a failure of the last two never stops it."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.project import metrics

from minilora import UserError
from minilora.loss_scale import LossScale
from minilora.run import checkpoints, plots, reporters
from minilora.run.plots import plot_loss, plot_runs, plot_training
from minilora.run.reporters import Reporter, make_reporters
from minilora.run.tracker import StepMetrics, Tracker

NO_SCALE = LossScale(torch.device("cpu"), enabled=False)
OTHERS_WARN = pytest.mark.filterwarnings("ignore")  # of MLflow's and TensorBoard's imports


class Shelf:
    """A service in memory that, like MLflow, records each step once. Calls fail as `outages` says."""

    name, address = "shelf", "a shelf"

    def __init__(self, outages=()):
        self.outages, self.is_open, self.kept, self.finished = iter(outages), False, [], None

    def call(self):
        if next(self.outages, False):
            raise OSError("fell down")

    def open(self):
        self.call()
        self.is_open = True

    def send(self, records):
        for _, record in records:
            self.call()  # any record may be the last to arrive
            if record["step"] not in self.kept:
                self.kept.append(record["step"])

    def finish(self, status, files):
        self.call()
        self.finished = status, files

    def disconnect(self):
        self.is_open = False

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.state = state


def tracker_of(directory, *reporters, state=None, total_steps=6):
    return Tracker(directory, total_steps, epoch_steps=3, logging_steps=1, state=state, reporters=reporters)


def take_steps(tracker, first, last):
    for step in range(first, last + 1):
        tracker.step(StepMetrics(step, 1 / step, 1e-3, 2.0, 100, 0.5, 2**30), NO_SCALE)


@given(outages=st.lists(st.booleans(), max_size=30), count=st.integers(1, 12))
def test_whatever_fails_every_record_arrives_once_and_in_order_after_the_outage(outages, count):
    shelf = Shelf([*outages, *[True] * 50])
    reporter, warnings = Reporter(shelf), []
    reporter.begin([], {}, warnings.append)
    for step in range(count):
        reporter.next_try = 0.0
        reporter.log({"step": step})
        assert shelf.kept == list(range(len(shelf.kept)))
    shelf.outages = iter(())
    reporter.finish("FINISHED", [])
    assert shelf.kept == list(range(count)) and shelf.finished == ("FINISHED", [])


def test_an_outage_is_one_line_and_the_place_then_rests(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reporters.time, "monotonic", lambda: now[0])
    shelf = Shelf([False] * 3 + [True] * 2)  # opened, two records, down twice
    tracker = tracker_of(tmp_path, Reporter(shelf))
    take_steps(tracker, 1, 4)
    assert shelf.kept == [1, 2]
    warned = "warning: a shelf does not record (fell down); training goes on and metrics.jsonl has it all"
    assert [line for line in capsys.readouterr().out.splitlines() if "warning" in line] == [warned]
    now[0] += reporters.RETRY_SECONDS
    take_steps(tracker, 5, 5)  # still down, without another warning
    assert shelf.kept == [1, 2] and "warning" not in capsys.readouterr().out
    tracker.finish("FINISHED", [])  # one last try, even before the retry time
    assert shelf.kept == [1, 2, 3, 4, 5] and shelf.finished
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_service_that_fails_while_a_failed_training_is_reported_gives_its_own_reason(tmp_path, capsys):
    tracker = tracker_of(tmp_path, Reporter(Shelf([True])))
    with pytest.raises(ValueError, match="out of memory"), tracker:
        raise ValueError("out of memory")
    assert "a shelf does not record (fell down)" in capsys.readouterr().out


def test_ctrl_c_is_not_swallowed(tmp_path):
    shelf = Shelf()
    shelf.send = lambda records: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        take_steps(tracker_of(tmp_path, Reporter(shelf)), 1, 1)


def test_a_resumed_run_reports_its_earlier_records_too_and_counts_its_seconds_on(tmp_path):
    tracker = tracker_of(tmp_path, Reporter(Shelf()))
    take_steps(tracker, 1, 3)
    state = json.loads(json.dumps(tracker.state_dict() | {"shelf": {"run_id": "7"}}))
    shelf = Shelf()
    tracker = tracker_of(tmp_path, Reporter(shelf), state=state)
    take_steps(tracker, 4, 4)
    assert shelf.state == {"run_id": "7"} and shelf.kept == [1, 2, 3, 4]
    assert tracker.records[-1]["seconds"] == 4 * 0.5


def test_a_process_without_a_directory_reports_nothing():
    shelf = Shelf()
    tracker = tracker_of(None, Reporter(shelf))
    take_steps(tracker, 1, 2)
    tracker.finish("FINISHED", [])
    assert len(tracker.records) == 2 and not shelf.is_open and shelf.finished is None


@pytest.mark.parametrize(
    "name, said", [("comet_ml", "report_to = 'comet_ml' is not known"), ("mlflow", "pip install 'minilora[mlflow]'"),
                   ("tensorboard", "pip install 'minilora[tensorboard]'"), ("wandb", "pip install 'minilora[wandb]'")]
)  # fmt: skip
def test_an_unknown_or_missing_package_is_told_at_the_start(tmp_path, monkeypatch, name, said):
    for package in reporters.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError) as error:
        make_reporters([name], tmp_path, {})
    assert said in str(error.value) and "\n" not in str(error.value)
    assert make_reporters([], tmp_path, {}) == make_reporters(["all"], tmp_path, {}) == []


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"mlflow_tracking_uri = 'http://\[::1' is no address"):
        make_reporters([], tmp_path, {}, tracking_uri="http://[::1")


def test_a_password_in_the_address_of_the_server_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as error:
        make_reporters(["mlflow"], tmp_path, {}, tracking_uri="https://me:secret@host/")
    assert "secret" not in str(error.value) and "https://host/" in str(error.value)


def test_the_time_left_counts_steps_and_not_the_evaluation_before_them(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("minilora.run.tracker.time.perf_counter", lambda: now[0])
    tracker = tracker_of(tmp_path)
    now[0] += 500  # an evaluation
    now[0] += 2
    tracker.step(StepMetrics(1, 1.0, 1e-3, 2.0, 100, 2.0, 2**30), NO_SCALE)
    assert capsys.readouterr().out.endswith("0:10 left\n")  # five more steps of two seconds


def test_on_a_gpu_the_reserved_memory_stands_beside_the_memory_in_use(tmp_path, capsys):
    tracker = tracker_of(tmp_path)
    tracker.step(StepMetrics(1, 1.0, 1e-3, 2.0, 100, 2.0, 3 << 30, 7 << 29), NO_SCALE)
    assert "  3.00 of 3.50 GiB  " in capsys.readouterr().out
    assert metrics(tmp_path)[0]["memory_reserved"] == 7 << 29
    tracker.step(StepMetrics(2, 1.0, 1e-3, 2.0, 100, 2.0, 3 << 30), NO_SCALE)
    assert "memory_reserved" not in metrics(tmp_path)[-1]  # a CPU has no such figure


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_line_beside_the_bar_is_whole_on_every_terminal_it_fits_on(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    tracker = tracker_of(tmp_path, total_steps=12345)
    take_steps(tracker, 12343, 12344)
    shown = str(tracker.bar)
    tracker.close()
    assert "GiB" in shown and shown.endswith(" left") and (len(shown) <= columns or columns == 40)


def test_a_loss_that_falls_by_more_than_twenty_is_drawn_on_a_logarithmic_scale_with_whole_steps(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    for last in (0.5, 0.01):
        plot_loss([{"step": 1, "loss": 4.0}, {"step": 3, "loss": last}], tmp_path / "a.png")
    assert [axes.get_yscale() for axes in drawn] == ["linear", "log"]
    assert all(tick == int(tick) for axes in drawn for tick in axes.get_xticks())


@pytest.mark.parametrize("length", [4, 40, 90])
def test_every_name_of_a_run_is_whole_in_the_picture(tmp_path, monkeypatch, length):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    names = [f"{i}".ljust(length, "x") for i in range(8)]
    plot_runs(
        {name: [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}] for name in names}, tmp_path / "a.png"
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 or length == 90, (
        "as long as one name fits beside its line"
    )


def test_pictures_draw_any_records(tmp_path):
    plot_loss([{"step": 0, "eval_loss": 1.0}], tmp_path / "nothing.png")
    plot_training([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
    tracker = tracker_of(tmp_path)
    tracker.log(step=0, eval_loss=2.0)
    take_steps(tracker, 1, 3)
    tracker.step(StepMetrics(4, 0.2, 1e-3, math.nan, 100, 0.5, 2**30), NO_SCALE)  # records no gradient norm
    for draw in (plot_loss, plot_training):
        draw(tracker.records, tmp_path / "a.png")
        whole = (tmp_path / "a.png").read_bytes()
        draw(tracker.records[1:2], tmp_path / "a.png")
        assert whole.startswith(b"\x89PNG") and (tmp_path / "a.png").read_bytes() != whole


# ---- the real packages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory of runs that share one MLflow store, because making a store takes seconds."""
    return tmp_path_factory.mktemp("my runs")


@OTHERS_WARN
def test_mlflow_holds_one_run_with_parameters_metrics_and_artifacts_which_a_resumed_training_goes_on_with(
    runs, monkeypatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start(directory, state=None, **changed):
        directory.mkdir(exist_ok=True)
        parameters = {
            "learning_rate": 1e-4,
            "lora_target": ["q_proj", "v_proj"],
            "dataset": "https://me:pw@host/a.jsonl",
        } | changed
        return tracker_of(
            directory, *make_reporters(["mlflow"], directory, parameters, run_name="first"), state=state
        )

    def history(run, metric):
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]

    directory = runs / "a"
    tracker = start(directory)
    tracker.log(step=0, eval_loss=3.0)
    take_steps(tracker, 1, 2)
    state = json.loads(json.dumps(tracker.state_dict()))
    take_steps(tracker, 3, 4)  # after the checkpoint; then it is killed
    tracker = start(directory, state, max_steps=9)
    take_steps(tracker, 3, 6)
    (directory / "adapter.bin").write_bytes(b"weights")
    tracker.finish("FINISHED", [directory / "adapter.bin"])

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'minilora'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    parameters = {
        "learning_rate": "0.0001",
        "lora_target": "q_proj, v_proj",
        "dataset": "https://host/a.jsonl",
        "max_steps": "9",
    }
    assert run.data.params == parameters
    assert history(run, "loss") == [(step, 1 / step) for step in range(1, 7)] and history(
        run, "eval_loss"
    ) == [(0, 3.0)]
    assert run.data.metrics["seconds"] == 3.0 and "step" not in run.data.metrics
    (artifact,) = client.list_artifacts(run.info.run_id)
    assert (
        artifact.path == "adapter.bin"
        and (runs / "mlartifacts" / run.info.run_id / "artifacts" / artifact.path).is_file()
    )

    other = start(runs / "b", state)  # a's checkpoint in another directory: a new MLflow run
    take_steps(other, 3, 3)
    other.finish("KILLED")
    assert other.state_dict()["mlflow"] != state["mlflow"]
    run = client.get_run(other.state_dict()["mlflow"]["run_id"])
    assert run.info.status == "KILLED" and [step for step, _ in history(run, "loss")] == [1, 2, 3]


@OTHERS_WARN
@pytest.mark.parametrize("server", ["dead", "hanging"])
def test_an_mlflow_server_that_is_dead_or_hangs_costs_a_line_and_one_timeout(
    tmp_path, monkeypatch, capsys, server
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hf_aSecretToken")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "hanging":
            listening.listen()
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        tracker = tracker_of(tmp_path, *make_reporters(["mlflow"], tmp_path, {}, tracking_uri=uri))
        take_steps(tracker, 1, 1)
        started = time.perf_counter()
        take_steps(tracker, 2, 6)
        assert time.perf_counter() - started < 0.9  # less than a timeout: no second request
        tracker.finish("FINISHED", [])
    out, err = capsys.readouterr()
    warnings = [line for line in out.splitlines() if not line.startswith("step")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: MLflow at {uri} does not record (")
    assert (
        "SecretToken" not in out + err
        and err == ""
        and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    )


@OTHERS_WARN
def test_a_store_that_cannot_be_opened_costs_a_line_and_no_time(tmp_path, capsys):
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/nowhere/mlflow.db"
    tracker = tracker_of(tmp_path, *make_reporters(["mlflow"], tmp_path, {}, tracking_uri=uri))
    started = time.perf_counter()
    take_steps(tracker, 1, 2)
    tracker.finish("FINISHED")
    assert time.perf_counter() - started < 5  # MLflow alone would retry for a minute and a half
    assert capsys.readouterr().out.count("warning: MLflow at") == 1


@OTHERS_WARN
def test_a_training_is_a_run_in_mlflows_store_with_the_metrics_of_metrics_jsonl_and_its_files(
    train, tmp_path, monkeypatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory, _ = train(max_steps=4, val_size=4, logging_steps=1, report_to="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("minilora").experiment_id])
    assert (
        run.info.status == "FINISHED"
        and run.data.params["max_steps"] == "4"
        and run.info.run_name == directory.name
    )
    for metric in ("loss", "lr", "grad_norm", "memory", "eval_loss"):
        kept = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
        assert kept == [
            (record["step"], record[metric]) for record in metrics(directory) if metric in record
        ], metric
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "loss.png",
        "training_config.yaml",
    } <= files


@OTHERS_WARN
def test_a_training_that_fails_is_reported_to_mlflow(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def full(*_):
        raise UserError("checkpoint-2 could not be saved: No space left on device")

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    train(code=2, save_steps=2, report_to="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("minilora").experiment_id])
    assert run.info.status == "FAILED"


@OTHERS_WARN
def test_a_training_whose_mlflow_server_is_killed_goes_on_to_its_end(train, trainer, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *store,
    ]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        uri, patience = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while not answers(uri + "/health"):
            assert server.poll() is None and time.monotonic() < patience, (
                tmp_path / "server.log"
            ).read_text()
            time.sleep(0.2)
        take_step, seen = Tracker.step, []

        def kill_after_step_3(self, done, loss_scale):
            take_step(self, done, loss_scale)
            if done.step == 3:
                client = mlflow.MlflowClient(uri)
                (run,) = client.search_runs([client.get_experiment_by_name("minilora").experiment_id])
                seen.extend(point.step for point in client.get_metric_history(run.info.run_id, "loss"))
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

        monkeypatch.setattr(Tracker, "step", kill_after_step_3)
        directory, out = train(max_steps=8, logging_steps=1, report_to="mlflow", mlflow_tracking_uri=uri)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert seen == [1, 2, 3] and out.count("warning: MLflow at") == 1
    assert [record["step"] for record in metrics(directory)] == list(range(1, 9)) and (
        directory / "README.md"
    ).is_file()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@OTHERS_WARN
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tracker_of(tmp_path, *make_reporters(["tensorboard"], tmp_path, {"lora_rank": 8}))
    tracker.log(step=0, eval_loss=3.0)
    take_steps(tracker, 1, 2)
    state = json.loads(json.dumps(tracker.state_dict()))
    take_steps(tracker, 3, 4)  # after the checkpoint; then it is killed
    time.sleep(1.1)  # event files are ordered by names that hold whole seconds
    tracker = tracker_of(tmp_path, *make_reporters(["tensorboard"], tmp_path, {"lora_rank": 8}), state=state)
    take_steps(tracker, 3, 3)
    tracker.finish("FINISHED")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("eval/loss")] == [3.0]
    assert b"lora_rank: 8" in events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0]


@OTHERS_WARN
def test_a_directory_that_tensorboard_cannot_write_is_a_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file is in the way")
    tracker = tracker_of(tmp_path, *make_reporters(["tensorboard"], tmp_path, {}))
    take_steps(tracker, 1, 2)
    tracker.finish("FINISHED")
    assert capsys.readouterr().out.count("warning: TensorBoard in") == 1
